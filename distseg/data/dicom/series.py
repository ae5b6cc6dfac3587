"""A DICOM series as a volume: intensities after rescale, exactly, on the grid that its slices say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distseg.data.dicom.file import decoded_frames, parsing
from distseg.data.dicom.grid import stack_planes
from distseg.data.dicom.planes import Plane, read_planes
from distseg.data.digest import combined_sha256, file_sha256, file_size
from distseg.data.limits import MAX_DEFLATE_RATIO, check_size
from distseg.data.volume import NativeGrid, Volume
from distseg.errors import DataError

# No codec's power has a bound, and a slice of air is next to nothing; this much is believed of any series.
BELIEVED_NBYTES = 2**26
WHOLE = (np.int16, np.int32, np.int64)


@dataclass(frozen=True)
class DicomSeries:
    """`files` are all of one series; `path` is their folder, or the first of them where others lie in it too."""

    path: Path
    files: tuple[Path, ...]

    def sha256(self) -> str:
        """Of what the files hold, whatever they are called."""
        return combined_sha256(sorted(file_sha256(path) for path in self.files))

    def read(self) -> Volume:
        """Whole numbers as int16 or the next type that holds them, others as float32. Raises DataError, in one line,
        for a series that is no volume or whose files are damaged."""
        planes = [plane for path in self.files for plane in read_planes(path)]
        ordered, native = stack_planes(planes)
        _check_size(ordered)
        array = _intensities(ordered)  # [slices, rows, columns]
        modality = ordered[0].modality
        return Volume(native.to_canonical(array.transpose(2, 1, 0)), native.geometry, native, modality)

    def grid(self) -> NativeGrid:
        """Its grid alone; no voxel is read."""
        return stack_planes([plane for path in self.files for plane in read_planes(path)])[1]


def _check_size(planes: Sequence[Plane]) -> None:
    """Refuse what the files cannot hold, before anything of that size is made."""
    first = planes[0]
    nbytes = sum(file_size(path) for path in {plane.path for plane in planes})
    if any(plane.is_compressed for plane in planes):
        nbytes = nbytes * MAX_DEFLATE_RATIO + BELIEVED_NBYTES
    shape = (first.columns, first.rows, len(planes))
    name = f"series of {len(planes)} slices"
    check_size(name, shape, max(1, first.bits_allocated // 8), at_most_nbytes=nbytes)


def _intensities(ordered: Sequence[Plane]) -> npt.NDArray[Any]:
    """[slices, rows, columns] of the planes in their order; each file is decoded once, frame by frame."""
    first = ordered[0]
    whole = all(plane.is_whole for plane in ordered)
    array = np.empty((len(ordered), first.rows, first.columns), np.int16 if whole else np.float32)
    places = sorted(enumerate(ordered), key=lambda item: (str(item[1].path), item[1].frame))
    for path, group in groupby(places, key=lambda item: item[1].path):
        of_file = list(group)
        frames = decoded_frames(path, of_file[0][1].syntax, count=len(of_file))
        for k, plane in of_file:
            stored = next(frames, None)
            if stored is None or stored.shape != (plane.rows, plane.columns):
                got = "none" if stored is None else stored.shape
                rule = f"{(plane.rows, plane.columns)} in frame {plane.frame + 1}"
                raise DataError("pixels and header differ", where=path.name, value=got, rule=rule, fix="copy it again")
            array = _put(array, k, stored, plane)
        with parsing(path):
            frames.close()
    return array


def _put(array: npt.NDArray[Any], k: int, stored: npt.NDArray[Any], plane: Plane) -> npt.NDArray[Any]:
    """`array` with slice k filled, of a wider integer type where its values need one."""
    values: npt.NDArray[Any]
    if array.dtype == np.float32 or stored.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = (stored.astype(np.float64) * plane.slope + plane.intercept).astype(np.float32)
        if not np.isfinite(values).all():
            bad = int(np.count_nonzero(~np.isfinite(values)))
            rule = "every voxel a number"
            raise DataError("NaN or infinite voxels", where=plane.path.name, value=bad, rule=rule)
        array = array.astype(np.float32, copy=False)
    else:
        values = stored.astype(np.int64) * int(plane.slope) + int(plane.intercept)
        low, high = int(values.min()), int(values.max())
        fits = next(t for t in WHOLE if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
        array = array.astype(np.promote_types(array.dtype, fits), copy=False)
    array[k] = values
    return array
