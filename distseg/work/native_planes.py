"""The three planes of a scan that its pictures show, on its native grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distseg.data.volume import ArrayLike3D, resample_box
from distseg.evaluation.figures import Plane, central_index, plane_of, view_box


def native_planes(
    image: ArrayLike3D,
    *,
    stored_spacing_mm: Sequence[float],
    native_spacing_mm: Sequence[float],
    fill: float,
    first: np.ndarray,
    second: np.ndarray,
) -> list[Plane]:
    """Axial, coronal and sagittal, through the middle of `first`, or of `second` where that is empty.

    Args:
        image: [Z, Y, X] at `stored_spacing_mm`; only the planes themselves are read of it.
        fill: its value outside, in its own units.
        first, second: masks [Z, Y, X] on the native grid, outlined as a Plane's truth and prediction.
    """
    centre_of = first if first.any() else second
    box = view_box((first > 0) | (second > 0), spacing_mm=native_spacing_mm)
    planes = []
    for axis in range(3):
        index = central_index(centre_of, axis)
        part = [slice(index, index + 1) if a == axis else side for a, side in enumerate(box)]
        plane = resample_box(
            image,
            source_spacing_mm=stored_spacing_mm,
            target_spacing_mm=native_spacing_mm,
            start_zyx=[side.start for side in part],
            size_zyx=[side.stop - side.start for side in part],
            order=1,
            fill=fill,
        )
        cut = [volume.squeeze(axis) for volume in (plane, first[tuple(part)], second[tuple(part)])]
        planes.append(
            plane_of(axis, index, image=cut[0], truth=cut[1], prediction=cut[2], spacing_mm=native_spacing_mm)
        )
    return planes
