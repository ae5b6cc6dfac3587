"""Planes of a uint8 volume that wait compressed on disk until the volume is whole: no byte a voxel in memory."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from distseg.data.nifti import write_nifti
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

    def write_nifti(self, path: str | Path, native: NativeGrid) -> None:
        """The volume in its native grid: one byte a voxel while this runs."""
        write_nifti(path, self.read(native), native)

    def read(self, native: NativeGrid) -> npt.NDArray[np.uint8]:
        """The volume in native axis order."""
        array = np.empty(native.shape, np.uint8, order="F")
        canonical = native.canonical_view(array)
        if len(self._sizes) != len(canonical):
            raise ValueError(f"{len(self._sizes)} planes of {len(canonical)}")
        self._file.seek(0)
        for z, size in enumerate(self._sizes):
            plane = np.frombuffer(zlib.decompress(self._file.read(size)), np.uint8)
            canonical[z] = plane.reshape(canonical.shape[1:])
        return array
