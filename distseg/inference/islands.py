"""Connected components of volumes that are looked at slab by slab, and the filter that keeps a class's largest one.

Voxels touch by face, edge or corner. Memory is a slab's, and a few numbers a component.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3), np.uint8)
PLANES = 16  # of a slab

BoolArray = npt.NDArray[np.bool_]


class SlabComponents:
    """Components of a mask that comes slab by slab: sizes are kept per piece, pieces joined where slabs meet."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._top: npt.NDArray[np.int32] | None = None  # [Y, X] piece numbers + 1 of the newest plane, 0 outside

    def add(self, mask: BoolArray) -> None:
        """The next planes [n, Y, X]. Pieces are numbered in the order in which they are met."""
        if not mask.any():
            self._top = None
            return
        numbers, count = ndimage.label(mask, structure=TOUCHING)
        offset = len(self._parent)
        self._parent += range(offset, offset + count)
        self._size += np.bincount(numbers.ravel(), minlength=count + 1)[1:].tolist()
        numbers[numbers > 0] += offset
        if self._top is not None:
            for below, above in _touching_pairs(self._top, numbers[0]):
                self._join(below - 1, above - 1)
        self._top = numbers[-1].copy()

    @property
    def count(self) -> int:
        return sum(parent == i for i, parent in enumerate(self._parent))

    @property
    def largest_share(self) -> float:
        sizes = [size for i, size in enumerate(self._size) if self._parent[i] == i]
        return max(sizes) / sum(sizes) if sizes else 0.0

    def in_largest(self) -> BoolArray:
        """[pieces]: which belong to the largest component, of equally large ones the one met first."""
        roots = [self._root(i) for i in range(len(self._parent))]
        largest = max(roots, key=lambda root: self._size[root], default=0)  # the first of the maxima
        return np.asarray([root == largest for root in roots], np.bool_)

    def _join(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self._parent[b] = a
            self._size[a] += self._size[b]

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = i = self._parent[self._parent[i]]
        return i


def remove_islands(mask: npt.NDArray[np.uint8], *, values: Sequence[int]) -> Iterator[BoolArray]:
    """Set to 0 in place what does not belong to the largest component of each class in `values`; other classes stay.
    Yields what was removed, [n, Y, X], slab by slab.

    As `distseg.evaluation.metrics.largest_components`, without an array of the volume's size.
    """
    slabs = [mask[first : first + PLANES] for first in range(0, len(mask), PLANES)]
    kept, seen = {}, dict.fromkeys(values, 0)
    for value in values:
        components = SlabComponents()
        for slab in slabs:
            components.add(slab == value)
        kept[value] = np.insert(components.in_largest(), 0, True)  # by number: 0 is another class
    for slab in slabs:
        removed = np.zeros(slab.shape, np.bool_)
        for value in values:
            numbers, count = ndimage.label(slab == value, structure=TOUCHING)
            numbers[numbers > 0] += seen[value]
            removed |= ~kept[value][numbers]
            seen[value] += count
        slab[removed] = 0
        yield removed


def _touching_pairs(below: npt.NDArray[np.int32], above: npt.NDArray[np.int32]) -> set[tuple[int, int]]:
    """Pairs of numbers of two neighbouring planes [Y, X] that share a face, edge or corner."""
    pairs: set[tuple[int, int]] = set()
    padded = np.pad(below, 1)
    rows, columns = above.shape
    for dy in range(3):
        for dx in range(3):
            shifted = padded[dy : dy + rows, dx : dx + columns]
            both = (shifted > 0) & (above > 0)
            pairs.update(zip(shifted[both].tolist(), above[both].tolist(), strict=True))
    return pairs
