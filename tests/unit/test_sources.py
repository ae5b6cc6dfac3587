"""One content in every layout: Decathlon, TotalSegmentator and DICOM trees give the cohort that nnU-Net raw gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom.uid import generate_uid

from distseg.cli import main
from distseg.data.cohort import Cohort, read_attrs, sources_path
from distseg.data.formats import NiftiImage, discover
from distseg.errors import ConfigError, DataError, FinishedWithFailures, InputError
from distseg.work.cohort_salt import salt_path
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import IngestReport, ingest_cohort
from tests.unit import dicom_writer as write

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
MANDIBLE, ORGANS = SHARED / "openkbp_mandible", SHARED / "openkbp_organs"
SERIES = SHARED / "dicom_ct_series"
SHAPE = (7, 6, 5)
CLASSES = {"background": 0, "hip": 1, "femur": 2}


def ingest(source: Path, cohort: Path, **more: Any) -> IngestReport:
    return ingest_cohort(source=str(source), cohort=str(cohort), executor=LocalExecutor(1), progress=False, **more)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 1.5, 3, 1]) if affine is None else affine), path)
    return path


def ct(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def label(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, SHAPE).astype(np.uint8)


def decathlon(root: Path, **changes: Any) -> Path:
    """a and b are labelled, c is not, t is of the list test."""
    for seed, name in enumerate("abc"):
        save(root / f"imagesTr/{name}.nii.gz", ct(seed))
    save(root / "imagesTs/t.nii.gz", ct(9))
    for seed, name in enumerate("ab"):
        save(root / f"labelsTr/{name}.nii.gz", label(seed))
    pairs = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "ab"]
    dataset = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "hip", "2": "femur"},
        "training": [*pairs, {"image": "./imagesTr/c.nii.gz"}],
        "test": ["./imagesTs/t.nii.gz"],
        **changes,
    }
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root


def totalsegmentator(root: Path, image: str = "ct.nii.gz") -> Path:
    """As decathlon's a, b and c; further structures beside."""
    for seed, name in enumerate("abc"):
        save(root / name / image, ct(seed))
        for value, structure in ((1, "hip"), (2, "femur"), (3, "spleen")):
            if name != "c":
                save(root / name / f"segmentations/{structure}.nii.gz", (label(seed) == value).astype(np.uint8))
    (root / "meta.csv").write_text("image_id;split\n")
    return root


def nnunet(root: Path) -> Path:
    for seed, name in enumerate("abc"):
        save(root / f"imagesTr/{name}_0000.nii.gz", ct(seed))
        if name != "c":
            save(root / f"labelsTr/{name}.nii.gz", label(seed))
    dataset = {"channel_names": {"0": "CT"}, "labels": CLASSES}
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root


def same_scans(one: Cohort, other: Cohort, ids: dict[str, str]) -> None:
    """`ids`: of the first cohort -> of the second."""
    assert one.classes == other.classes
    for left, right in ids.items():
        a, b = one.scan(left), other.scan(right)
        assert np.array_equal(a.image[...], b.image[...])
        assert np.allclose(a.geometry.affine, b.geometry.affine, rtol=0, atol=1e-4)
        assert (a.annotation is None) == (b.annotation is None)
        if a.annotation is not None and b.annotation is not None:
            assert np.array_equal(a.annotation[...], b.annotation[...])
        assert a.modality == b.modality == "CT"


def test_every_layout_of_one_content_is_one_cohort(tmp_path: Path) -> None:
    ingest(nnunet(tmp_path / "nnunet"), tmp_path / "n.zarr")
    report = ingest(decathlon(tmp_path / "msd"), tmp_path / "m.zarr", split=[0, 1, 0])
    assert (report.added, report.failed) == (["a", "b", "c", "t"], [])
    report = ingest(totalsegmentator(tmp_path / "ts"), tmp_path / "t.zarr", structures=["hip", "femur"])
    assert (report.added, report.failed) == (["a", "b", "c"], [])
    dicom = tmp_path / "dicom"
    for seed, name in enumerate("abc"):
        # The same places in LPS: NIfTI's x and y run the other way from the same origin.
        write.series(
            dicom / name,
            (ct(seed).T + 1024).astype(np.uint16),
            origin=(0, 0, 0),
            orientation=(-1, 0, 0, 0, -1, 0),
            step=(0, 0, 3),
            spacing=(1.5, 2.0),
        )
        if name != "c":
            save(dicom / f"{name}.nii.gz", label(seed))
    report = ingest(dicom, tmp_path / "d.zarr", structures=["hip", "femur"])
    assert (len(report.added), report.failed) == (3, [])
    first = Cohort.open(tmp_path / "n.zarr")
    same = {name: name for name in "abc"}
    same_scans(first, Cohort.open(tmp_path / "m.zarr"), same)
    same_scans(first, Cohort.open(tmp_path / "t.zarr"), same)
    lines = [json.loads(line) for line in sources_path(tmp_path / "d.zarr").read_text().splitlines()]
    id_of = {Path(line["image"]).name: line["id"] for line in lines}
    same_scans(first, Cohort.open(tmp_path / "d.zarr"), {name: id_of[name] for name in "abc"})
    splits = {record.scan_id: record.split for record in Cohort.open(tmp_path / "m.zarr").records}
    assert splits == {"a": "val", "b": "val", "c": "val", "t": "test"}  # the list test stays what it is


