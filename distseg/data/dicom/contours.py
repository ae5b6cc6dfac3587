"""RTSTRUCT as a label: closed planar contours filled on the image's slices.

A voxel belongs to a contour if its centre lies inside or on it. Contours of one structure on one slice combine by
exclusive or, so that a contour inside another is a hole. Contours lie on slices: between them nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from distseg.data.dicom.file import parsing, read_elements
from distseg.data.dicom.grid import LPS_TO_RAS
from distseg.data.dicom.planes import MAX_MM
from distseg.data.dicom.segmentation import check_structures
from distseg.data.digest import combined_sha256, file_sha256
from distseg.data.volume import Volume
from distseg.errors import DataError

KEYWORDS = ("StructureSetROISequence", "ROIContourSequence")
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
PLANE_TOLERANCE = 0.1  # share of the gap between slices by which a contour's point may be off its slice
EDGES_AT_ONCE = 8192  # bounds the memory that a contour of very many points takes
ON_EDGE_VOXELS = 1e-3  # a centre so near to a contour lies on it: positions have about six digits


@dataclass(frozen=True)
class DicomContours:
    """ROIs named by `structures` become the classes; where they overlap the one named last counts."""

    path: Path
    structures: tuple[str, ...]

    def sha256(self) -> str:
        return combined_sha256([file_sha256(self.path), *self.structures])

    def read(self, *, image: Volume, classes: Mapping[str, int]) -> npt.NDArray[np.uint8]:
        """Raises DataError for a structure that is no ROI, and for contours that are not on the image's slices."""
        dataset = read_elements(self.path, KEYWORDS)
        with parsing(self.path):
            number_of = _roi_numbers(dataset)
            check_structures(self.path, self.structures, list(number_of), what="ROI")
            contours_of = _contours(self.path, dataset, {number_of[name]: name for name in self.structures})
        label = np.zeros(image.native.shape, np.uint8)  # [column i, row j, slice k]
        to_index = np.linalg.inv(image.native.affine) @ LPS_TO_RAS
        for name in self.structures:
            for k, inside in _filled(self.path, contours_of.get(name, []), to_index, label.shape):
                np.maximum(label[:, :, k], np.where(inside, np.uint8(classes[name]), np.uint8(0)), out=label[:, :, k])
        return image.native.to_canonical(label)


def roi_names(path: Path) -> list[str]:
    """Names of the ROIs of an RTSTRUCT."""
    dataset = read_elements(path, ["StructureSetROISequence"])
    with parsing(path):
        return list(_roi_numbers(dataset))


def _roi_numbers(dataset: Dataset) -> dict[str, int]:
    rois = dataset.get("StructureSetROISequence") or []
    return {str(item.ROIName).strip(): int(item.ROINumber) for item in rois}


def _contours(path: Path, dataset: Dataset, wanted: Mapping[int, str]) -> dict[str, list[npt.NDArray[np.float64]]]:
    """Structure -> its closed contours, [points, 3] LPS mm. A ROI may have none: it is drawn nowhere."""
    found: dict[str, list[npt.NDArray[np.float64]]] = {}
    for item in dataset.get("ROIContourSequence") or []:
        name = wanted.get(int(item.ReferencedROINumber))
        if name is None:
            continue
        for contour in item.get("ContourSequence") or []:
            kind = str(contour.get("ContourGeometricType"))
            points = np.array([float(value) for value in contour.get("ContourData") or []])
            if kind not in CLOSED or points.size % 3 or not np.all(np.abs(points) <= MAX_MM):
                rule = f"closed contours of x, y, z ({', '.join(CLOSED)})"
                raise DataError("contour not understood", where=path.name, value=f"{name}: {kind}", rule=rule)
            if points.size:
                found.setdefault(name, []).append(points.reshape(-1, 3))
    return found


