"""Synthetic hips: on disk as nnU-Net raw, another anatomy a seed, and a problem that intensity alone cannot solve."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from distseg.data.formats import discover
from distseg.data.nifti import read_nifti
from distseg.data.phantom import make_phantom, write_phantoms
from distseg.errors import InputError


def test_one_seed_is_one_anatomy() -> None:
    one, again, other = make_phantom(5), make_phantom(5), make_phantom(6)
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.label, again.label)
    assert one.spacing_mm == again.spacing_mm
    assert one.spacing_mm != other.spacing_mm
    assert one.image.shape != other.image.shape or not np.array_equal(one.label, other.label)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_looks_like_two_hips(seed: int) -> None:
    phantom = make_phantom(seed, metal=False)
    image, hip = phantom.image.astype(float), phantom.label == 1
    assert 0.01 < hip.mean() < 0.06
    # Two bones, left and right, and nothing else of size.
    pieces, count = ndimage.label(hip, np.ones((3, 3, 3)))
    sizes = np.sort(np.bincount(pieces.ravel())[1:])[::-1]
    assert count >= 2
    assert sizes[:2].sum() > 0.98 * hip.sum()
    middle = [np.mean(np.where(pieces == 1 + place)[2]) for place in np.argsort(np.bincount(pieces.ravel())[1:])[::-1]]
    assert (middle[0] - hip.shape[2] / 2) * (middle[1] - hip.shape[2] / 2) < 0
    # Sides differ.
    assert not np.array_equal(hip, hip[:, :, ::-1])
    # Tissues in their usual order, air around.
    assert image[hip].mean() > 250
    assert np.median(image[0, :3]) < -900
    bone_like = (image > 250) & ~ndimage.binary_dilation(hip, iterations=2)
    assert bone_like.sum() > 0.3 * hip.sum(), "femora and sacrum are as bright as the hip bones"


def test_no_threshold_solves_it() -> None:
    phantom = make_phantom(3, metal=False)
    hip = phantom.label == 1
    best = 0.0
    for threshold in range(100, 900, 50):
        found = phantom.image > threshold
        best = max(best, 2 * (found & hip).sum() / (found.sum() + hip.sum()))
    assert 0.3 < best < 0.75


def test_partial_volume_at_the_border() -> None:
    """Voxels at the outline of the cortex are between bone and soft tissue, not one or the other."""
    phantom = make_phantom(4, metal=False)
    hip = phantom.label == 1
    border = hip & ~ndimage.binary_erosion(hip)
    values = phantom.image[border]
    assert np.percentile(values, 90) - np.percentile(values, 10) > 200


def test_metal_is_bright_and_streaks() -> None:
    plain, metal = make_phantom(2, metal=False), make_phantom(2, metal=True)
    assert not plain.has_metal
    assert metal.has_metal
    assert plain.image.max() < 2000 < metal.image.max()
    assert plain.image.shape == metal.image.shape
    soft = (plain.image > -50) & (plain.image < 150) & (metal.image < 2000)
    assert metal.image[soft].astype(float).std() > 1.3 * plain.image[soft].astype(float).std()


def test_on_disk_as_nnunet_raw(tmp_path: Path) -> None:
    cases = write_phantoms(tmp_path, scans=3, labelled=2, seed=7, val=1)
    assert cases == ["hip_000", "hip_001", "hip_002", "hip_003"]
    images = sorted(path.name for path in (tmp_path / "imagesTr").iterdir())
    assert images == [f"{case}_0000.nii.gz" for case in cases]
    labels = sorted(path.name for path in (tmp_path / "labelsTr").iterdir())
    assert labels == ["hip_000.nii.gz", "hip_001.nii.gz", "hip_003.nii.gz"]
    assert json.loads((tmp_path / "splits.json").read_text()) == {"train": cases[:3], "val": cases[3:]}
    source = discover(str(tmp_path))
    assert source.classes == {"background": 0, "hip_bone": 1}
    assert [(case.scan_id, case.label is not None, case.split) for case in source.cases] == [
        ("hip_000", True, "train"),
        ("hip_001", True, "train"),
        ("hip_002", False, "train"),
        ("hip_003", True, "val"),
    ]
    orientations = {nib.aff2axcodes(nib.load(tmp_path / "imagesTr" / name).affine) for name in images}
    assert len(orientations) > 1


def test_the_file_holds_the_phantom_whatever_its_orientation(tmp_path: Path) -> None:
    write_phantoms(tmp_path, scans=4, labelled=1, seed=0, val=0)
    for number in range(4):
        phantom, volume = make_phantom(number), read_nifti(tmp_path / "imagesTr" / f"hip_{number:03d}_0000.nii.gz")
        assert np.array_equal(volume.array, phantom.image)
        assert volume.modality == "CT"
        assert volume.geometry.spacing_mm == pytest.approx(phantom.spacing_mm)
        first = volume.geometry.affine @ [0, 0, 0, 1]
        assert first[:3] == pytest.approx(phantom.origin_mm, abs=1e-4)


def test_written_again_it_is_the_same_to_the_byte(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_phantoms(tmp_path / folder, scans=1, labelled=1, seed=1, val=0)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


@pytest.mark.parametrize(("scans", "labelled", "val"), [(0, 0, 0), (2, 3, 0), (2, 0, 1), (2, 1, -1)])
def test_counts_that_do_not_fit(tmp_path: Path, scans: int, labelled: int, val: int) -> None:
    with pytest.raises(InputError, match="counts do not fit"):
        write_phantoms(tmp_path, scans=scans, labelled=labelled, seed=0, val=val)