@pytest.mark.skipif(not ORGANS.is_dir(), reason="needs the shared CT data beside the repository")
def test_real_ct_as_decathlon_and_totalsegmentator_equals_nnunet(tmp_path: Path) -> None:
    dataset = json.loads((ORGANS / "dataset.json").read_text())
    names = sorted(dataset["labels"], key=dataset["labels"].get)
    images = ORGANS.parent / "openkbp_mandible" / "imagesTr"
    cases = [path.name.removesuffix(".nii.gz") for path in sorted((ORGANS / "labelsTr").iterdir())[:2]]
    roots = {kind: tmp_path / kind for kind in ("nnunet", "msd", "ts")}
    for case in cases:
        image, truth = images / f"{case}_0000.nii.gz", ORGANS / f"labelsTr/{case}.nii.gz"
        links = {
            "nnunet": (f"imagesTr/{case}_0000", f"labelsTr/{case}"),
            "msd": (f"imagesTr/{case}", f"labelsTr/{case}"),
        }
        for kind, pair in links.items():
            for name, target in zip(pair, (image, truth), strict=True):
                path = roots[kind] / f"{name}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(target.resolve())
        (roots["ts"] / case).mkdir(parents=True)
        (roots["ts"] / case / "ct.nii.gz").symlink_to(image.resolve())
        loaded = nib.load(truth)
        for name in names[1:]:
            mask = (np.asanyarray(loaded.dataobj) == dataset["labels"][name]).astype(np.uint8)
            save(roots["ts"] / case / f"segmentations/{name}.nii.gz", mask, loaded.affine)
    shutil.copyfile(ORGANS / "dataset.json", roots["nnunet"] / "dataset.json")
    training = [{"image": f"imagesTr/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"} for case in cases]
    msd = {
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(names)},
        "training": training,
        "test": [],
    }
    (roots["msd"] / "dataset.json").write_text(json.dumps(msd))
    cohorts = {}
    for kind, root in roots.items():
        report = ingest(root, tmp_path / f"{kind}.zarr", structures=names[1:] if kind == "ts" else None)
        assert (report.added, report.failed) == (cases, [])
        cohorts[kind] = Cohort.open(tmp_path / f"{kind}.zarr")
    for kind in ("msd", "ts"):
        same_scans(cohorts["nnunet"], cohorts[kind], {case: case for case in cases})


