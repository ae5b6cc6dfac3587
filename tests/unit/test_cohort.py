"""The cohort store: what it keeps of a scan, that others can read it, and that nothing of a patient's name is in it."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zarr
from ome_zarr_models.v05 import Image

from distseg.cli import main
from distseg.data.body import find_body
from distseg.data.cohort import Cohort, Scan, index_path
from distseg.data.convert import ScanTask, convert_scan
from distseg.data.formats import Case, NiftiImage
from distseg.data.volume import Spacing, resample_box
from distseg.errors import DataError, InputError
from distseg.work.cohort_actions import list_cohort, remove_scan, repair_cohort
from distseg.work.cohort_index import write_attrs
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort

CLASSES = {"background": 0, "left hip": 1, "right hip": 2, "absent": 3}
# Native axes run Posterior, Left, Inferior, with a tilt of 10 degrees: nothing about it is canonical.
TILT = np.deg2rad(10.0)
AFFINE = np.eye(4)
AFFINE[:3, :3] = np.array(
    [[0, -2.0, 0], [-1.5 * np.cos(TILT), 0, -3.0 * np.sin(TILT)], [1.5 * np.sin(TILT), 0, -3.0 * np.cos(TILT)]]
)
AFFINE[:3, 3] = (40.0, -20.0, 300.0)
SHAPE = (70, 30, 20)  # native; canonical 20 x 70 x 30


def body_and_hips() -> tuple[np.ndarray, np.ndarray]:
    image = np.full(SHAPE, -1000, np.int16)
    image[5:60, 4:26, 2:18] = 40
    image[20:30, 10:15, 5:10] = -950  # an air hole, in the body all the same
    image[0, 0, 0] = 100  # a speck outside, not the body
    label = np.zeros(SHAPE, np.uint8)
    label[10:40, 5:12, 4:12] = 1
    label[50:52, 20:22, 10:12] = 2
    image[label > 0] = 700
    return image, label


def write_source(root: Path) -> Path:
    image, label = body_and_hips()
    for folder, array, name in (("imagesTr", image, "p_0000.nii.gz"), ("labelsTr", label, "p.nii.gz")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nifti = nib.Nifti1Image(array, AFFINE)
        nifti.header["descrip"] = b"DOE^JANE"
        nib.save(nifti, root / folder / name)
    nib.save(nib.Nifti1Image(image, AFFINE), root / "imagesTr/q_0000.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": CLASSES}))
    (root / "splits.json").write_text(json.dumps({"train": ["p"], "val": ["q"]}))
    return root


def ingested(tmp_path: Path, spacing_mm: Spacing | None = None) -> Cohort:
    source = write_source(tmp_path / "JANE_DOE")
    path = tmp_path / "store" / "hips.zarr"
    ingest_cohort(
        source=str(source), cohort=str(path), spacing_mm=spacing_mm, executor=LocalExecutor(1), progress=False
    )
    return Cohort.open(path)


@pytest.mark.parametrize("spacing_mm", [None, (3.0, 3.0, 3.0)])
def test_label_comes_back_voxel_for_voxel_in_the_native_grid(tmp_path: Path, spacing_mm: Spacing | None) -> None:
    cohort = ingested(tmp_path, spacing_mm)
    scan = cohort.scan("p")
    truth = scan.native_annotation()
    assert truth is not None
    scan.write_mask(tmp_path / "out.nii.gz", truth)
    written = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), body_and_hips()[1])
    assert np.allclose(written.affine, AFFINE, rtol=0, atol=1e-5)  # NIfTI keeps float32


@pytest.mark.parametrize("spacing_mm", [None, (3.0, 3.0, 3.0)])
def test_store_is_valid_ome_zarr(tmp_path: Path, spacing_mm: Spacing | None) -> None:
    cohort = ingested(tmp_path, spacing_mm)
    for record in cohort.records:
        image = Image.from_zarr(zarr.open_group(cohort.scan(record.scan_id).path, mode="r"))
        (axes,) = [multiscale.axes for multiscale in image.ome_attributes.multiscales]
        assert [(axis.name, axis.unit) for axis in axes] == [(name, "millimeter") for name in "zyx"]
        labels = [] if image.labels is None else image.labels.label_paths
        names = ["annotation", "annotation_native"] if spacing_mm else ["annotation"]
        assert labels == (names if record.labelled else [])
    scan = cohort.scan("p")
    image = zarr.open_array(f"{scan.path}/0", mode="r")
    assert image.metadata.dimension_names == ("z", "y", "x")
    assert image.dtype == np.int16
    if spacing_mm is None:
        assert image.shape == (20, 70, 30)
        assert image.chunks == (20, 64, 30)
        assert image.shards == (20, 128, 30)


def test_scan_attributes_against_the_arrays(tmp_path: Path) -> None:
    cohort = ingested(tmp_path)
    scan, record = cohort.scan("p"), cohort.records[0]
    image, label = scan.image[...], scan.annotation[...]
    native_image, native_label = body_and_hips()
    assert np.array_equal(scan.native.from_canonical(image), native_image)
    assert scan.geometry.spacing_mm == pytest.approx((3.0, 1.5, 2.0))
    assert (scan.minimum, scan.modality) == (-1000.0, "CT")
    assert scan.nonzero_mean == pytest.approx(image[image != 0].mean())
    assert scan.nonzero_sd == pytest.approx(image[image != 0].std())
    # Canonical z, y, x are native k (flipped), i, j (world axes Inferior, Posterior, Left).
    assert scan.body_box == ((2, 5, 4), (18, 60, 26))
    assert len(scan.body_samples) >= 2000
    assert np.all((scan.body_samples >= scan.body_box[0]) & (scan.body_samples < scan.body_box[1]))
    assert np.any(image[tuple(scan.body_samples.T)] == -950)  # the hole counts as inside
    assert set(scan.foreground) == {"left hip", "right hip"}
    for name, found in scan.foreground.items():
        where = np.argwhere(label == CLASSES[name])
        assert found.count == len(where) == record.voxels[name]
        assert found.box == (tuple(where.min(0)), tuple(where.max(0) + 1))
        assert len(found.samples) == min(len(where), 2000)
        assert len(np.unique(found.samples, axis=0)) == len(found.samples)
        assert np.all(label[tuple(found.samples.T)] == CLASSES[name])
        assert np.array_equal(found.values, image[tuple(found.samples.T)].astype(np.float32))
    assert record.voxels["left hip"] == np.count_nonzero(native_label == 1)
    assert cohort.scan("q").annotation is None
    assert cohort.scan("q").native_annotation() is None
    assert cohort.scan("q").foreground == {}


def test_resampled_store_holds_what_resample_box_says(tmp_path: Path) -> None:
    native, resampled = ingested(tmp_path / "a").scan("p"), ingested(tmp_path / "b", (3.0, 3.0, 3.0)).scan("p")
    assert resampled.geometry.spacing_mm == (3.0, 3.0, 3.0)
    assert resampled.geometry.shape == (20, 35, 20)
    box = {
        "source_spacing_mm": native.geometry.spacing_mm,
        "target_spacing_mm": (3.0, 3.0, 3.0),
        "start_zyx": (0, 0, 0),
        "size_zyx": (20, 35, 20),
        "fill": 0,
    }
    image = resample_box(native.image, order=1, **box)
    assert np.array_equal(resampled.image[...], np.rint(image).astype(np.int16))
    assert np.array_equal(resampled.annotation[...], resample_box(native.annotation, order=0, **box))


def test_samples_are_the_same_on_every_ingest(tmp_path: Path) -> None:
    one, two = ingested(tmp_path / "a").scan("p"), ingested(tmp_path / "b").scan("p")
    assert np.array_equal(one.body_samples, two.body_samples)
    assert np.array_equal(one.foreground["left hip"].samples, two.foreground["left hip"].samples)


def test_no_header_text_and_no_source_path_in_the_store(tmp_path: Path) -> None:
    cohort = ingested(tmp_path)
    for file in Path(cohort.path).rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert b"DOE" not in content
            assert b"JANE" not in content
    assert "JANE" not in index_path(Path(cohort.path)).read_text()
    assert "JANE_DOE" in (tmp_path / "store/hips.sources.jsonl").read_text()


def test_cohort_opens_from_attributes_and_index_alone(tmp_path: Path) -> None:
    cohort = ingested(tmp_path)
    assert cohort.class_names == list(CLASSES)
    assert (cohort.modality, cohort.channel_names) == ("CT", {"0": "CT"})
    assert [record.scan_id for record in cohort.select(split="val")] == ["q"]
    assert [record.scan_id for record in cohort.select(labelled=True)] == ["p"]
    assert [record.scan_id for record in cohort.select("train", labelled=False)] == []
    assert pickle.loads(pickle.dumps(cohort)) == cohort
    with pytest.raises(InputError, match=r"no such scan \(got r\)"):
        cohort.scan("r")


def test_opening_what_is_no_cohort(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cohort there"):
        Cohort.open(tmp_path)
    cohort = ingested(tmp_path)
    index_path(Path(cohort.path)).unlink()
    with pytest.raises(DataError, match=r"index is missing.*action=repair"):
        Cohort.open(cohort.path)
    attrs = Path(cohort.path) / "zarr.json"
    attrs.write_text(attrs.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(DataError, match=r"not a cohort of this version \(got 99\).*install a newer distseg"):
        Cohort.open(cohort.path)


def test_a_disk_that_does_not_answer_is_no_missing_cohort(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a scan without attributes, which a change of its split would write over."""
    cohort = ingested(tmp_path)
    store, source = Path(cohort.path), tmp_path / "JANE_DOE"
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    (source / "splits.json").write_text(json.dumps({"train": ["p", "q"]}))
    whole, broken = Path.open, store / "q/zarr.json"

    def opened(self: Path, *arguments: Any, **more: Any) -> Any:
        if self == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return whole(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="Input/output error"):
        write_attrs(store / "q", {"split": "train"})
    with pytest.raises(OSError, match="Input/output error"):
        _ = Scan(str(store / "q"), "q").attrs
    assert main(["ingest", f"source={source}", f"cohort={store}", "launcher=local", "resources.workers=1"]) == 3
    assert "q: OSError: [Errno 5] Input/output error" in capsys.readouterr().err
    broken = store / "zarr.json"
    assert main(["cohort", f"cohort={store}"]) == 2
    assert "Input/output error; the same command goes on once the storage answers" in capsys.readouterr().err
    for action in ("repair", "remove"):
        assert main(["cohort", f"cohort={store}", f"action={action}", "scan=q"][: 3 + (action == "remove")]) == 2
        assert "Input/output error" in capsys.readouterr().err
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before
    assert Cohort.open(store) == cohort


