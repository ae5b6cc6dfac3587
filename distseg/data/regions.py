"""Where the classes of a label volume are: counts, boxes and single voxels, plane by plane, so that no list of all
voxels of a class is ever made (an argwhere of one organ at full resolution is gigabytes)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LabelArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


def count_by_plane(label: LabelArray) -> IntArray:
    """[Z, 256] voxels of each value in each axial plane of `label` [Z, Y, X]."""
    return np.stack([np.bincount(plane.ravel(), minlength=256) for plane in label]).astype(np.int64)


def box_and_voxels(
    label: LabelArray, value: int, per_plane: IntArray, ranks: IntArray
) -> tuple[list[list[int]], npt.NDArray[np.int32]]:
    """The box ([start, stop] z, y, x) of `value`, and its voxels int32 [n, 3] of the given `ranks`.

    A voxel's rank is its place among the voxels of this value in C order; `ranks` ascend. `per_plane` [Z] counts the
    value, which must occur.
    """
    before = np.concatenate([[0], np.cumsum(per_plane)])  # [Z + 1]
    planes = np.flatnonzero(per_plane)
    height, width = label.shape[1:]
    rows, columns = np.zeros(height, np.bool_), np.zeros(width, np.bool_)
    found = []
    for z in planes:
        mask = label[z] == value
        rows |= mask.any(axis=1)
        columns |= mask.any(axis=0)
        wanted = ranks[np.searchsorted(ranks, before[z]) : np.searchsorted(ranks, before[z + 1])] - before[z]
        if len(wanted):
            y, x = np.divmod(np.flatnonzero(mask)[wanted], width)
            found.append(np.stack([np.full_like(y, z), y, x], axis=1))
    spans = [planes, np.flatnonzero(rows), np.flatnonzero(columns)]
    box = [[int(span[0]) for span in spans], [int(span[-1]) + 1 for span in spans]]
    return box, np.concatenate(found).astype(np.int32)
