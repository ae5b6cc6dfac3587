"""Connected components of a mask that comes slab by slab: how many, the largest, and which voxels are its.

A component is kept while it reaches the newest plane; one that has ended is counted and, unless it is the largest so
far, forgotten, so that memory is a plane's and not the volume's, however many pieces a mask is in. What is kept of the
largest are its *starts*: the pieces of it, numbered in array order, that touch nothing of the slab before theirs. From
them a second reading of the same slabs knows it again. Two starts never touch, so a class has at most one in eight
voxels, which takes single voxels that only the last plane connects.

Voxels that share a face, edge or corner are connected, as in `evaluation.metrics.largest_component`, and of equally
large components the one met first in array order is the largest, as there.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3))  # voxels that share a face, edge or corner are one component, as in evaluation

Mask = npt.NDArray[np.bool_]
Box = tuple[slice, slice]


@dataclass(eq=False)
class _Piece:
    """A component so far. `into`: the one that it turned out to be a part of."""

    size: int
    first: int  # the least of its starts
    starts: array[int] = field(default_factory=lambda: array("q"))
    into: _Piece | None = None

    def larger_than(self, other: _Piece | None) -> bool:
        return other is None or (self.size, -self.first) > (other.size, -other.first)


class Components:
    """Of one mask."""

    def __init__(self) -> None:
        self._voxels = 0
        self._ended = 0
        self._largest: _Piece | None = None  # of those that have ended
        self._started = 0
        self._top: npt.NDArray[np.int32] | None = None  # [Y, X] of the newest plane, 1 + the place in `_live`, or 0
        self._box: Box | None = None  # where `_top` is not 0
        self._live: list[_Piece] = []

    def add(self, mask: Mask) -> None:
        """The next planes [n, Y, X], n >= 1."""
        box = _joined(self._box, _box_of(np.asarray(mask.any(0), np.bool_)))
        if self._top is None:
            self._top = np.zeros(mask.shape[1:], np.int32)
        if box is None:
            return
        top = self._top[box]
        numbers, count = ndimage.label(mask[:, *box], structure=TOUCHING)
        sizes = np.bincount(numbers.ravel(), minlength=count + 1)
        self._voxels += int(sizes[1:].sum())
        of_number = self._gone_on(_touching_pairs(top, numbers[0]), sizes)
        reaching = np.zeros(count + 1, bool)
        reaching[numbers[-1]] = True
        of_number |= self._begun(of_number, sizes, reaching)
        before, self._live = self._live, []
        places = np.zeros(count + 1, np.int32)
        place_of: dict[_Piece, int] = {}
        for number in np.flatnonzero(reaching[1:]) + 1:
            piece = _root(of_number[int(number)])
            if piece not in place_of:
                self._live.append(piece)
                place_of[piece] = len(self._live)
            places[number] = place_of[piece]
        for piece in {_root(piece): None for piece in before}:
            if piece not in place_of:
                self._end(piece)
        top[...] = places[numbers[-1]]
        self._box = _box_of(mask[-1])

    @property
    def count(self) -> int:
        return self._ended + len(self._live)

    @property
    def largest_share(self) -> float:
        """Of the mask's voxels, in its largest component; 0 for an empty mask."""
        largest = self._found()
        return 0.0 if largest is None else largest.size / self._voxels

    @property
    def largest_starts(self) -> npt.NDArray[np.int64]:
        """Numbers of the starts of the largest component, ascending."""
        largest = self._found()
        return np.sort(np.asarray(() if largest is None else largest.starts, np.int64))

    def _gone_on(self, pairs: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> dict[int, _Piece]:
        """The pieces that numbers of the slab continue; they grow, and those that meet become one."""
        of_number: dict[int, _Piece] = {}
        for below, number in pairs.tolist():
            piece = _root(self._live[below - 1])
            if number not in of_number:
                of_number[number] = piece
                piece.size += int(sizes[number])
            else:
                _join(piece, _root(of_number[number]))
        return of_number

    def _begun(self, of_number: dict[int, _Piece], sizes: npt.NDArray[np.int64], reaching: Mask) -> dict[int, _Piece]:
        """The pieces that start in the slab and reach its last plane; those that end in it too are counted here."""
        starts = np.ones(len(sizes), bool)
        starts[[0, *of_number]] = False
        order = self._started + np.cumsum(starts) - 1  # of a number that starts, its start's
        self._started += int(starts.sum())
        inside = np.flatnonzero(starts & ~reaching)
        if len(inside):
            best = int(inside[sizes[inside].argmax()])
            self._end(_piece(int(sizes[best]), int(order[best])))
            self._ended += len(inside) - 1
        return {int(n): _piece(int(sizes[n]), int(order[n])) for n in np.flatnonzero(starts & reaching)}

    def _end(self, piece: _Piece) -> None:
        self._ended += 1
        if piece.larger_than(self._largest):
            self._largest = piece

    def _found(self) -> _Piece | None:
        largest = self._largest
        for piece in self._live:
            if piece.larger_than(largest):
                largest = piece
        return largest


class LargestAgain:
    """A second reading of what `Components` was given, in the same slabs: which voxels are the largest component's."""

    def __init__(self, components: Components) -> None:
        self._wanted = components.largest_starts
        self._started = 0
        self._below: tuple[Mask, Mask] | None = None  # [Y, X] of the newest plane: mask, the largest component's part
        self._box: Box | None = None

    def take(self, mask: Mask) -> Mask:
        """Of the next planes [n, Y, X] the voxels of the largest component."""
        largest = np.zeros(mask.shape, bool)
        box = _joined(self._box, _box_of(np.asarray(mask.any(0), np.bool_)))
        if box is not None:
            numbers, count = ndimage.label(mask[:, *box], structure=TOUCHING)
            going_on, chosen = np.zeros(count + 1, bool), np.zeros(count + 1, bool)
            if self._below is not None:
                for below, found in zip(self._below, (going_on, chosen), strict=True):
                    near = ndimage.binary_dilation(below[box], structure=TOUCHING[0])
                    found[numbers[0][near]] = True
            starts = np.flatnonzero(~going_on[1:]) + 1
            first, self._started = self._started, self._started + len(starts)
            low, high = np.searchsorted(self._wanted, (first, self._started))
            chosen[starts[self._wanted[low:high] - first]] = True
            chosen[0] = False
            largest[:, *box] = chosen[numbers]
        self._below, self._box = (mask[-1].copy(), largest[-1].copy()), _box_of(mask[-1])
        return largest


def _piece(size: int, start: int) -> _Piece:
    return _Piece(size, start, array("q", (start,)))


def _root(piece: _Piece) -> _Piece:
    while piece.into is not None:
        if piece.into.into is not None:
            piece.into = piece.into.into
        piece = piece.into
    return piece


def _join(a: _Piece, b: _Piece) -> None:
    if a is b:
        return
    if len(a.starts) < len(b.starts):
        a, b = b, a
    a.size, a.first, b.into = a.size + b.size, min(a.first, b.first), a
    a.starts.extend(b.starts)
    b.starts = array("q")


def _box_of(plane: Mask) -> Box | None:
    """The smallest box that holds what is true of a plane [Y, X]."""
    rows, columns = np.flatnonzero(plane.any(1)), np.flatnonzero(plane.any(0))
    return (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if len(rows) else None


def _joined(a: Box | None, b: Box | None) -> Box | None:
    if a is None or b is None:
        return a or b
    (a_y, a_x), (b_y, b_x) = a, b
    return (
        slice(min(a_y.start, b_y.start), max(a_y.stop, b_y.stop)),
        slice(min(a_x.start, b_x.start), max(a_x.stop, b_x.stop)),
    )


def _touching_pairs(below: npt.NDArray[np.int32], above: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Pairs [n, 2] of numbers of two neighbouring planes [Y, X] that share a face, edge or corner."""
    pairs = []
    padded = np.pad(below, 1)
    rows, columns = above.shape
    for dy in range(3):
        for dx in range(3):
            shifted = padded[dy : dy + rows, dx : dx + columns]
            both = (shifted > 0) & (above > 0)
            pairs.append(shifted[both].astype(np.int64) << 32 | above[both])
    joined = np.unique(np.concatenate(pairs))
    return np.stack([joined >> 32, joined & 0xFFFFFFFF], axis=1)
