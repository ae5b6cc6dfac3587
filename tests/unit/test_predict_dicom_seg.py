"""predict format=dicom_seg: what highdicom reads back lies voxel by voxel where the NIfTI mask has it."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from distseg.data.dicom.segmentation import DicomSegmentation
from distseg.data.dicom.write_segmentation import check_class_names
from distseg.data.formats import discover
from distseg.errors import ConfigError, InputError
from distseg.work.executor import LocalExecutor
from distseg.work.predict import PredictReport, predict_files
from tests.unit import dicom_writer as write
from tests.unit.bone_model import OBLIQUE, box

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "dicom_ct_series"
REVERSED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # columns grow to the right, slices to the feet


def predict(bone_run: str, source: Path, output: Path, format: str = "dicom_seg") -> PredictReport:
    return predict_files(
        run=bone_run, input=str(source), output=str(output), network="student", overlap=0.5, executor=LocalExecutor(1),
        components="model", format=format, progress=False,
    )  # fmt: skip


def points(mask: np.ndarray, affine: np.ndarray, *, to_lps: bool) -> np.ndarray:
    """Centres [N, 3] of the voxels of class 1 in LPS mm, rounded to a hundredth and sorted."""
    index = np.argwhere(mask == 1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    return np.unique(np.round(world * ([-1, -1, 1] if to_lps else 1), 2) + 0.0, axis=0)


def assert_same_place(segmentation: Path, nifti: Path) -> int:
    """Read by highdicom and by nibabel; the number of voxels."""
    volume = hd.seg.segread(segmentation).get_volume(combine_segments=True)
    mask = nib.load(nifti)
    ours = points(np.asarray(mask.dataobj), mask.affine, to_lps=True)
    theirs = points(volume.array, volume.affine, to_lps=False)
    assert len(ours) == np.count_nonzero(mask.dataobj)
    np.testing.assert_allclose(theirs, ours, atol=0.02)
    return len(ours)


@pytest.mark.parametrize("orientation", [write.AXIAL, OBLIQUE, REVERSED])
def test_highdicom_reads_it_where_the_mask_is(bone_run: str, tmp_path: Path, orientation: tuple[float, ...]) -> None:
    """Files in another order than the slices; and the same voxels through our own reader, as an ingest would have."""
    source = tmp_path / "one"
    paths = write.series(source, box(0), orientation=orientation, tags={"PatientName": "Doe^Jane", "PatientSex": "F"})
    for number, path in enumerate(paths):
        path.rename(path.with_name(f"{(number * 3) % 7}.dcm"))
    predict(bone_run, source, tmp_path / "m.nii.gz", "nifti")
    assert len(predict(bone_run, source, tmp_path / "m.dcm").written) == 1
    assert assert_same_place(tmp_path / "m.dcm", tmp_path / "m.nii.gz") == np.count_nonzero(box(0) > 1400)
    made, slice_ = dcmread(tmp_path / "m.dcm"), dcmread(source / "0.dcm")
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "PatientSex"):
        assert made[keyword].value == slice_[keyword].value
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == slice_.SeriesInstanceUID
    assert [(s.SegmentNumber, s.SegmentLabel) for s in made.SegmentSequence] == [(1, "bone")]
    (case,) = discover(source, structures=[]).cases
    image = case.image.read()
    label = DicomSegmentation(tmp_path / "m.dcm", ("bone",)).read(image=image, classes={"background": 0, "bone": 1})
    mask = np.asarray(nib.load(tmp_path / "m.nii.gz").dataobj)
    assert np.array_equal(label, image.native.to_canonical(mask))


def test_a_folder_of_series_and_the_same_call_again(bone_run: str, tmp_path: Path) -> None:
    """One empty mask, one enhanced multi-frame file whose frames are out of order; all kept by the second call."""
    root, out = tmp_path / "in", tmp_path / "out"
    write.series(root / "empty", np.full((7, 10, 12), 100, np.uint16), modality="MR")
    order = [3, 0, 6, 1, 5, 2, 4]
    (root / "multi").mkdir()
    write.enhanced(
        root / "multi/m.dcm", box(0)[order], positions=[(-20, -30, 100 + 3 * k) for k in order], scale=[(1, -1024)] * 7
    )
    assert len(predict(bone_run, root, out).written) == 2
    assert not hd.seg.segread(out / "empty.dcm").get_volume(combine_segments=True).array.any()
    predict(bone_run, root, tmp_path / "nifti", "nifti")
    assert assert_same_place(out / "multi.dcm", tmp_path / "nifti/multi.nii.gz") > 0
    again = predict(bone_run, root, out)
    assert (again.written, len(again.skipped)) == ([], 2)


def test_blank_identifiers_are_made_up_alike(bone_run: str, tmp_path: Path) -> None:
    blank = dict.fromkeys(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"), "")
    write.series(tmp_path / "one", box(0), tags={**blank, "FrameOfReferenceUID": None, "PatientSex": "X"})
    predict(bone_run, tmp_path / "one", tmp_path / "a.dcm")
    predict(bone_run, tmp_path / "one", tmp_path / "b.dcm")
    predict(bone_run, tmp_path / "one", tmp_path / "m.nii.gz", "nifti")
    assert assert_same_place(tmp_path / "a.dcm", tmp_path / "m.nii.gz") > 0
    a, b = dcmread(tmp_path / "a.dcm"), dcmread(tmp_path / "b.dcm")
    assert a.StudyInstanceUID == b.StudyInstanceUID != a.FrameOfReferenceUID
    assert a.SOPInstanceUID != b.SOPInstanceUID
    assert (a.PatientID, a.PatientSex) == ("", "")


def test_nothing_of_a_patient_is_said(bone_run: str, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    """highdicom's log would quote a name it finds odd; what it refuses becomes one line without it."""
    write.series(tmp_path / "one", box(0), tags={"PatientName": "Doe Jane"})
    with caplog.at_level(logging.DEBUG):
        predict(bone_run, tmp_path / "one", tmp_path / "m.dcm")
    paths = write.series(tmp_path / "two", box(0))
    odd = dcmread(paths[2])
    odd.StudyInstanceUID = generate_uid()
    odd.save_as(paths[2])
    ((name, why),) = predict(bone_run, tmp_path / "two", tmp_path / "x.dcm").failed
    assert why.startswith("IM0000.dcm: no DICOM-SEG of it (got ValueError); one patient and study")
    assert sorted(path.name for path in tmp_path.glob("*.dcm")) == ["m.dcm"]
    assert "Doe" not in "".join(capfd.readouterr()) + caplog.text + name + why


