"""Synthetic hips for the demo and tests: procedural CT of a pelvis on disk, as nnU-Net raw.

    FOLDER/imagesTr/hip_000_0000.nii.gz    int16, Hounsfield-like, another orientation and voxel size in each scan
    FOLDER/labelsTr/hip_000.nii.gz         uint8, of labelled scans alone: 0 background, 1 hip_bone
    FOLDER/dataset.json  splits.json

The class is the two hip bones; femora and sacrum are bone too but background, so intensity alone does not solve it.
Shapes are signed distances in mm (negative inside) on a grid of twice the resolution; averaging its 2 x 2 x 2 voxels
gives partial volume. Coordinates: x to the Left, y to Posterior, z to Superior, the origin midway between the femoral
heads; arrays are [Z, Y, X]. One seed is one anatomy, on every machine with the same numpy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from distseg.data import hip_shapes
from distseg.data.hip_shapes import FAT, Array, Point
from distseg.data.nifti import write_nifti
from distseg.data.volume import NativeGrid
from distseg.errors import InputError

CLASS_NAME = "hip_bone"
CARTILAGE, FEMORAL, TRABECULAR, CORTICAL, METAL = 85, 130, 230, 950, 3000  # Hounsfield units
SUPERSAMPLING = 2
_EXTENT_MM = ((-88.0, 112.0), (-112.0, 108.0), (-160.0, 160.0))  # field of view in Z, Y, X


@dataclass(frozen=True)
class Phantom:
    """`image` int16 and `label` uint8 [Z, Y, X] in LPS+ order, `spacing_mm` Z Y X, `origin_mm` of voxel 0 in x y z."""

    image: npt.NDArray[np.int16]
    label: npt.NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    origin_mm: Point
    has_metal: bool


def make_phantom(seed: int, *, metal: bool | None = None) -> Phantom:
    """One scan. `metal` None: one in four has a metal hip implant with streaks."""
    rng = np.random.default_rng([seed, 0x41F])
    spacing = (float(rng.uniform(3.4, 5.0)), *(float(rng.uniform(3.4, 4.2)),) * 2)
    shape = [round((high - low) / step) for (low, high), step in zip(_EXTENT_MM, spacing, strict=True)]
    fine = [
        low + (np.arange(count * SUPERSAMPLING, dtype=np.float32) + 0.5) * step / SUPERSAMPLING
        for (low, _), step, count in zip(_EXTENT_MM, spacing, shape, strict=True)
    ]
    scale, tilt = float(rng.uniform(0.82, 0.94)), rng.uniform(-0.12, 0.12, 3)
    x, y, z = hip_shapes.posed(fine, scale=scale, tilt=tilt, shift=rng.uniform(-8, 8, 3))
    has_metal = bool(rng.random() < 0.25) if metal is None else metal
    sides = [hip_shapes.draw_side(rng, sign) for sign in (-1, 1)]
    metal_sign = int(rng.choice([-1, 1]))

    fine_image = hip_shapes.soft_tissue(x, y, z, fat_mm=float(rng.uniform(10, 24)))
    hip = np.full(fine_image.shape, np.inf, np.float32)
    femur, implant, gap = hip.copy(), hip.copy(), hip.copy()
    for side in sides:
        columns = np.flatnonzero((side.sign * x > 0).any(axis=(0, 1)))  # the half of the grid that this side reaches
        half = (..., slice(int(columns[0]), int(columns[-1]) + 1))
        at = (side.sign * x[half], y[half], z[half])
        hip[half] = np.minimum(hip[half], hip_shapes.hip_bone(*at, side))
        femur[half] = np.minimum(femur[half], hip_shapes.femur(*at, side))
        gap[half] = np.minimum(gap[half], hip_shapes.ball(*at, side.head, side.head_radius + side.joint_gap))
        if has_metal and side.sign == metal_sign:
            implant[half] = hip_shapes.implant(*at, side)
    sacrum = np.maximum(hip_shapes.sacrum(x, y, z), 3.0 - hip)
    fine_image[gap < 0] = CARTILAGE
    for distance, inside, shell_mm in ((sacrum, TRABECULAR, 2.0), (femur, FEMORAL, 3.2), (hip, TRABECULAR, 2.6)):
        fine_image[distance < 0] = inside
        fine_image[(distance < 0) & (distance > -shell_mm)] = CORTICAL
    fine_image[implant < 0] = METAL
    label = (_averaged((hip < 0) & (implant >= 0)) > 0.5).astype(np.uint8)
    image = _degraded(_averaged(fine_image), _averaged(implant < 0), spacing, rng)
    first_z, first_y, first_x = (low + step / 2 for (low, _), step in zip(_EXTENT_MM, spacing, strict=True))
    return Phantom(
        image=np.clip(np.rint(image), -1024, 3071).astype(np.int16),
        label=label,
        spacing_mm=spacing,
        origin_mm=(first_x, first_y, first_z),
        has_metal=has_metal,
    )


def write_phantoms(folder: str | Path, *, scans: int, labelled: int, seed: int, val: int) -> list[str]:
    """Write `scans` training scans, the first `labelled` of them with labels, and `val` labelled validation scans.

    Returns all case ids in order. Files are rewritten with equal bytes when called again. Raises InputError for counts
    that do not fit.
    """
    if not (1 <= labelled <= scans and val >= 0):
        rule = "1 <= labelled <= scans and 0 <= val"
        raise InputError("counts do not fit", where="phantoms", value=(scans, labelled, val), rule=rule)
    folder = Path(folder)
    cases = [f"hip_{number:03d}" for number in range(scans + val)]
    for number, case in enumerate(cases):
        phantom = make_phantom(1000 * seed + number)
        grid, order = _disk_grid(phantom, np.random.default_rng([seed, number, 0xD15]))
        write_nifti(folder / "imagesTr" / f"{case}_0000.nii.gz", order(phantom.image), grid)
        if number < labelled or number >= scans:
            write_nifti(folder / "labelsTr" / f"{case}.nii.gz", order(phantom.label), grid)
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, CLASS_NAME: 1},
        "numTraining": labelled + val,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1) + "\n")
    splits = {"train": cases[:scans], "val": cases[scans:]}
    (folder / "splits.json").write_text(json.dumps(splits, indent=1) + "\n")
    return cases


class _DiskOrder:
    """From [Z, Y, X] in LPS+ to the axis order and directions that a file stores."""

    def __init__(self, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> None:
        self.axes, self.flips = axes, flips

    def __call__(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        stored = array.transpose(2, 1, 0)[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]
        return np.ascontiguousarray(stored.transpose(self.axes))


def _disk_grid(phantom: Phantom, rng: np.random.Generator) -> tuple[NativeGrid, _DiskOrder]:
    """Axial or coronal storage, any axis reversed; the affine (voxel -> RAS mm) says so."""
    axes: tuple[int, int, int] = (0, 1, 2) if rng.random() < 0.7 else (0, 2, 1)
    flips = tuple(bool(flip) for flip in rng.random(3) < 0.5)
    order = _DiskOrder(axes, (flips[0], flips[1], flips[2]))
    size = np.array(phantom.image.shape[::-1])
    step = np.array(phantom.spacing_mm[::-1])
    affine = np.eye(4)
    direction = np.where(order.flips, -1.0, 1.0)
    start = np.array(phantom.origin_mm) + np.where(order.flips, (size - 1) * step, 0.0)
    affine[:3, :3], affine[:3, 3] = np.diag(direction * step), start
    affine[:, :3] = affine[:, list(axes)]
    affine[:2] *= -1  # LPS -> RAS
    shape = tuple(int(count) for count in size[list(axes)])
    return NativeGrid((shape[0], shape[1], shape[2]), affine), order


# --- imaging ---------------------------------------------------------------------------------------------------------


def _averaged(fine: npt.NDArray[np.generic]) -> Array:
    """Means of 2 x 2 x 2 fine voxels: the partial volume of each voxel."""
    Z, Y, X = (size // SUPERSAMPLING for size in fine.shape)
    split = fine.reshape(Z, SUPERSAMPLING, Y, SUPERSAMPLING, X, SUPERSAMPLING)
    result: Array = split.mean(axis=(1, 3, 5), dtype=np.float32)
    return result


def _degraded(
    image: Array, metal: Array, spacing_mm: tuple[float, float, float], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Fat between the muscles, trabecular texture, the scanner's blur, streaks from metal, correlated noise."""
    inside = image > -500
    lobes = gaussian_filter(rng.standard_normal(image.shape), 2.2)
    lobes /= lobes.std()
    fatty = inside & (image < 120) & (lobes > 1.1)
    blurred = gaussian_filter(np.where(fatty, 0.5 * image + 0.5 * FAT, image).astype(np.float64), 0.45)
    texture = gaussian_filter(rng.standard_normal(image.shape), 0.7)
    blurred += np.where(image > 150, 220.0, 25.0) * inside * texture
    if metal.any():
        blurred += _streaks(metal, spacing_mm, rng)
    noise = gaussian_filter(rng.standard_normal(image.shape), (0.0, 0.5, 0.5))
    degraded: npt.NDArray[np.float64] = blurred + float(rng.uniform(25, 50)) * noise
    return degraded


