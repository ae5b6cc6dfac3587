"""Planes of a uint8 volume that wait compressed on disk until the volume is whole: no byte a voxel in memory."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from distseg.data.volume import NativeGrid

_QUICKLY = 1  # zlib's level: the planes are read once


class PlaneSpool:
    """A context manager; its nameless file in `folder` goes with it."""

    def __init__(self, folder: str | Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by __exit__
        self._sizes: list[int] = []

    def __enter__(self) -> PlaneSpool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, plane: npt.NDArray[np.uint8]) -> None:
        """The next plane [Y, X] along Z."""
        packed = zlib.compress(np.ascontiguousarray(plane).data, _QUICKLY)
        self._sizes.append(len(packed))
        self._file.write(packed)

    def read(self, native: NativeGrid) -> npt.NDArray[np.uint8]:
        """The volume in native axis order: one byte a voxel."""
        array = np.empty(native.shape, np.uint8, order="F")
        canonical = native.canonical_view(array)
        if len(self._sizes) != len(canonical):
            raise ValueError(f"{len(self._sizes)} planes of {len(canonical)}")
        for z, plane in enumerate(self.planes(canonical.shape[1:])):
            canonical[z] = plane
        return array

    def planes(self, shape_yx: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """Each [Y, X], in the order in which they came."""
        self._file.seek(0)
        for size in self._sizes:
            yield np.frombuffer(zlib.decompress(self._file.read(size)), np.uint8).reshape(shape_yx)
