"""Voxel values of volumes that may fill the memory: every pass goes slab by slab, and no second copy is made.

A volume is held in the narrowest of uint8, int16 and float32 that holds all its values. float32 is the widest: the
store keeps nothing wider.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distseg.data.volume import ArrayLike3D, NativeGrid
from distseg.errors import DataError

SLAB_VOXELS = 2**22  # 32 MiB while a slab is float64
FLOAT32_MAX = float(np.finfo(np.float32).max)
LADDER: tuple[npt.DTypeLike, ...] = (np.uint8, np.int16, np.float32)
INT16_OR_FLOAT: tuple[npt.DTypeLike, ...] = (np.int16, np.float32)


class Narrowest:
    """An array that is filled part by part and widens when a part does not fit the type so far.

    Widening keeps what is there exactly: uint8 into int16 into float32. A part that never comes leaves garbage.
    """

    def __init__(self, shape: Sequence[int], types: Sequence[npt.DTypeLike] = LADDER) -> None:
        self._types = [np.dtype(kind) for kind in types]
        self.array: npt.NDArray[Any] = np.empty(tuple(shape), self._types.pop(0))
        self._filled = False

    def put(self, where: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """`values` into the box `where`. Without a wider type left they are cast to the last one."""
        while self._types and not holds(self.array.dtype, values):
            wider = np.empty(self.array.shape, self._types.pop(0))
            if self._filled:
                wider[...] = self.array
            self.array = wider
        self.array[where] = values
        self._filled = True


def slabs(shape: Sequence[int], axis: int = 0) -> Iterator[slice]:
    """Consecutive ranges along `axis` that cover it, of about SLAB_VOXELS voxels each."""
    plane = int(np.prod([n for a, n in enumerate(shape) if a != axis]))
    step = max(1, SLAB_VOXELS // max(1, plane))
    for start in range(0, shape[axis], step):
        yield slice(start, min(start + step, shape[axis]))


def read_narrow(source: Any, native: NativeGrid, *, name: str) -> npt.NDArray[Any]:
    """`source`, sliced like an array in native axis order (axes after the third have length 1), as a *view* in native
    order of an array that is contiguous in canonical order, so that `NativeGrid.to_canonical` of it copies nothing.

    Reads along the last native axis, in order, each voxel once: what a compressed file can do. Raises DataError,
    naming `name`, for voxels that are NaN or infinite.
    """
    result, bad = Narrowest(native.geometry.shape), 0
    axis = native.permutation.index(2)  # the canonical axis that runs along the file's last
    for part in slabs(native.shape, axis=2):
        values = np.asanyarray(source[(slice(None), slice(None), part)])
        values = values.reshape(*native.shape[:2], part.stop - part.start)
        if values.dtype.kind == "f":
            bad += values.size - int(np.count_nonzero(np.abs(values) <= FLOAT32_MAX))  # of NaN that is False
            if bad:
                continue  # counted to the end, stored no more
        result.put(_along(axis, part, native), native.canonical_view(values))
    if bad:
        rule, fix = "every voxel a number that float32 holds", "replace them, for example by the scan's minimum"
        raise DataError("NaN or infinite voxels", where=name, value=bad, rule=rule, fix=fix)
    return native.native_view(result.array)


def holds(dtype: npt.DTypeLike, values: npt.NDArray[Any]) -> bool:
    """Whether each of `values` is a number of `dtype`; any number counts as one of float32."""
    kind = np.dtype(dtype)
    if kind.kind == "f" or values.dtype == kind or not values.size:
        return True
    limits = np.iinfo(kind)
    # Not NaN either: comparisons with it are False.
    in_range = bool(float(values.min()) >= limits.min and float(values.max()) <= limits.max)
    return in_range and (values.dtype.kind in "iub" or bool(np.array_equal(values, np.rint(values))))


def fits_int16(array: npt.NDArray[Any]) -> bool:
    """Whether every value is a whole number in the range of int16."""
    return all(holds(np.int16, part) for part in _parts(array))


def is_whole(array: npt.NDArray[Any]) -> bool:
    """Whether every value is a whole number."""
    return array.dtype.kind in "iub" or all(np.array_equal(part, np.rint(part)) for part in _parts(array))


def distinct(array: npt.NDArray[Any], *, most: int = 4096) -> npt.NDArray[Any]:
    """The sorted distinct values; once more than `most` were met, only those met so far."""
    found = np.empty(0, array.dtype)
    for part in _parts(array):
        # Counting is many times faster than the sort within np.unique.
        here = np.flatnonzero(np.bincount(part.ravel())) if part.dtype == np.uint8 else np.unique(part)
        found = np.union1d(found, here.astype(array.dtype))
        if len(found) > most:
            break
    return found


def nonzero_mean_and_sd(image: ArrayLike3D) -> tuple[float, float]:
    """Over the voxels that are not 0, in float64; 0 and 0 where there are none."""
    count, total = 0, 0.0
    for part in slabs(image.shape):
        values = np.asarray(image[part])
        count += int(np.count_nonzero(values))
        total += float(values.sum(dtype=np.float64))
    if count == 0:
        return 0.0, 0.0
    mean, squares = total / count, 0.0
    for part in slabs(image.shape):
        values = np.asarray(image[part])
        squares += float(np.square(values[values != 0] - mean).sum())
    return mean, float(np.sqrt(squares / count))


def _parts(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """The array in slabs across its slowest axis in memory: any other would walk the whole of it for each slab."""
    axis = int(np.argmax(np.abs(array.strides)))
    for part in slabs(array.shape, axis):
        yield array[tuple(part if a == axis else slice(None) for a in range(array.ndim))]


def _along(axis: int, part: slice, native: NativeGrid) -> tuple[slice, ...]:
    """Where a slab of the last native axis lies in the canonical array."""
    n: int = native.shape[2]
    if native.flips[axis]:
        part = slice(n - part.stop, n - part.start)
    return tuple(part if c == axis else slice(None) for c in range(3))
