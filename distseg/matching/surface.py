"""Voxels just inside and just outside the object surface of a labelled patch (Xie et al. 2024, section 2.2).

Inside band of class c: its mask minus the mask's 6-neighbour erosion. Outside band (class 0): the 6-neighbour
dilation of the foreground minus the foreground (METHOD section 2b). What lies beyond the patch is unknown, so the
patch's own border makes no surface.

Shapes: K classes, R = draws x k references, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


def surface_bands(
    label: npt.NDArray[np.integer],
    num_classes: int,
    *,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    inside_mm: float | None = None,
    outside_mm: float | None = None,
) -> list[BoolArray]:
    """One mask [Z, Y, X] per class: just outside any foreground for class 0, just inside the object for the others.

    A width in mm counts from voxel centre to voxel centre (`spacing_mm` is Z Y X) and includes at least the
    6-neighbours, which None stands for.
    """
    foreground = label > 0
    bands = [_touches(foreground) & ~foreground | _within(~foreground, outside_mm, spacing_mm)]
    for value in range(1, num_classes):
        mask = label == value
        bands.append(mask & _touches(~mask) | _within(mask, inside_mm, spacing_mm))
    return bands


def _within(mask: BoolArray, width_mm: float | None, spacing_mm: Sequence[float]) -> BoolArray:
    """Voxels of `mask` at most `width_mm` from a voxel outside it; none where either side is empty."""
    if width_mm is None or mask.all() or not mask.any():
        return np.zeros_like(mask)
    distance = ndimage.distance_transform_edt(mask, sampling=spacing_mm)
    near: BoolArray = mask & (distance <= width_mm)
    return near


def _touches(mask: BoolArray) -> BoolArray:
    """Voxels with at least one of their six neighbours in `mask`."""
    out = np.zeros_like(mask)
    for axis in range(mask.ndim):
        low = tuple(slice(None, -1) if a == axis else slice(None) for a in range(mask.ndim))
        high = tuple(slice(1, None) if a == axis else slice(None) for a in range(mask.ndim))
        out[high] |= mask[low]
        out[low] |= mask[high]
    return out


def draw_references(
    bands: list[BoolArray], *, k: int, draws: int, generator: np.random.Generator
) -> tuple[IntArray, BoolArray]:
    """`draws` fresh draws of k voxels from each band: flat voxel indices [K, draws * k] and which classes have any [K].

    A draw is without replacement where the band has k voxels or more, with replacement otherwise. A class whose band
    is empty gets index 0 and False.
    """
    index = np.zeros((len(bands), draws * k), np.int64)
    present = np.zeros(len(bands), np.bool_)
    for row, band in enumerate(bands):
        voxels = np.flatnonzero(band)
        present[row] = voxels.size > 0
        if voxels.size:
            drawn = [generator.choice(voxels, k, replace=voxels.size < k) for _ in range(draws)]
            index[row] = np.concatenate(drawn)
    return index, present


def has_surface(present: BoolArray) -> bool:
    """Matching needs references just outside and just inside at least one object."""
    return bool(present[0] and present[1:].any())
