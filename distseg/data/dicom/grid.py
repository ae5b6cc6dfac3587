"""From image planes to one grid: their order, their common step, and what is wrong with them, in one line.

A gantry tilt or a table that drifts shears the grid; that is kept in the affine, as in NIfTI. Gaps that differ are not
a grid: they are refused, never interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from distseg.data.dicom.planes import Plane
from distseg.data.nifti import check_affine
from distseg.data.volume import NativeGrid
from distseg.errors import DataError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SAME_PLACE_MM = 1e-3
EVEN_TOLERANCE = 0.05  # share of the gap by which a slice may be off the even grid: positions are often rounded
ALIGNED_TOLERANCE = 0.1  # share of a voxel by which a corner may be off between slices of one orientation


def stack_planes(planes: Sequence[Plane]) -> tuple[list[Plane], NativeGrid]:
    """The planes along their normal, and their grid [column i, row j, slice k]. Raises DataError where they are not one
    volume on an even grid."""
    name = f"series of {len(planes)} slices"
    if len(planes) < 2:
        rule = "a volume has at least two slices"
        raise DataError("one slice", where=planes[0].path.name, rule=rule, fix="leave it out, or copy the others")
    first = planes[0]
    for plane in planes:
        _check_alike(first, plane)
    ordered = sorted(planes, key=lambda plane: float(plane.position_mm @ first.normal))
    positions = np.stack([plane.position_mm for plane in ordered])  # [slices, 3]
    along = positions @ first.normal
    _check_gaps(name, ordered, along)
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    off = np.linalg.norm(positions - (positions[0] + np.arange(len(positions))[:, None] * step), axis=1)
    tolerance_mm = EVEN_TOLERANCE * float(np.abs(step @ first.normal))
    if off.max() > tolerance_mm:
        worst = ordered[int(off.argmax())].path.name
        value, rule = f"{worst} is {off.max():.3g} mm off", f"at most {tolerance_mm:.3g} mm off an even grid"
        raise DataError("slices are not on an even grid", where=name, value=value, rule=rule, fix=_RESAMPLE)
    affine = np.eye(4)
    affine[:3, 0] = first.directions[0] * first.spacing_mm[0]
    affine[:3, 1] = first.directions[1] * first.spacing_mm[1]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    affine = LPS_TO_RAS @ affine
    check_affine(name, affine)
    return ordered, NativeGrid((first.columns, first.rows, len(ordered)), affine)


_RESAMPLE = "resample it to even gaps and ingest that as NIfTI"


def _check_alike(first: Plane, plane: Plane) -> None:
    where = f"{first.path.name} and {plane.path.name}"
    for what, one, other in (
        ("size", (first.rows, first.columns), (plane.rows, plane.columns)),
        ("modality", first.modality, plane.modality),
        ("BitsAllocated", first.bits_allocated, plane.bits_allocated),
    ):
        if one != other:
            rule = "slices of one series are alike"
            raise DataError(f"slices differ in {what}", where=where, value=f"{one} and {other}", rule=rule)
    tolerance_mm = ALIGNED_TOLERANCE * min(first.spacing_mm)
    off_mm = float(np.linalg.norm(_extent_mm(first) - _extent_mm(plane), axis=1).sum())
    if off_mm > tolerance_mm:
        rule = "slices of one series have one orientation and pixel spacing"
        raise DataError("slices differ in orientation", where=where, value=f"{off_mm:.3g} mm", rule=rule)


def _extent_mm(plane: Plane) -> npt.NDArray[np.float64]:
    """[2, 3]: the vectors along the whole of a row and of a column."""
    sizes = np.array([plane.columns * plane.spacing_mm[0], plane.rows * plane.spacing_mm[1]])
    return np.asarray(plane.directions * sizes[:, None], np.float64)


def _check_gaps(name: str, ordered: Sequence[Plane], along_mm: npt.NDArray[np.float64]) -> None:
    gaps = np.diff(along_mm)
    if gaps.min() <= SAME_PLACE_MM:
        at = int(gaps.argmin())
        where = f"{ordered[at].path.name} and {ordered[at + 1].path.name}"
        rule = "one image a place: no second echo, time or patient under one SeriesInstanceUID"
        raise DataError("two slices at one place", where=where, rule=rule, fix="split the series")
    usual = float(gaps.min())
    multiples = np.rint(gaps / usual)
    off = np.abs(gaps - multiples * usual)
    if off.max() <= EVEN_TOLERANCE * usual and multiples.max() > 1:
        at = int(multiples.argmax())
        value = f"{int((multiples - 1).sum())} missing, first after {ordered[int((multiples > 1).argmax())].path.name}"
        rule = f"a slice every {usual:.4g} mm; one gap is {gaps[at]:.4g} mm"
        raise DataError("slices are missing", where=name, value=value, rule=rule, fix="copy the missing files")
    if np.ptp(gaps) > 2 * EVEN_TOLERANCE * usual:
        value = f"from {gaps.min():.4g} to {gaps.max():.4g} mm"
        raise DataError("gaps between slices differ", where=name, value=value, rule="one gap", fix=_RESAMPLE)