def _streaks(metal: Array, spacing_mm: tuple[float, float, float], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Bright and dark rays in each axial slice, from the metal's centre there, fading with distance."""
    Z, Y, X = metal.shape
    streaks = np.zeros(metal.shape)
    rays = rng.uniform(-np.pi, np.pi, 14)
    widths, strengths = rng.uniform(0.03, 0.14, 14), rng.uniform(150, 420, 14) * np.where(np.arange(14) % 2, -1, 1)
    for level in range(Z):
        mass = float(metal[level].sum())
        if mass < 0.5:
            continue
        weights = metal[level] / mass
        row, column = (weights.sum(1) * np.arange(Y)).sum(), (weights.sum(0) * np.arange(X)).sum()
        dy = (np.arange(Y)[:, None] - row) * spacing_mm[1]
        dx = (np.arange(X)[None, :] - column) * spacing_mm[2]
        angle, radius = np.arctan2(dy, dx), np.hypot(dy, dx)
        fade = min(1.0, mass / 10) * np.exp(-radius / 75) * (radius > 8)
        for ray, width, strength in zip(rays + rng.normal(0, 0.05, 14), widths, strengths, strict=True):
            off = np.angle(np.exp(1j * (angle - ray)))
            streaks[level] += strength * fade * np.exp(-0.5 * (off / width) ** 2)
    return streaks
