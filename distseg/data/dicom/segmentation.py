"""DICOM-SEG as a label: segments by their name, frames onto the image's voxels, never interpolated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from distseg.data.dicom.file import decoded_frames, parsing, read_elements
from distseg.data.dicom.grid import LPS_TO_RAS
from distseg.data.dicom.planes import Plane, read_planes
from distseg.data.digest import combined_sha256, file_sha256, file_size
from distseg.data.limits import MAX_DEFLATE_RATIO, check_size
from distseg.data.nifti import LABEL_GRID_TOLERANCE
from distseg.data.volume import NativeGrid, Volume
from distseg.errors import DataError

KEYWORDS = ("SegmentationType", "SegmentSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
MAX_FRAMES = 2**20  # of one file; a frame that says little takes hardly a byte


@dataclass(frozen=True)
class DicomSegmentation:
    """Segments named by `structures` become the classes; where they overlap the one named last counts."""

    path: Path
    structures: tuple[str, ...]

    def sha256(self) -> str:
        return combined_sha256([file_sha256(self.path), *self.structures])

    def read(self, *, image: Volume, classes: Mapping[str, int]) -> npt.NDArray[np.uint8]:
        """Raises DataError for a structure that is no segment, and for frames off the image's voxels."""
        dataset = read_elements(self.path, KEYWORDS)
        value_of = self._values(dataset, classes)
        planes = read_planes(self.path)
        with parsing(self.path):
            is_map = dataset.get("SegmentationType") == "LABELMAP"
            numbers = [None] * len(planes) if is_map else _segment_numbers(dataset)
        if len(numbers) != len(planes):
            rule = f"a segment for each of {len(planes)} frames"
            raise DataError("frames without a segment", where=self.path.name, value=len(numbers), rule=rule)
        _check_size(self.path, planes)
        label = np.zeros(image.native.shape, np.uint8)  # native axis order
        table = np.zeros(2**16, np.uint8)  # label map's voxel value -> class
        for segment, value in value_of.items():
            table[segment] = value
        frames = decoded_frames(self.path, planes[0].syntax, count=len(planes))
        for plane, number in zip(planes, numbers, strict=True):
            stored = next(frames, None)
            if stored is None or stored.shape != (plane.rows, plane.columns):
                got = "none" if stored is None else stored.shape
                rule = f"{(plane.rows, plane.columns)} in frame {plane.frame + 1}"
                raise DataError("pixels and header differ", where=self.path.name, value=got, rule=rule)
            if number is not None and number not in value_of:
                continue
            values = table[stored.astype(np.uint16)] if number is None else np.where(stored != 0, table[number], 0)
            view = _on_image(label, plane, image.native)
            np.maximum(view, values.astype(np.uint8), out=view)
        return image.native.to_canonical(label)

    def _values(self, dataset: Dataset, classes: Mapping[str, int]) -> dict[int, int]:
        """Segment number -> class."""
        with parsing(self.path):
            kind = str(dataset.get("SegmentationType") or "")
            if kind not in ("BINARY", "LABELMAP"):
                raise DataError("not a segmentation of classes", where=self.path.name, value=kind, rule="BINARY")
            segments = [(int(item.SegmentNumber), str(item.SegmentLabel).strip()) for item in dataset.SegmentSequence]
        if any(not 0 <= number < 2**16 for number, _ in segments):
            raise DataError("segment numbers not understood", where=self.path.name, rule="0 to 65535")
        check_structures(self.path, self.structures, [label for _, label in segments], what="segment")
        return {number: classes[label] for number, label in segments if label in self.structures}


def segment_labels(path: Path) -> list[str]:
    """Names of the segments of a DICOM-SEG."""
    dataset = read_elements(path, ["SegmentSequence"])
    with parsing(path):
        return [str(item.SegmentLabel).strip() for item in dataset.get("SegmentSequence") or []]


def check_structures(path: Path, wanted: Sequence[str], there: Sequence[str], *, what: str) -> None:
    """Raises DataError where a structure has no such name: absent and misspelt look the same."""
    missing = [name for name in wanted if name not in there]
    if missing:
        rule = f"every structure of data.structures is a {what}; there are {', '.join(sorted(set(there))[:20])}"
        raise DataError(f"structure without a {what}", where=path.name, value=", ".join(missing), rule=rule)


def _segment_numbers(dataset: Dataset) -> list[int | None]:
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    numbers: list[int | None] = []
    for item in dataset.get("PerFrameFunctionalGroupsSequence") or []:
        identification = item.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
        numbers.append(int(identification[0].ReferencedSegmentNumber))
    return numbers


def _check_size(path: Path, planes: Sequence[Plane]) -> None:
    first = planes[0]
    nbytes = file_size(path) * (MAX_DEFLATE_RATIO if first.is_compressed else 8 if first.bits_allocated == 1 else 1)
    if len(planes) > MAX_FRAMES:
        raise DataError("too many frames", where=path.name, value=len(planes), rule=f"at most {MAX_FRAMES}")
    check_size(path.name, (first.columns, first.rows, len(planes)), 1, at_most_nbytes=nbytes)


def _on_image(label: npt.NDArray[np.uint8], plane: Plane, native: NativeGrid) -> npt.NDArray[np.uint8]:
    """A view [rows, columns] of the label, in native axis order, where the plane lies. Raises DataError where the
    plane's voxels are not the image's."""
    frame = np.eye(4)[:, [0, 1, 3]]  # (column, row, 1) -> LPS mm
    frame[:3, 0] = plane.directions[0] * plane.spacing_mm[0]
    frame[:3, 1] = plane.directions[1] * plane.spacing_mm[1]
    frame[:3, 2] = plane.position_mm
    to_index = np.linalg.inv(native.affine) @ LPS_TO_RAS @ frame
    steps, start = np.rint(to_index[:3, :2]).astype(int), np.rint(to_index[:3, 2]).astype(int)
    corners = np.array([[c, r, 1] for c in (0, plane.columns - 1) for r in (0, plane.rows - 1)]).T  # [3, 4]
    exact = np.column_stack([steps, start]) @ corners
    off = native.affine[:3, :3] @ (to_index[:3] @ corners - exact)
    off_mm = float(np.linalg.norm(off, axis=0).max())
    tolerance_mm = LABEL_GRID_TOLERANCE * min(native.geometry.spacing_mm)
    inside = bool((exact >= 0).all() and (exact < np.array(native.shape)[:, None]).all())
    unit = bool((np.abs(steps).sum(axis=0) == 1).all() and (np.abs(steps).sum(axis=1) <= 1).all())
    if off_mm > tolerance_mm or not unit or not inside:
        got = f"frame {plane.frame + 1}: " + (f"{off_mm:.3g} mm off" if inside and unit else "outside the image's grid")
        rule = f"its voxels are the image's, within {tolerance_mm:.3g} mm"
        fix = "resample the segmentation to the image"
        raise DataError("label and image differ in geometry", where=plane.path.name, value=got, rule=rule, fix=fix)
    column_axis, row_axis = (int(np.flatnonzero(steps[:, n])[0]) for n in (0, 1))
    selection: list[int | slice] = [int(n) for n in start]
    for axis, n, size in ((column_axis, 0, plane.columns), (row_axis, 1, plane.rows)):
        low = int(start[axis]) if steps[axis, n] > 0 else int(start[axis]) - size + 1
        selection[axis] = slice(low, low + size)
    part = label[tuple(selection)]  # the two axes in native order
    if column_axis < row_axis:
        part = part.T
    return part[:: int(steps[row_axis, 1]), :: int(steps[column_axis, 0])]
