"""The image planes of a DICOM file: where each lies, and how its stored values become intensities.

A single-frame CT or MR file is one plane; an enhanced multi-frame one says per frame what the others say per file.
Positions and directions are LPS+ millimetres, as in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import UID

from distseg.data.dicom.file import parsing, read_elements, transfer_syntax
from distseg.errors import DataError

KEYWORDS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "Modality",
    "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
UNIT_TOLERANCE = 1e-3  # how far the two directions may be from unit length and from a right angle
MAX_MM = 1e6  # a place further than a kilometre off is damage
MAX_WHOLE = 2**20  # slopes and intercepts beyond it are computed as floats


@dataclass(frozen=True, eq=False)
class Plane:
    """`directions` [2, 3]: unit vectors along a row (columns grow) and along a column (rows grow); `spacing_mm`: from
    column to column, from row to row; `position_mm` [3]: centre of the first voxel."""

    path: Path
    frame: int
    rows: int
    columns: int
    bits_allocated: int
    modality: str
    syntax: UID
    is_compressed: bool
    position_mm: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]
    spacing_mm: tuple[float, float]
    slope: float
    intercept: float

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        return np.cross(self.directions[0], self.directions[1])

    @property
    def is_whole(self) -> bool:
        """Whether its intensities are whole numbers, exactly."""
        scale = (self.slope, self.intercept)
        return all(value.is_integer() and abs(value) <= MAX_WHOLE for value in scale)


def read_planes(path: Path) -> list[Plane]:
    """The planes of a file in the order of its frames. Raises DataError for a file without geometry, or whose voxels
    are not one number each."""
    dataset = read_elements(path, KEYWORDS)
    with parsing(path):
        frames = int(dataset.get("NumberOfFrames") or 1)
        per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        if per_frame and len(per_frame) != frames:
            rule = f"NumberOfFrames is {frames}"
            raise DataError("frames without a place", where=path.name, value=len(per_frame), rule=rule)
        if frames != 1 and not per_frame:
            rule = "each frame says where it lies, as in enhanced CT and MR"
            raise DataError("frames without geometry", where=path.name, value=f"{frames} frames", rule=rule)
        _check_voxels(path, dataset)
        groups = [[item, shared] for item in per_frame] or [[dataset]]
        return [_plane(path, dataset, number, sources) for number, sources in enumerate(groups)]


def _check_voxels(path: Path, dataset: Dataset) -> None:
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if samples != 1:
        raise DataError("more than one channel", where=path.name, value=samples, rule="SamplesPerPixel is 1")
    shown = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    if shown != "MONOCHROME2":
        raise DataError("not a CT or MR image", where=path.name, value=shown, rule="MONOCHROME2")
    if dataset.get("ModalityLUTSequence"):
        rule = "a slope and an intercept at most"
        raise DataError("intensities by a look-up table", where=path.name, rule=rule, fix="convert it first")
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        if dataset.get(keyword) is None:
            raise DataError(f"no {keyword}", where=path.name, rule="an image", fix="copy it again")


def _plane(path: Path, dataset: Dataset, frame: int, sources: list[Any]) -> Plane:
    """`sources` are looked through in order: the file itself, or a frame's item and the shared one."""
    values = {
        "PixelSpacing": _find(sources, "PixelMeasuresSequence", "PixelSpacing"),
        "ImagePositionPatient": _find(sources, "PlanePositionSequence", "ImagePositionPatient"),
        "ImageOrientationPatient": _find(sources, "PlaneOrientationSequence", "ImageOrientationPatient"),
    }
    missing = [name for name, value in values.items() if not value]
    if missing:
        rule = "every slice says where it lies"
        raise DataError("no geometry", where=path.name, value=f"no {', '.join(missing)}", rule=rule)
    between_rows, between_columns = (float(value) for value in values["PixelSpacing"])
    position = np.array([float(value) for value in values["ImagePositionPatient"]])
    directions = np.array([float(value) for value in values["ImageOrientationPatient"]]).reshape(2, 3)
    slope = _find(sources, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _find(sources, "PixelValueTransformationSequence", "RescaleIntercept")
    syntax = transfer_syntax(dataset)
    plane = Plane(
        path=path,
        frame=frame,
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        bits_allocated=int(dataset.BitsAllocated),
        modality=str(dataset.get("Modality") or "unknown"),
        syntax=syntax,
        is_compressed=syntax.is_compressed,
        position_mm=position,
        directions=directions,
        spacing_mm=(between_columns, between_rows),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
    )
    _check_numbers(plane)
    return plane


def _find(sources: list[Any], sequence: str, keyword: str) -> Any:
    """The element itself, or in the functional group that holds it; None where there is neither."""
    for source in sources:
        if source.get(keyword) is not None:
            return source.get(keyword)
        items = source.get(sequence)
        if items and items[0].get(keyword) is not None:
            return items[0].get(keyword)
    return None


def _check_numbers(plane: Plane) -> None:
    where = plane.path.name
    geometry = [*plane.position_mm.tolist(), *plane.spacing_mm, *plane.directions.ravel().tolist()]
    if len(plane.position_mm) != 3 or not np.all(np.abs(geometry) <= MAX_MM):
        rule = f"numbers of at most {MAX_MM:.0f} mm"
        raise DataError("geometry not understood", where=where, value=geometry, rule=rule)
    scale = [*plane.spacing_mm, plane.slope, plane.intercept]
    if min(plane.spacing_mm) <= 0 or plane.slope == 0 or not np.isfinite(scale).all():
        rule = "PixelSpacing above 0, RescaleSlope other than 0"
        raise DataError("no usable scale", where=where, value=scale, rule=rule)
    products = plane.directions @ plane.directions.T
    if np.abs(products - np.eye(2)).max() > UNIT_TOLERANCE:
        rule = "two unit vectors at a right angle"
        value = plane.directions.round(6).tolist()
        raise DataError("unusable ImageOrientationPatient", where=where, value=value, rule=rule)