def test_a_line_cut_off_while_written_is_left_out(tmp_path: Path) -> None:
    cohort = ingested(tmp_path)
    with index_path(Path(cohort.path)).open("a") as file:
        file.write('{"id": "tor')
    assert Cohort.open(cohort.path) == cohort


def test_repair_rebuilds_the_index_and_drops_the_incomplete(tmp_path: Path) -> None:
    cohort = ingested(tmp_path)
    path = Path(cohort.path)
    make_incomplete(path, "half")
    index_path(path).unlink()
    report = repair_cohort(cohort.path)
    assert (report.scans, report.dropped, report.left) == (2, ["half"], [])
    assert Cohort.open(path) == cohort
    assert not (path / "half").exists()


def make_incomplete(store: Path, name: str) -> None:
    """A scan as it is before its last attribute is written."""
    shutil.copytree(store / "p", store / name)
    node = json.loads((store / name / "zarr.json").read_text())
    del node["attributes"]["complete"]
    (store / name / "zarr.json").write_text(json.dumps(node))


def put_what_is_not_a_scan(store: Path) -> dict[str, str]:
    """Folder -> what repair says of it."""
    (store / "notes").mkdir()
    (store / "notes/mine.txt").write_text("mine")
    zarr.create_group(store / "theirs", zarr_format=3, attributes={"ome": {"version": "0.5"}})
    shutil.copytree(store / "p", store / "torn")
    (store / "torn/zarr.json").write_text('{"zarr_format": 3, "attr')
    shutil.copytree(store / "p", store / "unreadable")
    (store / "unreadable/zarr.json").unlink()
    (store / "unreadable/zarr.json").mkdir()  # reading it is an OSError, for root too
    make_incomplete(store, "complete_only")
    attrs = {"complete": True, **dict.fromkeys(("ome", "sha256", "native", "stored", "foreground"))}
    (store / "complete_only/zarr.json").write_text(json.dumps({"node_type": "group", "attributes": attrs}))
    return {
        "complete_only": "attributes of the scan are damaged",
        "notes": "no zarr.json in it",
        "theirs": "not a scan that distseg wrote",
        "torn": "zarr.json is damaged",
        "unreadable": "zarr.json is not readable",
    }


