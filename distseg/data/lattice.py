"""Labelled patches as the unit of annotation: a fixed, seeded list of disjoint ones (`data.labeled_patches`).

The patches that exist are those of a lattice over each labelled scan's body. In the list the scans take turns, each
with its own seeded order, so that a shorter list is the beginning of a longer one over the same scans. What lies
outside the listed patches is unlabelled: neither training nor the intensity statistics look at it. Axes Z, Y, X.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from distseg.data.keys import Purpose, generator
from distseg.data.patches import PatchReader
from distseg.errors import ConfigError

IntArray = npt.NDArray[np.int32]
Start = tuple[int, int, int]
Place = tuple[str, Start]  # scan id, first voxel on the run's grid


def patch_lattice(body: IntArray, size: Sequence[int]) -> list[Start]:
    """First voxels of the disjoint boxes of `size` that cover the box around `body` [n, 3], its middle in theirs, but
    for boxes without a voxel of it. In order."""
    low, high = body.min(0), body.max(0) + 1
    counts = -(-(high - low) // np.asarray(size))
    first = low - (counts * size - (high - low)) // 2
    occupied = np.unique((body - first) // size, axis=0)
    return [(z, y, x) for z, y, x in (first + occupied * size).tolist()]


def choose_patches(
    reader: PatchReader, scan_ids: Sequence[str], *, size: Sequence[int], count: int, seed: int
) -> tuple[Place, ...]:
    """The first `count` patches of the seeded list. Raises ConfigError where fewer exist."""
    listed = []
    for scan_id in scan_ids:
        key = zlib.crc32(scan_id.encode())  # not the scan's number: other scans do not change its order
        random = generator(seed, Purpose.LABELLED_PATCHES, key)
        turn = random.random()
        starts = patch_lattice(reader.placement(scan_id).body, size)
        listed += [(rank, turn, scan_id, starts[i]) for rank, i in enumerate(random.permutation(len(starts)))]
    if count > len(listed):
        raise ConfigError(
            "more labelled patches asked for than there are",
            where="data.labeled_patches",
            value=count,
            rule=f"{len(scan_ids)} labelled scans hold {len(listed)} patches of {'x'.join(map(str, size))} voxels",
            fix=f"set data.labeled_patches={len(listed)} or less, or take more labelled scans",
        )
    return tuple((scan_id, start) for _, _, scan_id, start in sorted(listed)[:count])


def inside(voxels: IntArray, starts: Sequence[Start], size: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which of `voxels` [n, 3] lie in one of the boxes, bool [n]."""
    found = np.zeros(len(voxels), np.bool_)
    for start in starts:
        found |= ((voxels >= start) & (voxels < np.asarray(start) + size)).all(1)
    return found


class LabelledPatches:
    """Draws from the listed patches as a sampler does from whole scans: some for foreground, the rest evenly."""

    def __init__(self, reader: PatchReader, places: Sequence[Place], size: Sequence[int]) -> None:
        self._places = tuple(places)
        self._holding: dict[str, list[Place]] = {}  # by class
        for scan_id, start in self._places:
            for name, voxels in reader.placement(scan_id).foreground.items():
                if inside(voxels, [start], size).any():
                    self._holding.setdefault(name, []).append((scan_id, start))

    def draw(self, rng: np.random.Generator, *, foreground_share: float) -> Place:
        """With that probability one that holds a class, drawn evenly; otherwise any."""
        names = sorted(self._holding)
        choice: Sequence[Place] = self._places
        if rng.random() < foreground_share and names:
            choice = self._holding[names[int(rng.integers(len(names)))]]
        return choice[int(rng.integers(len(choice)))]

    def with_foreground(self, scan_id: str, rng: np.random.Generator) -> Place | None:
        """One of this scan's that holds foreground, evenly; None if none does."""
        found = sorted({place for places in self._holding.values() for place in places if place[0] == scan_id})
        return found[int(rng.integers(len(found)))] if found else None