def test_decathlon_lists_one_channel_and_nothing_outside(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    save(root / "imagesTr/a.nii.gz", ct(0, (*SHAPE, 1)))
    save(root / "imagesTr/b.nii.gz", ct(0, (*SHAPE, 2)))
    save(root / "imagesTr/unlisted.nii.gz", ct())
    (root / "imagesTr/._a.nii.gz").write_bytes(b"resource fork")
    dataset = json.loads((root / "dataset.json").read_text())
    dataset["training"] += [
        {"image": "../out.nii.gz"}, {"image": "/etc/passwd"}, {"image": "imagesTr/gone.nii.gz"},
        {"image": "imagesTr/c.nii.gz"}, {"image": "imagesTr/x.txt"}, {"image": "imagesTr/" + "y" * 300 + ".nii.gz"},
    ]  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(dataset))
    found = discover(root)
    assert (found.kind, found.classes, found.channel_names) == ("decathlon", CLASSES, {"0": "CT"})
    assert [(case.scan_id, case.label is not None, case.split) for case in found.cases] == [
        ("a", True, None),
        ("b", True, None),
        ("t", False, "test"),
    ]
    failures = dict(found.failures)
    assert "path leads out of the source (got ../out.nii.gz)" in failures["out"]
    assert "path leads out of the source (got /etc/passwd)" in failures["/etc/passwd"]
    assert "listed file is not there (got imagesTr/gone.nii.gz)" in failures["gone"]
    assert "case is listed twice (got c)" in failures["c"]
    assert "not a NIfTI file (got imagesTr/x.txt)" in failures["imagesTr/x.txt"]
    assert "listed file is not there" in failures["y" * 300]
    assert found.notes == (
        "1 images of the list test have no label and do not train",
        "1 images of imagesTr are in no list of dataset.json and left out",
    )
    assert found.cases[0].image.read().array.shape == SHAPE[::-1]
    with pytest.raises(DataError, match=r"b\.nii\.gz: 4-D image: more than one channel or time \(got \(7, 6, 5, 2\)\)"):
        found.cases[1].image.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": {"0": "T1", "1": "T2"}}, "more than one channel"),
        ({"training": [{"label": "x"}]}, "list not understood"),
        ({"training": ["imagesTr/a.nii.gz", 7]}, "list not understood"),
        ({"test": {"a": 1}}, "list not understood"),
        ({"test": [7]}, "list not understood"),
    ],
)
def test_decathlon_that_is_not_understood(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        discover(decathlon(tmp_path, **changes))
    assert "dataset.json" in str(caught.value)


def test_nnunet_with_a_list_is_still_nnunet(tmp_path: Path) -> None:
    """The older dataset.json lists imagesTr/a.nii.gz where the file is a_0000.nii.gz."""
    root = nnunet(tmp_path)
    dataset = json.loads((root / "dataset.json").read_text())
    dataset["training"] = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    (root / "dataset.json").write_text(json.dumps(dataset))
    assert discover(root).kind == "nnunet"


def test_totalsegmentator_case_by_case(tmp_path: Path) -> None:
    root = totalsegmentator(tmp_path / "in")
    save(root / "mr/mri.nii.gz", np.abs(ct()))
    save(root / "both/ct.nii.gz", ct())
    save(root / "both/mri.nii.gz", ct())
    (root / "none").mkdir()
    (root / "b/segmentations/femur.nii.gz").unlink()
    save(root / "a/segmentations/hip.nii.gz", label(0))
    with pytest.raises(InputError, match=r"data\.structures: the source has masks; .*of femur, hip, spleen and 0 more"):
        discover(root)
    found = discover(root, structures=["hip", "femur"])
    assert (found.kind, found.classes, found.channel_names) == ("totalsegmentator", CLASSES, None)
    images = {case.scan_id: case.image for case in found.cases}
    assert {name: image.modality for name, image in images.items() if isinstance(image, NiftiImage)} == {
        "a": "CT",
        "c": "CT",
        "mr": "MR",
    }
    failures = dict(found.failures)
    assert "both: more than one image (got ct.nii.gz and mri.nii.gz)" in failures["both"]
    assert "none: no image" in failures["none"]
    assert "b: structure without a mask (got femur)" in failures["b"]
    labelled = found.cases[0]
    assert labelled.label is not None
    volume = labelled.image.read()
    with pytest.raises(DataError, match=r"hip\.nii\.gz: not a binary mask \(got \[0, 1, 2\]\)"):
        labelled.label.read(image=volume, classes=found.classes)
    assert [case.label for case in discover(root, structures=[]).cases] == [None] * 4
    (root / "splits.json").write_text('{"val": ["a"], "train": ["c"]}')
    splits = {case.scan_id: case.split for case in discover(root, structures=["hip", "femur"]).cases}
    assert splits == {"a": "val", "c": "train", "mr": None}


@pytest.mark.parametrize(
    ("structures", "message"),
    [(["a", "a"], "each once"), (["background"], "without background"), ([""], "each once")],
)
def test_structures_are_names(structures: list[str], message: str) -> None:
    import distseg

    with pytest.raises(ConfigError, match=rf"data\.structures: .*{message}"):
        distseg.ingest(source="s", cohort="c", structures=structures)


def test_structures_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = totalsegmentator(tmp_path / "in")
    arguments = ["ingest", f"source={root}", f"cohort={tmp_path / 'c.zarr'}", "launcher=local", "resources.workers=1"]
    assert main([*arguments, "logging.progress=false"]) == 2
    assert "which are classes?" in capsys.readouterr().err
    assert main([*arguments, "data.structures=[hip,femur]", "logging.progress=false"]) == 0
    assert Cohort.open(tmp_path / "c.zarr").classes == CLASSES


def dicom_source(root: Path) -> dict[str, str]:
    """Three series, one of them broken, one beside another in one folder; name -> SeriesInstanceUID."""
    uids = {name: generate_uid() for name in ("one", "two", "bad")}
    arrays = [np.random.default_rng(seed).integers(0, 3000, (4, 5, 6)).astype(np.uint16) for seed in range(3)]
    write.series(root / "DOE JANE", arrays[0], uid=uids["one"], prefix="a")
    write.series(root / "DOE JANE", arrays[1], uid=uids["two"], prefix="b")
    write.series(root / "DOE JIM", arrays[2], uid=uids["bad"])[1].unlink()
    return uids


def test_dicom_ids_are_hashes_that_only_the_salt_can_make(tmp_path: Path) -> None:
    root, path = tmp_path / "in", tmp_path / "c.zarr"
    uids = dicom_source(root)
    report = ingest(root, path)
    assert [name for name, _ in report.failed] == ["DOE JIM"]
    assert "slices are missing" in report.failed[0][1]
    assert len(report.added) == 2
    again = ingest(root, path)
    assert (again.added, again.skipped) == ([], report.added)
    assert ingest(root, tmp_path / "other.zarr").added != report.added  # another salt
    kept = salt_path(path).read_text()
    assert salt_path(path).stat().st_mode & 0o777 == 0o600
    for wrong in (None, "ab" * 32, "no hex"):
        salt_path(path).unlink()
        if wrong is not None:
            salt_path(path).write_text(wrong)
        with pytest.raises(DataError, match=r"c\.salt: the cohort's salt is (missing or damaged|another one); ids of"):
            ingest(root, path)
        salt_path(path).write_text(kept)
    lines = [json.loads(line) for line in sources_path(path).read_text().splitlines()]
    assert {Path(line["image"]).name for line in lines} == {"a0000.dcm", "b0000.dcm"}
    for name in uids.values():
        assert not any(name.encode() in file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_a_changed_or_completed_series_is_taken_again(tmp_path: Path) -> None:
    root, path = tmp_path / "in", tmp_path / "c.zarr"
    array = np.random.default_rng(0).integers(0, 3000, (5, 5, 6)).astype(np.uint16)
    last = write.series(root / "one", array)[4].rename(tmp_path / "last.dcm")
    write.series(root / "two", array + 1)
    first = ingest(root, path)
    shutil.copyfile(last, root / "one/last.dcm")
    second = ingest(root, path)
    assert (len(second.added), len(second.skipped)) == (1, 1)
    assert set(second.added + second.skipped) == set(first.added)
    assert Cohort.open(path).scan(second.added[0]).image.shape[0] == 5
    shutil.copytree(root / "one", tmp_path / "elsewhere/one")
    assert ingest(tmp_path / "elsewhere", path).skipped == second.added  # the same series, wherever it lies
    (tmp_path / "elsewhere/one/last.dcm").unlink()
    with pytest.raises(FinishedWithFailures, match="scan id is taken"):
        ingest(tmp_path / "elsewhere", path)


def test_series_without_a_uid_are_told_apart_by_content(tmp_path: Path) -> None:
    root, path = tmp_path / "in", tmp_path / "c.zarr"
    blank = {"SeriesInstanceUID": "", "SOPInstanceUID": "", "SOPClassUID": "", "StudyInstanceUID": ""}
    for seed, name in enumerate("ab"):
        array = np.random.default_rng(seed).integers(0, 3000, (4, 5, 6)).astype(np.uint16)
        write.series(root / name, array, tags=blank)
    report = ingest(root, path)
    assert (len(report.added), report.failed) == (2, [])
    assert ingest(root, path).skipped == report.added
    shutil.copytree(root / "a", root / "c")
    found = discover(root)
    assert [name for name, _ in found.failures] == ["c"]
    assert "the same files are there twice (got as a)" in found.failures[0][1]
    assert found.notes == ("3 series have no SeriesInstanceUID: the id is of the files' content",)


@pytest.mark.slow
@pytest.mark.skipif(not SERIES.is_dir(), reason="needs the shared DICOM series beside the repository")
def test_real_series_into_a_cohort_and_back(tmp_path: Path) -> None:
    report = ingest(SERIES, tmp_path / "c.zarr")
    assert (len(report.added), report.failed) == (1, [])
    scan = Cohort.open(tmp_path / "c.zarr").scan(report.added[0])
    volume = discover(SERIES).cases[0].image.read()
    assert scan.image.dtype == np.int16
    assert np.array_equal(scan.image[...], volume.array)
    assert np.array_equal(scan.geometry.affine, volume.geometry.affine)
    attrs = read_attrs(Path(scan.path))
    assert attrs is not None
    assert attrs["modality"] == "CT"


def test_folders_that_hold_no_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.dcm").write_bytes(b"junk" * 100)
    with pytest.raises(FinishedWithFailures, match=r"x\.dcm: not readable as DICOM"):
        ingest(tmp_path / "in", tmp_path / "c.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no image found.*DICOM series"):
        discover(tmp_path / "empty")