def test_repair_leaves_what_it_cannot_read_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = ingested(tmp_path)
    path = Path(cohort.path)
    said = put_what_is_not_a_scan(path)
    make_incomplete(path, "half")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "half" not in file.parts}
    report = repair_cohort(cohort.path)
    assert (report.scans, report.dropped) == (2, ["half"])
    assert [name for name, _ in report.left] == list(said)
    assert all(why.startswith(f"left alone: {said[name]}") and "\n" not in why for name, why in report.left)
    make_incomplete(path, "half")
    monkeypatch.chdir(tmp_path)
    assert main(["cohort", f"cohort={path}", "action=repair"]) == 3
    error = capsys.readouterr().err
    assert f"{path}: 2 scans; incomplete scans deleted: half; 5 failed:\n  complete_only: left alone" in error
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert Cohort.open(path) == cohort
    for name in said:
        shutil.rmtree(path / name)
    make_incomplete(path, "half")
    assert main(["cohort", f"cohort={path}", "action=repair"]) == 0
    assert capsys.readouterr().out == f"{path}: 2 scans; incomplete scans deleted: half\n"


def test_remove_takes_a_scan_out(tmp_path: Path) -> None:
    cohort = ingested(tmp_path)
    remove_scan(cohort.path, scan="p")
    assert [record.scan_id for record in Cohort.open(cohort.path).records] == ["q"]
    assert not (Path(cohort.path) / "p").exists()
    assert '"id":"p"' not in (tmp_path / "store/hips.sources.jsonl").read_text()
    with pytest.raises(InputError, match="no such scan"):
        remove_scan(cohort.path, scan="p")


