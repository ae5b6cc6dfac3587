"""What labelling counts of a scan, plane by plane on the run's grid: the evidence of how far to trust its mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distseg.inference.components import Components


@dataclass(frozen=True)
class ScanFacts:
    """Of one scan; lists have one entry per foreground class."""

    voxels: int  # of the run's grid
    windows: int
    windows_embedded: int  # that had a deterministic pass for matching
    threshold_nats: float
    doubtful: int  # voxels at or above the threshold
    matched: int
    disagreeing: int  # matched voxels whose class is not the teacher's
    surface_voxels: int  # with a face neighbour of another class
    surface_entropy: float  # mean over them, as a share of ln K; 0 without any
    class_voxels: list[int]
    expected_dice: list[float | None]  # 2 sum(p m) / (sum(p) + sum(m)); None where both are all but empty
    components: list[int]
    largest_share: list[float]  # of the class' voxels in its largest component
    descriptor: list[float]  # unit vector [E]: mean embedding, weighted by entropy; zeros where nothing was in doubt


class FactsOfPlanes:
    """Adds up the facts of slabs that come in ascending order; keeps two planes of the last one."""

    def __init__(self, num_classes: int, *, threshold_nats: float) -> None:
        self.threshold_nats = threshold_nats
        self.windows_embedded = 0
        self._log_classes = math.log(num_classes)
        self._counts = {"doubtful": 0, "matched": 0, "disagreeing": 0, "surface": 0}
        self._surface_entropy = 0.0
        self._overlap = torch.zeros(num_classes, dtype=torch.float64)
        self._soft, self._hard = self._overlap.clone(), self._overlap.clone()
        self._components = [Components() for _ in range(1, num_classes)]
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # label, entropy, touched [1, Y, X] of the newest plane

    def add(self, shares: Tensor, entropy: Tensor, *, label: Tensor, teacher: Tensor, codes: Tensor) -> None:
        """The teacher's mean probabilities [K, n, Y, X], entropy, final label, its own and codes [n, Y, X]."""
        counts = self._counts
        counts["doubtful"] += int((codes > 0).sum())
        counts["matched"] += int((codes == 1).sum())
        counts["disagreeing"] += int((label != teacher).sum())
        for value in range(1, len(shares)):
            mask = label == value
            self._overlap[value] += float(shares[value][mask].sum(dtype=torch.float64))
            self._soft[value] += float(shares[value].sum(dtype=torch.float64))
            self._hard[value] += int(mask.sum())
            self._components[value - 1].add(mask.cpu().numpy())
        self._add_surface(label, entropy)

    def finished(self, *, grid_shape: Sequence[int], windows: int, descriptor: Tensor) -> ScanFacts:
        if self._last is not None:
            _, entropy, touched = self._last
            self._count_surface(entropy, touched)
        length = float(descriptor.norm())
        unit = descriptor / length if length > 0 else descriptor
        surface = self._counts["surface"]
        return ScanFacts(
            voxels=math.prod(grid_shape),
            windows=windows,
            windows_embedded=self.windows_embedded,
            threshold_nats=self.threshold_nats,
            doubtful=self._counts["doubtful"],
            matched=self._counts["matched"],
            disagreeing=self._counts["disagreeing"],
            surface_voxels=surface,
            surface_entropy=round(self._surface_entropy / surface / self._log_classes, 6) if surface else 0.0,
            class_voxels=[int(n) for n in self._hard[1:]],
            expected_dice=self._expected_dice(),
            components=[c.count for c in self._components],
            largest_share=[round(c.largest_share, 6) for c in self._components],
            descriptor=[round(float(value), 4) for value in unit],
        )

    def _expected_dice(self) -> list[float | None]:
        """Less than a voxel in prediction and expectation together: the class is taken to be absent, not missed."""
        total = self._soft + self._hard
        return [
            round(float(2 * self._overlap[c] / total[c]), 6) if total[c] >= 1 else None for c in range(1, len(total))
        ]

    def _add_surface(self, label: Tensor, entropy: Tensor) -> None:
        """Mark voxels with a face neighbour of another class; a slab's last plane waits for its neighbour above."""
        held = self._last
        if held is not None:
            label, entropy = torch.cat([held[0], label]), torch.cat([held[1], entropy])
        touched = torch.zeros_like(label, dtype=torch.bool)
        if held is not None:
            touched[:1] |= held[2]
        for axis in range(3):
            if label.shape[axis] < 2:
                continue
            size = label.shape[axis] - 1
            differs = label.narrow(axis, 0, size) != label.narrow(axis, 1, size)
            touched.narrow(axis, 0, size).logical_or_(differs)
            touched.narrow(axis, 1, size).logical_or_(differs)
        self._count_surface(entropy[:-1], touched[:-1])
        self._last = label[-1:].clone(), entropy[-1:].clone(), touched[-1:].clone()

    def _count_surface(self, entropy: Tensor, touched: Tensor) -> None:
        self._counts["surface"] += int(touched.sum())
        self._surface_entropy += float(entropy[touched].sum(dtype=torch.float64))
