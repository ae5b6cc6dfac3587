"""CT-like volumes for benchmarks: an ellipsoid body with organs and bone, scanner noise, and air around it.

Noise decides what a codec can do. Sizes and noise here are set so that zstd-3 with bitshuffle leaves 36 to 38 % of the
raw bytes, as it does of a real CT series at 0.98 x 0.98 x 3 mm (tests/bench/RESULTS.md).
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

SPACING_MM = (1.0, 0.8, 0.8)  # Z Y X
LPS_FROM_VOXELS = np.diag([-0.8, -0.8, 1.0, 1.0])  # RAS+ affine of arrays stored as x, y, z: already canonical


def ct_plane(z: float, shape_yx: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One axial plane at relative height `z` in [0, 1]: HU int16 [Y, X] and label uint8 (1 organ, 2 bone)."""
    height, width = shape_yx
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    wobble = 0.05 * np.sin(9 * z)
    body = (x / 0.85) ** 2 + (y / 0.6) ** 2 < 1
    lung = (np.abs(x) - 0.4) ** 2 / 0.06 + (y - wobble) ** 2 / 0.12 < np.sin(np.pi * z)
    organ = (x - 0.25 * np.cos(5 * z)) ** 2 / 0.05 + (y + wobble) ** 2 / 0.04 < 1
    bone = (x**2 / 0.008 + (y - 0.4) ** 2 / 0.01 < 1) | ((np.abs((x / 0.78) ** 2 + (y / 0.53) ** 2 - 1) < 0.03) & body)
    plane = np.where(body, 40.0, -1000.0)
    plane[lung & body], plane[organ & body], plane[bone] = -850.0, 90.0, 600.0
    noise = ndimage.gaussian_filter(rng.standard_normal((height, width), np.float32), 0.6)
    plane += noise * np.where(body, 55.0, 14.0)
    plane = np.where(x**2 + y**2 < 1, np.maximum(plane, -1024), -1024)  # outside the scanner's circle nothing was seen
    label = np.where(bone, 2, np.where(organ & body & ~lung, 1, 0))
    return np.rint(plane).astype(np.int16), label.astype(np.uint8)


def ct_volume(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU int16 and label uint8, both [Z, Y, X]; the result is held once."""
    rng = np.random.default_rng(seed)
    image, label = np.empty(shape, np.int16), np.empty(shape, np.uint8)
    for z in range(shape[0]):
        image[z], label[z] = ct_plane((z + 0.5) / shape[0], shape[1:], rng)
    return image, label


def write_nnunet_source(root: Path, *, scans: int, shape: tuple[int, int, int], labelled: int) -> Path:
    """An nnU-Net raw folder of int16 .nii.gz; the first `labelled` scans have a label."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(scans):
        image, label = ct_volume(shape, number)
        # Arrays are stored as x, y, z with x fastest; the transpose of a C-ordered [Z, Y, X] is just that.
        _save(image, root / f"imagesTr/scan{number:03d}_0000.nii.gz")
        if number < labelled:
            _save(label, root / f"labelsTr/scan{number:03d}.nii.gz")
    (root / "dataset.json").write_text(
        '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "bone": 2}}'
    )
    return root


def _save(array: np.ndarray, path: Path) -> None:
    nib.openers.Opener.default_compresslevel = 1  # the file's speed to read hardly depends on it, that to write does
    nib.save(nib.Nifti1Image(array.T, LPS_FROM_VOXELS), path)
