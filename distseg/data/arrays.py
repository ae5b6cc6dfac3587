"""Opening one array of the store for reading: TensorStore where it is installed, zarr-python otherwise.

Both read the same files and give the same numbers (tests/unit/test_arrays.py). TensorStore, of the extra `io`, decodes
in C++ without Python's lock, so that a patch costs a fraction and does not stall the step it overlaps with. It reads
this machine's file systems here; arrays behind a URL are read by zarr-python through fsspec.

DISTSEG_READER=zarr|tensorstore overrides the choice, for comparisons.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from distseg.data.limits import MAX_VOXELS, of_storage
from distseg.data.place import as_place, is_url
from distseg.data.volume import ArrayLike3D
from distseg.errors import ConfigError, DataError

READERS = ("tensorstore", "zarr")
# What a store may ask of its reader: no codec whose output has no bound (a blosc chunk is at most 2 GiB; zstd is for
# samples, which are small), no chunk far beyond ours.
CODECS = ("bytes", "sharding_indexed", "blosc", "zstd", "crc32c")
MAX_CHUNK_NBYTES = 2**28
MAX_METADATA_NBYTES = 2**20
CACHE_NBYTES = 64 * 2**20  # shard indexes and the chunks of the last few patches
# What the two libraries raise on damaged or missing data; zarr's codecs have no common base class.
_UNREADABLE = (ValueError, RuntimeError, OSError, LookupError, TypeError, AttributeError, ArithmeticError)


@cache
def reader_name() -> str:
    """The reader of local arrays, of READERS. Raises ConfigError where DISTSEG_READER names one that is not there."""
    installed = importlib.util.find_spec("tensorstore") is not None
    wanted = os.environ.get("DISTSEG_READER")
    if wanted is None:
        return "tensorstore" if installed else "zarr"
    if wanted not in READERS or (wanted == "tensorstore" and not installed):
        fix = "pip install 'distseg[io]'" if wanted == "tensorstore" else "unset it"
        rule = f"one of {', '.join(READERS)} that is installed"
        raise ConfigError("no such reader", where="DISTSEG_READER", value=wanted, rule=rule, fix=fix)
    return wanted


def reader_of(path: str) -> str:
    """What a user is told: which of READERS reads the arrays of the cohort at `path`, and what would be faster."""
    name = "zarr" if is_url(path) else reader_name()
    return name if name == "tensorstore" or is_url(path) else f"{name} (distseg[io] brings TensorStore, faster)"


class StoredArray:
    """An array of the store, read by box: `path`, `shape`, `dtype`, and `[...]` gives a numpy array.

    Raises DataError, naming the array, where it is missing or damaged, OSError where the storage does not answer.
    """

    def __init__(self, path: str, opened: ArrayLike3D) -> None:
        self.path, self._opened = path, opened
        self.shape: tuple[int, ...] = tuple(opened.shape)
        self.dtype: np.dtype[Any] = np.dtype(opened.dtype)

    def __getitem__(self, selection: Any, /) -> npt.NDArray[Any]:
        try:
            return np.asarray(self._opened[selection])
        except _UNREADABLE as error:
            raise _damaged(self.path, error) from error


def open_array(path: str, *, reader: str | None = None) -> StoredArray:
    """Open by path. `reader` is one of READERS, None: the one there is. Raises DataError, naming the array, where it is
    missing or damaged, or where its metadata would have more memory taken than any scan needs; OSError where the
    storage does not answer."""
    try:
        _check_metadata(path)
        if is_url(path) or (reader or reader_name()) == "zarr":
            return StoredArray(path, zarr.open_array(path, mode="r", zarr_format=3))
        return StoredArray(path, _TensorStore(path))
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _check_metadata(path: str) -> None:
    """Refuse what only damage or malice writes, before a reader believes it. Raises ValueError."""
    with (as_place(path) / "zarr.json").open(encoding="utf-8") as file:
        node = json.loads(file.read(MAX_METADATA_NBYTES))
    shape, chunk = node["shape"], node["chunk_grid"]["configuration"]["chunk_shape"]
    itemsize = np.dtype(node["data_type"]).itemsize
    inner = [codec["configuration"] for codec in node["codecs"] if codec["name"] == "sharding_indexed"]
    for what, sizes, most in (
        ("shape", shape, MAX_VOXELS),
        ("chunk_shape", chunk, MAX_CHUNK_NBYTES // itemsize),
        *(("chunk_shape of a shard", sharding["chunk_shape"], MAX_CHUNK_NBYTES // itemsize) for sharding in inner),
    ):
        if not all(isinstance(n, int) and n >= 0 for n in sizes) or math.prod(sizes) > most:
            raise ValueError(f"{what} {sizes}: at most {most} values")
    codecs = [*node["codecs"], *(codec for sharding in inner for codec in sharding["codecs"])]
    names = {str(codec["name"]) for codec in codecs} | ({"transformers"} if node.get("storage_transformers") else set())
    if not names <= set(CODECS):
        raise ValueError(f"codec {', '.join(sorted(names - set(CODECS)))}: one of {', '.join(CODECS)}")


class _TensorStore:
    """ArrayLike3D over TensorStore's asynchronous handle."""

    def __init__(self, path: str) -> None:
        import tensorstore

        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{os.path.abspath(path)}/"},
            # A scan is replaced by renaming: whoever opened the old one goes on with what was cached of it.
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }
        self._handle = tensorstore.open(spec, context=_context(), read=True).result()
        self.shape = tuple(int(n) for n in self._handle.shape)
        self.dtype = self._handle.dtype.numpy_dtype

    def __getitem__(self, selection: Any, /) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._handle[selection].read().result()
        return values


@cache
def _context() -> Any:
    """One per process: threads as many as numpy's, and a bounded cache."""
    import tensorstore

    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    limit = {"limit": max(1, threads)}
    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": CACHE_NBYTES},
            "data_copy_concurrency": limit,
            "file_io_concurrency": {"limit": max(4, threads)},
        }
    )


def _damaged(path: str, error: BaseException) -> DataError | OSError:
    where = "/".join(path.rstrip("/").split("/")[-3:])  # not the whole: folder names may be names of patients
    away = of_storage(error, where)
    if away is not None:
        return away
    why = str(error).partition("\n")[0].replace(path, where)[:200] or type(error).__name__
    fix = "run distseg cohort action=remove for this scan, then ingest it again"
    return DataError("array of the store cannot be read", where=where, value=why, fix=fix)
