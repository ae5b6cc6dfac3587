"""Patches of a cohort on the run's grid: read by box, kept in RAM while there is room.

A patch of a volume that was kept and one read from the store are the same numbers: resampling is local, so a box of
the resampled volume is the resampled box. Axis order Z, Y, X.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from distseg.data.cohort import Cohort, Scan
from distseg.data.intensity import Intensity
from distseg.data.volume import resample_box, target_geometry

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.uint8]
_FLOAT32_NBYTES = 4  # of a voxel that was kept, whatever the store's type: interpolation makes it float32


@dataclass(frozen=True)
class Placement:
    """Voxels of one scan where patches may be centred, on the run's grid; int32 [n, 3] each."""

    body: npt.NDArray[np.int32]
    foreground: dict[str, npt.NDArray[np.int32]]  # class name -> voxels, of labelled scans
    intensities: dict[str, FloatArray] = field(default_factory=dict)  # of those voxels, float32 [n], as stored


class PatchReader:
    """Reads boxes of a cohort's scans, resampled to `spacing_mm` and normalised.

    Args:
        memory_nbytes: volumes are kept in RAM, as first touched, up to this much; the rest is read box by box.
    """

    def __init__(
        self, cohort: Cohort, *, spacing_mm: Sequence[float], intensity: Intensity, memory_nbytes: int
    ) -> None:
        self._cohort = cohort
        self._spacing = tuple(float(s) for s in spacing_mm)
        self._intensity = intensity
        self._memory_nbytes = self._room_nbytes = memory_nbytes
        self._scans: dict[str, Scan] = {}
        self._images: dict[str, npt.NDArray[np.generic]] = {}
        self._labels: dict[str, LabelArray] = {}
        self._placements: dict[str, Placement] = {}

    @property
    def kept_nbytes(self) -> int:
        """Of the volumes kept in RAM so far."""
        return self._memory_nbytes - self._room_nbytes

    def shape(self, scan_id: str) -> tuple[int, int, int]:
        """Of the scan on the run's grid."""
        return target_geometry(self._scan(scan_id).geometry, self._spacing).shape

    def placement(self, scan_id: str) -> Placement:
        """Centres from the scan's stored samples; opens no label volume."""
        if scan_id not in self._placements:
            scan = self._scan(scan_id)
            self._placements[scan_id] = Placement(
                body=self._to_run_grid(scan, scan.body_samples),
                foreground={
                    n: self._to_run_grid(scan, f.samples) for n, f in scan.foreground.items() if len(f.samples)
                },
                intensities={n: f.values for n, f in scan.foreground.items() if len(f.samples)},
            )
        return self._placements[scan_id]

    def image(self, scan_id: str, start: Sequence[int], size: Sequence[int]) -> FloatArray:
        """Normalised intensities of a box; beyond the scan lies its minimum."""
        scan = self._scan(scan_id)
        kept = self._images.get(scan_id)
        if kept is None and self._keep(_FLOAT32_NBYTES * math.prod(self.shape(scan_id))):
            kept = self._images[scan_id] = self._read(scan, (0, 0, 0), self.shape(scan_id))
        raw = self._read(scan, start, size) if kept is None else crop(kept, start, size, fill=scan.minimum)
        return self._intensity.normalise(raw, nonzero_mean=scan.nonzero_mean, nonzero_sd=scan.nonzero_sd)

    def label(self, scan_id: str, start: Sequence[int], size: Sequence[int]) -> LabelArray:
        """Annotated classes of a box, uint8; background beyond the scan."""
        scan = self._scan(scan_id)
        kept = self._labels.get(scan_id)
        if kept is None and self._keep(math.prod(self.shape(scan_id))):
            kept = self._labels[scan_id] = self._read_label(scan, (0, 0, 0), self.shape(scan_id))
        label = self._read_label(scan, start, size) if kept is None else crop(kept, start, size, fill=0)
        return label.astype(np.uint8, copy=False)

    def _scan(self, scan_id: str) -> Scan:
        if scan_id not in self._scans:
            self._scans[scan_id] = self._cohort.scan(scan_id)
        return self._scans[scan_id]

    def _keep(self, nbytes: int) -> bool:
        fits = nbytes <= self._room_nbytes
        if fits:
            self._room_nbytes -= nbytes
        return fits

    def _read(self, scan: Scan, start: Sequence[int], size: Sequence[int]) -> npt.NDArray[np.generic]:
        return resample_box(
            scan.image,
            source_spacing_mm=scan.geometry.spacing_mm,
            target_spacing_mm=self._spacing,
            start_zyx=start,
            size_zyx=size,
            order=1,
            fill=scan.minimum,
        )

    def _read_label(self, scan: Scan, start: Sequence[int], size: Sequence[int]) -> LabelArray:
        if scan.annotation is None:
            raise ValueError(f"{scan.scan_id} has no annotation")  # the sampler asks labelled scans alone
        return resample_box(
            scan.annotation,
            source_spacing_mm=scan.geometry.spacing_mm,
            target_spacing_mm=self._spacing,
            start_zyx=start,
            size_zyx=size,
            order=0,
            fill=0,
        ).astype(np.uint8)

    def _to_run_grid(self, scan: Scan, voxels: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        scale = np.asarray(scan.geometry.spacing_mm) / np.asarray(self._spacing)
        moved = np.floor((np.asarray(voxels) + 0.5) * scale).astype(np.int32)
        last: npt.NDArray[np.int32] = np.asarray(self.shape(scan.scan_id), np.int32) - 1
        clipped: npt.NDArray[np.int32] = np.minimum(moved, last)
        return clipped


def crop(
    volume: npt.NDArray[np.generic], start: Sequence[int], size: Sequence[int], *, fill: float
) -> npt.NDArray[np.generic]:
    """The box [start, start + size) of a volume, `fill` where it leaves it."""
    out = np.full(tuple(size), fill, volume.dtype)
    low = [max(s, 0) for s in start]
    high = [min(s + n, extent) for s, n, extent in zip(start, size, volume.shape, strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        out[target] = volume[source]
    return out
