"""The arrays of a cohort as they are read. A zarr.json is a claim, and reading allocates what it says; damage has a
place, and is told with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata

from distseg.data.limits import MAX_VOXELS
from distseg.errors import DataError

MAX_CHUNK_NBYTES = 2**30  # of what is decoded at once; ingest's are 64^3 voxels, or all samples of a scan
# Those of ingest, and zarr's own defaults: each says how much it unfolds to, or unfolds nothing.
CODECS = frozenset({"ShardingCodec", "BytesCodec", "BloscCodec", "ZstdCodec", "Crc32cCodec"})
# What zarr, numcodecs and the JSON module raise of damaged metadata and data; RuntimeError is numcodecs' and, as
# RecursionError, the JSON module's.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, IndexError)
_FIX = "ingest that scan again"


class StoredArray:
    """An array of the store, opened and checked; indexing reads."""

    def __init__(self, path: str, where: str, *, like: Sequence[int] | None = None) -> None:
        """`like`: the shape it must have. Raises DataError where it is damaged, or reading it would not be bounded."""
        self._where = where
        try:
            self._array: zarr.Array[Any] = zarr.open_array(path, mode="r", zarr_format=3)
            _check(self._array, where, like)
        except DAMAGE as error:
            raise _told(error, where) from error

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    @property
    def ndim(self) -> int:
        return self._array.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._array.dtype)

    @property
    def chunks(self) -> tuple[int, ...]:
        return tuple(self._array.chunks)

    @property
    def metadata(self) -> ArrayV3Metadata | ArrayV2Metadata:
        return self._array.metadata

    @property
    def shards(self) -> tuple[int, ...] | None:
        return self._array.shards

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """Raises DataError where what is stored is damaged; what the disk says as it is."""
        try:
            return np.asarray(self._array[key])
        except DAMAGE as error:
            raise _told(error, self._where) from error


def _told(error: Exception, where: str) -> Exception:
    if isinstance(error, DataError) or (isinstance(error, OSError) and error.errno is not None):
        return error
    what = f"damaged array: {type(error).__name__} {' '.join(str(error).split())[:200]}"
    return DataError(what, where=where, fix=_FIX)


def _check(array: zarr.Array[Any], where: str, like: Sequence[int] | None) -> None:
    shape, chunks = tuple(array.shape), tuple(array.chunks)
    if array.dtype.kind not in "iuf":
        raise DataError("array of another type", where=where, value=array.dtype, rule="numbers", fix=_FIX)
    if like is not None and shape != tuple(like):
        rule = f"the scan's is {tuple(like)}"
        raise DataError("array of another shape than its scan", where=where, value=shape, rule=rule, fix=_FIX)
    if math.prod(shape) > MAX_VOXELS:
        raise DataError("array too large", where=where, value=shape, rule=f"at most {MAX_VOXELS} values", fix=_FIX)
    nbytes = math.prod(chunks) * array.dtype.itemsize
    if nbytes > MAX_CHUNK_NBYTES:
        rule = f"at most {MAX_CHUNK_NBYTES}"
        raise DataError("chunks too large", where=where, value=f"{nbytes} bytes", rule=rule, fix=_FIX)
    codecs = array.metadata.codecs if isinstance(array.metadata, ArrayV3Metadata) else ()
    unknown = sorted(set(_names(codecs)) - CODECS)
    if unknown:
        what = "array in codecs that ingest does not write"
        raise DataError(what, where=where, value=", ".join(unknown), fix=_FIX)


def _names(codecs: Sequence[Any]) -> list[str]:
    """Of classes; those inside a shard too."""
    names = []
    for codec in codecs:
        names.append(type(codec).__name__)
        names += _names(getattr(codec, "codecs", ())) + _names(getattr(codec, "index_codecs", ()))
    return names
