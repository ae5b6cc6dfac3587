"""What sources are understood, and the one line that each bad file gets."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distseg.data import nifti
from distseg.data.formats import discover, safe_id
from distseg.data.nifti import read_label, read_nifti, write_nifti
from distseg.data.volume import NativeGrid
from distseg.errors import DataError, InputError

CLASSES = {"background": 0, "bone": 1}


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def ct(shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def nnunet(root: Path, cases: dict[str, bool], **changes: object) -> Path:
    """Cases -> labelled?; `changes` replaces keys of dataset.json."""
    for case, labelled in cases.items():
        save(root / f"imagesTr/{case}_0000.nii.gz", ct())
        if labelled:
            save(root / f"labelsTr/{case}.nii.gz", np.zeros((4, 5, 6), np.uint8))
    root.mkdir(parents=True, exist_ok=True)
    dataset = {"channel_names": {"0": "CT"}, "labels": CLASSES, "file_ending": ".nii.gz", **changes}
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root


def test_plain_folder_is_unlabelled_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    save(tmp_path / "b.nii", ct())
    save(tmp_path / "a.nii.gz", ct())
    (tmp_path / "._a.nii.gz").write_bytes(b"resource fork")
    (tmp_path / "notes.txt").write_text("x")
    found = discover(tmp_path)
    assert (found.kind, found.classes, found.channel_names) == ("folder", {"background": 0}, None)
    assert [(case.scan_id, case.label, case.split) for case in found.cases] == [("a", None, None), ("b", None, None)]
    assert found.failures == []


def test_nnunet_raw_with_splits(tmp_path: Path) -> None:
    nnunet(tmp_path, {"p_1": True, "p_2": False, "p_3": True})
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["p_1", "p_2"], "val": ["p_3"], "test": []}))
    found = discover(tmp_path)
    assert (found.kind, found.classes, found.channel_names) == ("nnunet", CLASSES, {"0": "CT"})
    rows = [(case.scan_id, case.label is not None, case.split) for case in found.cases]
    assert rows == [("p_1", True, "train"), ("p_2", False, "train"), ("p_3", True, "val")]


def test_splits_and_cases_name_each_other(tmp_path: Path) -> None:
    """A case that splits.json does not name could be a held-out one with a typo: not trained on, listed."""
    nnunet(tmp_path, {"p_1": True, "p_2": True, "p_3": False, "twice": True})
    save(tmp_path / "imagesTr/twice_0000.nii", ct())
    missing = [f"gone_{n}" for n in range(6)]
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["p_1", *missing], "test": ["p2", "p_3", "twice"]}))
    found = discover(tmp_path)
    assert [(case.scan_id, case.split) for case in found.cases] == [("p_1", "train"), ("p_3", "test")]
    assert [name for name, _ in found.failures] == ["twice", "p_2", "splits.json"]
    assert found.notes == ()
    failures = dict(found.failures)
    assert failures["p_2"].startswith("p_2_0000.nii.gz: case is not in splits.json; ")
    assert "names without an image (got gone_0, gone_1, gone_2, gone_3, gone_4 and 2 more)" in failures["splits.json"]
    assert all("\n" not in why for why in failures.values())


def test_cases_beside_right_splits_train_and_it_is_said(tmp_path: Path) -> None:
    nnunet(tmp_path, {"p_1": True, "p_2": True, "p_3": False})
    (tmp_path / "splits.json").write_text('{"val": ["p_2"]}')
    found = discover(tmp_path)
    assert [(case.scan_id, case.split) for case in found.cases] == [("p_1", None), ("p_2", "val"), ("p_3", None)]
    assert found.failures == []
    assert found.notes == ("2 cases are in no split of splits.json: they train",)


def test_names_in_splits_alone_are_no_source(tmp_path: Path) -> None:
    nnunet(tmp_path, {})
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "splits.json").write_text('{"train": ["p"]}')
    with pytest.raises(InputError, match="no image found"):
        discover(tmp_path)


def test_images_folder_may_be_a_link_written_as_text(tmp_path: Path) -> None:
    nnunet(tmp_path / "one", {"p": True})
    nnunet(tmp_path / "two", {})
    (tmp_path / "two/imagesTr").write_text("../one/imagesTr")
    assert [case.scan_id for case in discover(tmp_path / "two").cases] == ["p"]
    (tmp_path / "two/imagesTr").write_text("../nowhere")
    with pytest.raises(DataError, match="imagesTr: no such folder"):
        discover(tmp_path / "two")


def test_failures_of_cases_are_one_line_each_and_the_rest_goes_on(tmp_path: Path) -> None:
    nnunet(tmp_path, {"good": True, "twice": True, "two_labels": True, "rgb": True})
    save(tmp_path / "imagesTr/twice_0000.nii", ct())
    save(tmp_path / "labelsTr/two_labels.nii", np.zeros((4, 5, 6), np.uint8))
    save(tmp_path / "imagesTr/rgb_0001.nii.gz", ct())
    save(tmp_path / "imagesTr/nochannel.nii.gz", ct())
    save(tmp_path / "labelsTr/alone.nii.gz", np.zeros((4, 5, 6), np.uint8))
    found = discover(tmp_path)
    assert [case.scan_id for case in found.cases] == ["good"]
    failures = dict(found.failures)
    assert "duplicate case name" in failures["twice"]
    assert "two_labels.nii and two_labels.nii.gz: duplicate case name" in failures["two_labels"]
    assert "more than one channel" in failures["rgb"]
    assert "no channel in the name" in failures["nochannel"]
    assert "alone.nii.gz: label without an image" in failures["alone"]
    assert len(found.failures) == 5
    assert all("\n" not in why for why in failures.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": {"0": "T1", "1": "T2"}}, "more than one channel"),
        ({"channel_names": {}}, "no channel name"),
        ({"labels": {"background": 0, "bone": 2}}, "classes not understood"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "classes not understood"),
        ({"labels": {"background": 0, "bone": 1, "ignore": 2}}, "classes not understood"),
        ({"labels": None}, "no classes"),
    ],
)
def test_dataset_json_that_is_not_understood(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    nnunet(tmp_path, {"p": True}, **changes)
    with pytest.raises(DataError, match=message) as caught:
        discover(tmp_path)
    assert "dataset.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset.json", "{", "not readable as JSON"),
        ("dataset.json", "[]", "not a JSON object"),
        ("splits.json", '{"training": []}', "splits not understood"),
        ("splits.json", '{"train": ["p"], "test": ["p"]}', "case in two splits"),
    ],
)
def test_json_beside_the_images(tmp_path: Path, name: str, content: str, message: str) -> None:
    nnunet(tmp_path, {"p": True})
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        discover(tmp_path)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="source: no such folder"):
        discover(tmp_path / "missing")
    with pytest.raises(InputError, match="no image found"):
        discover(tmp_path)
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(DataError, match=r"imagesTr without dataset\.json"):
        discover(tmp_path)


def test_scan_ids_are_safe_path_components_and_never_collide() -> None:
    assert safe_id("Case-1_b.2") == "Case-1_b.2"
    names = ["a b", "a/b", "a_b", "..", ".hidden", "zarr.json", "ö", "é", "x" * 300]
    ids = [safe_id(name) for name in names]
    assert len(set(ids)) == len(names)
    for made in ids:
        assert safe_id(made) == made  # which is the rule for a safe one
        assert made not in (".", "..", "zarr.json")
        assert not made.startswith(".")
        assert len(made) <= 100


def test_write_and_read_give_grid_and_voxels_back(tmp_path: Path) -> None:
    affine = np.array([[0, -2.5, 0, 7], [-1.25, 0, 0, -3], [0, 0, -4, 11], [0, 0, 0, 1]], float)
    array = ct()
    for name in ("x.nii", "x.nii.gz"):
        write_nifti(tmp_path / name, array, NativeGrid((4, 5, 6), affine))
        image = nib.load(tmp_path / name)
        assert np.array_equal(image.affine, affine)
        assert np.allclose(image.get_qform(), affine, atol=1e-5)
        assert np.array_equal(np.asanyarray(image.dataobj), array)
        volume = read_nifti(tmp_path / name)
        assert np.array_equal(volume.native.from_canonical(volume.array), array)
        assert volume.geometry.spacing_mm == (4.0, 1.25, 2.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.nii", "x.nii.gz"]  # no temporary left


def test_sheared_affine_is_written_without_a_qform_that_could_not_hold_it(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.3
    write_nifti(tmp_path / "x.nii", ct(), NativeGrid((4, 5, 6), affine))
    image = nib.load(tmp_path / "x.nii")
    assert np.allclose(image.affine, affine)
    assert int(image.header["qform_code"]) == 0


def test_modality_rule(tmp_path: Path) -> None:
    assert read_nifti(save(tmp_path / "ct.nii", ct())).modality == "CT"
    assert read_nifti(save(tmp_path / "mr.nii", np.abs(ct()))).modality == "unknown"
    assert read_nifti(save(tmp_path / "real.nii", ct() + np.float32(0.5))).modality == "unknown"
    assert read_nifti(save(tmp_path / "t1.nii", ct()), modality="T1").modality == "T1"


def test_trailing_axis_of_length_one_is_taken(tmp_path: Path) -> None:
    assert read_nifti(save(tmp_path / "x.nii", ct((4, 5, 6, 1)))).array.shape == (6, 5, 4)


def with_header(path: Path, **fields: object) -> Path:
    """Overwrite header fields of an uncompressed file in place."""
    header = nib.load(path).header.copy()
    for name, value in fields.items():
        header[name] = value
    content = path.read_bytes()
    path.write_bytes(header.binaryblock + content[348:])
    return path


def nan_image(path: Path) -> Path:
    array = ct().astype(np.float32)
    array[1, 2, 3] = np.nan
    return save(path, array)


def truncated(path: Path) -> Path:
    save(path, ct((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def written(content: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


BAD_IMAGES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "missing": ("x.nii.gz", lambda path: path, r"x\.nii\.gz: not readable \(got No such file or directory\)"),
    "empty": ("x.nii.gz", written(b""), r"x\.nii\.gz: empty file \(got 0 bytes\)"),
    "not nifti": ("x.nii", written(b"hello" * 200), "not readable as NIfTI"),
    "not gzip": ("x.nii.gz", written(b"hello" * 200), "not readable as NIfTI"),
    "gzip of nothing": ("x.nii.gz", written(gzip.compress(b"")), "not readable as NIfTI"),
    "truncated gzip": ("x.nii.gz", truncated, "truncated or damaged"),
    "truncated plain": ("x.nii", truncated, "header claims more than the file holds"),
    "4-D": ("x.nii", lambda path: save(path, ct((4, 5, 6, 2))), "4-D image"),
    "2-D": ("x.nii", lambda path: save(path, ct((4, 5))), "2-D image"),
    "NaN": ("x.nii.gz", nan_image, r"NaN or infinite voxels \(got 1\)"),
    "absurd": (
        "x.nii",
        lambda path: with_header(save(path, ct()), dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        "damaged header",
    ),
    "bomb": (
        "x.nii",
        lambda path: with_header(save(path, ct()), dim=[3, 2000, 2000, 2000, 1, 1, 1, 1]),
        "header claims more than the file holds",
    ),
    "complex": ("x.nii", lambda path: save(path, ct().astype(np.complex64)), "not numbers of one channel"),
    "flat affine": (
        "x.nii",
        lambda path: with_header(save(path, ct()), srow_z=[0, 0, 0, 0], sform_code=1, qform_code=0),
        "unusable affine",
    ),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_is_one_line_that_names_file_and_rule(tmp_path: Path, kind: str) -> None:
    name, make, message = BAD_IMAGES[kind]
    make(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        read_nifti(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(name)
    assert str(tmp_path) not in str(caught.value)  # folder names are names of patients


def test_label_checks(tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    image = read_nifti(save(tmp_path / "image.nii", ct(), affine))
    good = np.zeros((4, 5, 6), np.float32)
    good[1, 2, 3] = 1

    def label(array: np.ndarray, at: np.ndarray = affine) -> np.ndarray:
        return read_label(save(tmp_path / "l.nii.gz", array, at), image=image, classes=CLASSES)

    got = label(good)
    assert got.dtype == np.uint8
    assert got.shape == image.array.shape
    assert np.array_equal(image.native.from_canonical(got), good)
    shifted = affine.copy()
    shifted[0, 3] = 0.19  # the tolerance is a tenth of 2 mm
    label(good, shifted)
    shifted[0, 3] = 0.21
    with pytest.raises(DataError, match=r"l\.nii\.gz: label and image differ in affine \(got a corner 0\.21 mm off\)"):
        label(good, shifted)
    with pytest.raises(DataError, match=r"differ in shape \(got \(4, 5, 7\)\); image: \(4, 5, 6\)"):
        label(np.zeros((4, 5, 7), np.uint8))
    with pytest.raises(DataError, match=r"unknown classes \(got \[7\]\)"):
        label(good * 7)
    with pytest.raises(DataError, match=r"not whole numbers \(got 0\.5\)"):
        label(good * 0.5)
    with pytest.raises(DataError, match=r"unknown classes \(got \[-1\]\)"):
        label(-good)


@pytest.mark.parametrize("fails", ["read_narrow", "_header"])
def test_storage_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """Told by the file's name alone: the folder's may be a patient's."""
    path = save(tmp_path / "JANE_DOE" / "x.nii.gz", ct())

    def away(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(nifti, fails, away)
    with pytest.raises(OSError, match=r"Input/output error: 'x\.nii\.gz'") as caught:
        read_nifti(path)
    assert "JANE" not in str(caught.value)
    monkeypatch.setattr(nifti, fails, lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_nifti(path)