def _filled(
    path: Path,
    contours: list[npt.NDArray[np.float64]],
    to_index: npt.NDArray[Any],
    shape: tuple[int, ...],
) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Per slice of a structure: its number k, and what is inside, [i, j]."""
    slices: dict[int, list[npt.NDArray[np.float64]]] = {}
    for points in contours:
        index = points @ to_index[:3, :3].T + to_index[:3, 3]  # [points, 3] i, j, k
        k = int(np.clip(np.rint(index[:, 2].mean()), -1, shape[2]))
        off = float(np.abs(index[:, 2] - k).max())
        if off > PLANE_TOLERANCE or not 0 <= k < shape[2]:
            rule = f"every point on one of the image's slices, within {PLANE_TOLERANCE} of the gap"
            value = f"{off:.3g} gaps off slice {k + 1} of {shape[2]}"
            raise DataError("contour is not on a slice of the image", where=path.name, value=value, rule=rule)
        slices.setdefault(k, []).append(index[:, :2])
    for k, polygons in sorted(slices.items()):
        inside = np.zeros(shape[:2], bool)
        for polygon in polygons:
            _toggle_polygon(inside, polygon)
        yield k, inside


def _toggle_polygon(inside: npt.NDArray[np.bool_], polygon: npt.NDArray[np.float64]) -> None:
    """Exclusive or of `inside` [i, j] with the voxels whose centre is in `polygon` [points, 2] or on it.

    A centre is on an edge if one of the four points next to it is inside: by that, what a half-open rule would leave
    out on one side of a polygon is in on both.
    """
    size = np.array(inside.shape)
    low = np.clip(np.floor(polygon.min(axis=0)), 0, size).astype(int)
    high = np.clip(np.ceil(polygon.max(axis=0)) + 1, 0, size).astype(int)
    if (high <= low).any():
        return
    shape = (int(high[0] - low[0]), int(high[1] - low[1]))
    local = polygon - low
    shifts = [(a * ON_EDGE_VOXELS, b * ON_EDGE_VOXELS) for a in (-1, 1) for b in (-1, 1)]
    found = np.logical_or.reduce([fill_even_odd(local + shift, shape) for shift in shifts])
    inside[low[0] : high[0], low[1] : high[1]] ^= found


def fill_even_odd(polygon: npt.NDArray[np.float64], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """[I, J]: the grid points (i, j) that a ray towards growing i leaves `polygon` [points, 2] (i, j) from an odd
    number of times. Time grows with the edges' height in grid lines and with the grid, not with their product."""
    toggles = np.zeros((shape[0] + 1) * shape[1], np.int64)
    ends = np.roll(polygon, -1, axis=0)
    for first in range(0, len(polygon), EDGES_AT_ONCE):
        part = slice(first, first + EDGES_AT_ONCE)
        toggles += _crossings(polygon[part], ends[part], shape)
    counts = toggles.reshape(shape[0] + 1, shape[1])
    beyond = counts.sum(axis=0) - np.cumsum(counts, axis=0)[: shape[0]]
    return np.asarray(beyond % 2 == 1)


def _crossings(
    start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], shape: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """How many edges cross grid line j between the points i - 1 and i, [(I + 1) * J]."""
    falls = (end[:, 1] < start[:, 1])[:, None]
    lower, upper = np.where(falls, end, start), np.where(falls, start, end)
    # Grid lines that an edge crosses: lower <= j < upper, so that a corner counts once.
    low = np.clip(np.ceil(lower[:, 1]), 0, shape[1]).astype(np.int64)
    high = np.clip(np.ceil(upper[:, 1]), 0, shape[1]).astype(np.int64)
    lines = high - low
    edge = np.repeat(np.arange(len(start)), lines)
    j = np.arange(len(edge)) - np.repeat(np.cumsum(lines) - lines, lines) + low[edge]
    share = (j - lower[edge, 1]) / (upper[edge, 1] - lower[edge, 1])
    i = lower[edge, 0] + share * (upper[edge, 0] - lower[edge, 0])
    after = np.clip(np.ceil(i), 0, shape[0]).astype(np.int64)
    return np.bincount(after * shape[1] + j, minlength=(shape[0] + 1) * shape[1])