def test_what_has_no_dicom_seg_is_one_line(bone_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nib.save(nib.Nifti1Image(box(0).T.astype(np.int16), np.eye(4)), tmp_path / "n.nii.gz")
    with pytest.raises(InputError, match=r"format: no DICOM-SEG of NIfTI \(got n\.nii\.gz\); .*; set format=nifti"):
        predict(bone_run, tmp_path / "n.nii.gz", tmp_path / "m.dcm")
    for name, format, suffixes in (("m.nii.gz", "dicom_seg", r"\.dcm"), ("m.dcm", "nifti", r"\.nii\.gz or \.nii")):
        with pytest.raises(
            InputError, match=rf"output: named as a mask of another format .*a name in {suffixes}, with"
        ):
            predict(bone_run, tmp_path / "n.nii.gz", tmp_path / name, format)
    for name in ("x" * 65, "a\\b", "a\nb"):
        with pytest.raises(ConfigError, match="format=dicom_seg: a class whose name cannot be a segment's"):
            check_class_names(["background", name])
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"needs the package highdicom; pip install 'distseg\[io\]', or set format="):
        predict(bone_run, tmp_path, tmp_path / "m.dcm")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real DICOM series lies beside the checkout where it is developed")
def test_a_real_series(bone_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JPEG 2000, anonymised to blank identifiers; a threshold stands for the network."""
    from distseg.work import predict as module

    def threshold(_model: Any, array: np.ndarray, *, networks: list[str], **_: Any) -> dict[str, np.ndarray]:
        return {networks[0]: (array > 300).astype(np.uint8)}

    monkeypatch.setattr(module, "segment_scan", threshold)
    predict(bone_run, SHARED, tmp_path / "m.nii.gz", "nifti")
    predict(bone_run, SHARED, tmp_path / "m.dcm")
    assert assert_same_place(tmp_path / "m.dcm", tmp_path / "m.nii.gz") > 10_000


def test_a_full_disk_is_no_damaged_series(bone_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write.series(tmp_path / "one", box(0))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hd.seg.Segmentation, "save_as", full)
    ((_, why),) = predict(bone_run, tmp_path / "one", tmp_path / "new" / "masks").failed
    assert "no room left for the mask" in why
    assert "No space left on device" in why