def test_list_is_a_table_and_a_line_of_totals(tmp_path: Path) -> None:
    text = list_cohort(ingested(tmp_path).path)
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    assert lines[1] == "p 20 70 30 3 1.5 2 yes train left hip 1680, right hip 8"
    assert lines[2] == "q 20 70 30 3 1.5 2 no val -"
    assert lines[-1] == "2 scans, 1 labelled; 1 train, 1 val; CT; classes: left hip, right hip, absent"


def test_incomplete_scan_is_not_there(tmp_path: Path) -> None:
    cohort = ingested(tmp_path)
    zarr.create_group(Path(cohort.path) / "half", zarr_format=3)
    with pytest.raises(DataError, match="half: scan is not complete"):
        _ = Scan(f"{cohort.path}/half", "half").geometry


def test_fractional_and_wide_values_are_kept_as_float32(tmp_path: Path) -> None:
    for name, array in (("half", np.full((4, 5, 6), 0.5)), ("wide", np.full((4, 5, 6), 40000, np.int32))):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
        task = ScanTask(
            case=Case(name, NiftiImage(tmp_path / f"{name}.nii.gz")),
            cohort=str(tmp_path / "c"),
            staging=str(tmp_path),
            classes={"background": 0},
            spacing_mm=None,
        )
        (tmp_path / "c").mkdir(exist_ok=True)
        assert convert_scan(task).written
        stored = Scan(str(tmp_path / "c" / name), name)
        assert stored.image.dtype == np.float32
        assert np.array_equal(stored.image[...], stored.native.to_canonical(array.astype(np.float32)))
        assert stored.body_box == ((0, 0, 0), (6, 5, 4))  # nothing stands out: all of it is body


def test_body_of_a_volume_looked_at_in_strides() -> None:
    image = np.full((200, 30, 30), -1000, np.int16)
    image[51:151, 5:25, 5:25] = 0
    body = find_body(image, modality="CT")
    assert body.stride == (3, 1, 1)
    (z0, y0, x0), (z1, y1, x1) = body.box
    assert (y0, x0, y1, x1) == (5, 5, 25, 25)
    assert abs(z0 - 51) <= 3
    assert abs(z1 - 151) <= 3
    drawn = body.draw(3000, np.random.default_rng(0))
    assert np.mean(image[tuple(drawn.T)] == 0) > 0.95
