"""predict on DICOM: a NIfTI mask in the series' own grid, where another reader finds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its own documentation
from pydicom.uid import generate_uid

from distseg.errors import DataError, InputError
from distseg.work.executor import LocalExecutor
from distseg.work.predict import PredictReport, predict_files
from tests.unit import dicom_writer as write
from tests.unit.bone_model import OBLIQUE, box


def predict(bone_run: str, source: Path, output: Path) -> PredictReport:
    return predict_files(
        run=bone_run,
        input=str(source),
        output=str(output),
        network="student",
        overlap=0.5,
        components="model",
        executor=LocalExecutor(1),
        progress=False,
    )


def test_masks_lie_on_the_series(bone_run: str, tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    write.series(root / "one", box(0), orientation=OBLIQUE)
    write.series(root / "two", box(1), prefix="a")
    write.series(root / "two", box(2), prefix="b", uid=generate_uid())
    write.series(root / "bad", box(0))[3].unlink()
    report = predict(bone_run, root, out)
    names = sorted(path.name for path in out.glob("*.nii.gz"))
    assert [name.split("-")[0] for name in names] == ["one.nii.gz", "two_a0000.dcm", "two_b0000.dcm"]
    assert [name for name, _ in report.failed] == ["bad"]
    assert "slices are missing" in report.failed[0][1]
    mask, reader = sitk.ReadImage(str(out / "one.nii.gz")), sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(root / "one")))
    image = reader.Execute()
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(mask, name)() == pytest.approx(getattr(image, name)(), abs=1e-4)
    assert np.array_equal(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(image) > 400)
    assert len(predict(bone_run, root, out).skipped) == 3


def test_one_series_or_one_file_into_one_mask(bone_run: str, tmp_path: Path) -> None:
    write.series(tmp_path / "one", box(0))
    assert len(predict(bone_run, tmp_path / "one", tmp_path / "mask.nii.gz").written) == 1
    positions = [(-20, -30, 100 + 3 * k) for k in range(7)]
    path = write.enhanced(tmp_path / "multi", box(0), positions=positions, scale=[(1, -1024)] * 7)
    predict(bone_run, path, tmp_path / "multi.nii.gz")
    masks = [sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))) for name in ("mask.nii.gz", "multi.nii.gz")]
    assert np.array_equal(masks[0], box(0) > 1400)
    assert np.array_equal(*masks)
    with pytest.raises(DataError, match=r"IM0002\.dcm: one slice"):
        predict(bone_run, tmp_path / "one/IM0002.dcm", tmp_path / "x.nii.gz")


def test_inputs_that_are_refused(bone_run: str, tmp_path: Path) -> None:
    write.series(tmp_path / "in/one", box(0))
    write.series(tmp_path / "in/two", box(0))
    with pytest.raises(InputError, match="output: series cannot go into one file"):
        predict(bone_run, tmp_path / "in", tmp_path / "x.nii.gz")
    (tmp_path / "in/x.nii.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="input: NIfTI and DICOM in one folder"):
        predict(bone_run, tmp_path / "in", tmp_path / "out")
    write.rtstruct(tmp_path / "labels/rt.dcm", {"hip": []}, refers_to=None)
    with pytest.raises(InputError, match="no CT or MR series in the folder"):
        predict(bone_run, tmp_path / "labels", tmp_path / "out")


def test_masks_among_the_images_are_refused(bone_run: str, tmp_path: Path) -> None:
    """There the next call, of any verb, would take them for images, or for labels."""
    write.series(tmp_path / "in/one", box(0))
    for output in (tmp_path / "in", tmp_path / "in/masks"):
        with pytest.raises(InputError, match=r"output: among the images \(got \S+\).*choose one beside them"):
            predict(bone_run, tmp_path / "in", output)
    (tmp_path / "nifti").mkdir()
    (tmp_path / "nifti/a_0000.nii.gz").touch()
    with pytest.raises(InputError, match=r"output: among the images"):
        predict(bone_run, tmp_path / "nifti", tmp_path / "nifti")
    assert not (tmp_path / "in/masks").exists()
