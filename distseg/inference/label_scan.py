"""Pseudo-label one scan, row of windows by row: the teacher where it is sure, matching where it is not.

The M passes of overlapping windows are blended into mean probabilities and an entropy (Xie et al. 2024, Eq 2) on the
run's grid. Voxels under the threshold take the argmax; all others take the class whose references the teacher's
deterministic embedding is most similar to, embedded in the window that the voxel is most central in, since blended
embeddings are nobody's. Then, as in `sliding_window`, probabilities go to the output grid linearly and the largest
wins; where matching disagrees with the teacher the two classes have swapped theirs.

Memory, float32, whatever the scan's depth: (K + 1) planes of the sums and one of the image for at most 2 pZ planes
[Y, X] of the run's grid, some temporary copies of pZ / 2 planes, and the network's own for one batch of windows.

Shapes: K classes, E embedding width, N queries, Z Y X voxels; p the window's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distseg.data.label_output import CODE_STEP, CONFIDENCE_STEPS
from distseg.inference.output_planes import OutputPlanes
from distseg.inference.rolling import Rolling
from distseg.inference.scan_facts import FactsOfPlanes, ScanFacts
from distseg.inference.sliding_window import Normaliser, ahead, read_box, read_rows, run_grid
from distseg.inference.teacher_passes import PassSettings, TeacherPasses
from distseg.inference.windows import WindowGrid
from distseg.matching.bank import Matcher
from distseg.networks.unet import UNet3D

QUERIES_A_CALL = 16_384
TIE_BREAK = 1e-6  # by which a class that matching chose leads one of the very same share
SURVEY_WINDOWS = 32  # whose entropies give a scan's quantile

Plane = npt.NDArray[np.uint8]
Sink = Callable[[int, Plane, Plane], None]  # output plane's number, mask [Y, X], trust [Y, X]; in ascending order


class Code(IntEnum):
    """How a voxel got its label; the trust map holds 64 x code + confidence."""

    RELIABLE = 0
    MATCHED = 1
    REJECTED = 2  # doubtful and not matched, takes the argmax: the matcher rejected it, or there is none
    # A voxel outside the largest component of a class of one piece takes background, and NO_LABEL: this code, at 0.


@dataclass(frozen=True)
class LabelRule:
    """`threshold_nats`: entropy from which a voxel is doubtful. `quantile`: instead of it, that quantile of the scan's
    own entropies. `min_similarity`: a voxel less similar than this to every class is not matched; None: all are.
    `keep_largest`: classes of which the mask keeps the largest component alone."""

    passes: PassSettings
    threshold_nats: float
    quantile: float | None = None
    min_similarity: float | None = None
    seed: int = 0
    keep_largest: tuple[int, ...] = ()


class Grids(NamedTuple):
    """Spacings Z Y X of the image as stored, the network's and the output's, and the output's shape."""

    source_spacing_mm: Sequence[float]
    run_spacing_mm: Sequence[float]
    output_spacing_mm: Sequence[float]
    output_shape: Sequence[int]


@torch.inference_mode()
def label_scan(
    image: Any,
    *,
    scan_id: str,
    teacher: UNet3D,
    matcher: Matcher | None,
    rule: LabelRule,
    grids: Grids,
    patch_zyx: Sequence[int],
    overlap: float,
    normalise: Normaliser,
    fill: float,
    num_classes: int,
    batch_size: int,
    device: torch.device,
    sink: Sink,
) -> ScanFacts:
    """Hand the scan's mask and trust map to `sink`, plane by plane of the output grid; returns what was counted.

    `image`, `normalise` and `fill` as in `sliding_window.segment`. `scan_id` keys the random draws.
    """
    grid = run_grid(image.shape, grids.source_spacing_mm, grids.run_spacing_mm, patch_zyx=patch_zyx, overlap=overlap)
    reading: dict[str, Any] = {
        "source_spacing_mm": grids.source_spacing_mm,
        "target_spacing_mm": grids.run_spacing_mm,
        "normalise": normalise,
        "fill": fill,
    }
    count = len(grid.starts[0]) * len(grid.corners_yx)
    passes = TeacherPasses(
        teacher, rule.passes, scan_id=scan_id, seed=rule.seed, numbers=count, batch_size=batch_size, device=device
    )
    threshold = rule.threshold_nats
    if rule.quantile is not None:
        threshold = _surveyed_quantile(image, grid, passes, reading, quantile=rule.quantile, count=count)
    facts = FactsOfPlanes(num_classes, threshold_nats=threshold)
    output = OutputPlanes(
        run_shape=grid.shape,
        run_spacing_mm=grids.run_spacing_mm,
        output_shape=grids.output_shape,
        output_spacing_mm=grids.output_spacing_mm,
        device=device,
    )
    with closing(ahead(read_rows(image, grid, **reading))) as rows:
        labeller = _Labeller(grid, passes, matcher, rule, facts, num_classes=num_classes, device=device)
        for slab in labeller.slabs(rows):
            for at, plane, codes in output.add(slab.first_plane, slab.values, slab.codes):
                assert codes is not None
                sink(at, *_encoded(plane, codes))
    return facts.finished(grid_shape=grid.shape, windows=count, descriptor=passes.descriptor)


class _Slab(NamedTuple):
    first_plane: int
    values: Tensor  # float32 [K + 1, n, Y, X]: the classes' shares, then confidence 0..1
    codes: Tensor  # uint8 [n, Y, X]


def _encoded(plane: Tensor, codes: Tensor) -> tuple[Plane, Plane]:
    """[K + 1, Y, X] and [Y, X] -> mask and trust of one output plane."""
    mask = plane[:-1].argmax(0).to(torch.uint8)
    confidence = (plane[-1].clamp(0, 1) * CONFIDENCE_STEPS).round().to(torch.uint8)
    return mask.cpu().numpy(), (codes * CODE_STEP + confidence).cpu().numpy()


class _Labeller:
    """The rolling sums of one scan. A row's *cell* is the planes its windows are most central for; a cell is labelled
    as soon as no later window reaches it."""

    def __init__(
        self,
        grid: WindowGrid,
        passes: TeacherPasses,
        matcher: Matcher | None,
        rule: LabelRule,
        facts: FactsOfPlanes,
        *,
        num_classes: int,
        device: torch.device,
    ) -> None:
        self._grid, self._passes, self._matcher, self._rule, self._facts = grid, passes, matcher, rule, facts
        self._max_entropy, self._device = math.log(num_classes), device
        self._weight = grid.weight(device)
        self._inverse_z, self._inverse_yx = grid.inverse_weight_sum(device)
        self._cells = grid.cells(0)
        held, pictured = _capacities(grid, self._cells)
        first, size = grid.starts[0][0], grid.padded_yx
        self._sums = Rolling(num_classes + 1, held, size, first=first, device=device)
        self._image = Rolling(1, pictured, size, first=first, device="cpu")

    def slabs(self, rows: Iterable[Tensor]) -> Iterator[_Slab]:
        """One slab a cell, in ascending order."""
        grid, corners = self._grid, self._grid.corners_yx
        depth, height, width = grid.patch
        read, due = grid.starts[0][0], 0
        for row, (start, planes) in enumerate(zip(grid.starts[0], rows, strict=True)):
            self._image.between(read, read + len(planes))[0] = planes
            read += len(planes)
            sums = self._sums.between(start, start + depth)
            numbers = range(row * len(corners), (row + 1) * len(corners))
            for at, values in self._passes.over([self._window(row, i) for i in range(len(corners))], numbers):
                y, x = corners[at]
                sums[:, :, y : y + height, x : x + width] += values * self._weight
            final = _final(grid, row)
            while due < len(self._cells) and self._cells[due][1] <= final:
                yield self._labelled(due)
                due += 1
            if due < len(self._cells):
                self._sums.drop_below(self._cells[due][0])
                self._image.drop_below(grid.starts[0][due])

    def _window(self, row: int, number: int) -> Tensor:
        depth, height, width = self._grid.patch
        y, x = self._grid.corners_yx[number]
        start = self._grid.starts[0][row]
        return self._image.between(start, start + depth)[0, :, y : y + height, x : x + width]

    def _labelled(self, row: int) -> _Slab:
        """Label the cell of a row."""
        first, stop = self._cells[row]
        inner_y, inner_x = self._grid.inner_yx
        values = self._sums.between(first, stop)[:, :, inner_y, inner_x]
        values.mul_(self._inverse_z[first:stop] * self._inverse_yx)
        shares, entropy = values[:-1], values[-1].clamp_min_(0).clone()  # [K, n, Y, X], [n, Y, X]
        teacher = shares.argmax(0)
        doubtful = entropy >= self._facts.threshold_nats
        codes = doubtful.to(torch.uint8) * Code.REJECTED
        label, confidence = teacher, 1 - entropy / self._max_entropy
        if self._matcher is not None:
            label = teacher.clone()
            self._match(row, self._matcher, doubtful, label=label, confidence=confidence, codes=codes)
        self._facts.add(shares, entropy, label=label, teacher=teacher, codes=codes)
        values[-1] = confidence
        if label is not teacher:
            for plane in range(stop - first):
                at = torch.nonzero(label[plane] != teacher[plane]).unbind(1)
                _give_largest(shares[:, plane], at, was=teacher[plane][at], now=label[plane][at])
        return _Slab(first, values, codes)

    def _match(
        self, row: int, matcher: Matcher, doubtful: Tensor, *, label: Tensor, confidence: Tensor, codes: Tensor
    ) -> None:
        """Match the doubtful voxels of a row's cell [n, Y, X], a batch of windows at a time: where all are in doubt
        their indices would be many times the cell. Writes class, margin (the lead of the best class over the next, at
        most 1) and code of those that match."""
        boxes = [
            (number, (slice(None), slice(*y), slice(*x)))
            for number, (y, x) in enumerate(product(self._grid.cells(1), self._grid.cells(2)))
        ]
        wanted = [(number, box) for number, box in boxes if bool(doubtful[box].any())]
        for first in range(0, len(wanted), self._passes.batch_size):
            batch = wanted[first : first + self._passes.batch_size]
            embedded = self._passes.embeddings([self._window(row, number) for number, _ in batch])
            self._facts.windows_embedded += len(batch)
            for embeddings, (number, box) in zip(embedded, batch, strict=True):
                voxels = torch.nonzero(doubtful[box])  # [N, 3]
                for piece in torch.split(voxels, QUERIES_A_CALL):
                    z, y, x = (piece + self._inside(row, number, box).to(piece)).unbind(1)
                    queries = embeddings[:, z, y, x].T  # [N, E]
                    at, matched, margin = _best(matcher, queries, piece, self._rule.min_similarity)
                    at_zyx = at.unbind(1)
                    label[box][at_zyx], confidence[box][at_zyx] = matched, margin
                    codes[box][at_zyx] = int(Code.MATCHED)

    def _inside(self, row: int, number: int, box: tuple[slice, ...]) -> Tensor:
        """Where in its window `number` the first voxel lies of a box of the row's cell."""
        z, y, x = self._grid.starts
        columns = len(x)
        corner = (z[row] - self._cells[row][0], y[number // columns], x[number % columns])
        return torch.tensor([(part.start or 0) - at for part, at in zip(box, corner, strict=True)])


def _give_largest(shares: Tensor, at: tuple[Tensor, ...], *, was: Tensor, now: Tensor) -> None:
    """Swap two classes' shares [K, ...] at voxels `at`, so that class `now` [N] has what `was` [N], the largest,
    had. One-hot shares would decide what lies between voxels of the run's grid by voxels' corners."""
    changed = torch.nonzero(was != now).flatten()
    was, now, at = was[changed], now[changed], tuple(axis[changed] for axis in at)
    largest, smaller = shares[was, *at].clone(), shares[now, *at].clone()
    shares[was, *at] = smaller
    shares[now, *at] = largest * (1 + TIE_BREAK)


def _best(
    matcher: Matcher, queries: Tensor, voxels: Tensor, min_similarity: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    label, similarity = (found.to(queries.device) for found in matcher.match(queries.cpu()))  # [N], [N, K]
    own = similarity.gather(1, label[:, None])[:, 0]
    others = similarity.scatter(1, label[:, None], -torch.inf).amax(1)
    accepted = torch.ones_like(label, dtype=torch.bool)
    if min_similarity is not None:
        accepted = similarity.amax(1) >= min_similarity
    return voxels[accepted], label[accepted], (own - others).clamp(0, 1)[accepted]


def _final(grid: WindowGrid, row: int) -> int:
    """Planes below this one are reached by no window after `row`."""
    return grid.starts[0][row + 1] if row + 1 < len(grid.starts[0]) else grid.shape[0]


def _capacities(grid: WindowGrid, cells: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The most planes of sums and of the image that are held at once."""
    held = pictured = due = 0
    for row, start in enumerate(grid.starts[0]):
        low = grid.starts[0][0] if due == 0 else cells[due][0]
        held = max(held, start + grid.patch[0] - low)
        pictured = max(pictured, start + grid.patch[0] - grid.starts[0][due])
        while due < len(cells) and cells[due][1] <= _final(grid, row):
            due += 1
    return held, pictured


def _surveyed_quantile(
    image: Any, grid: WindowGrid, passes: TeacherPasses, reading: dict[str, Any], *, quantile: float, count: int
) -> float:
    """The quantile of the entropies of windows drawn from the scan, blank ones left out: all of them in a small scan.
    Infinite where every one is blank."""
    corners = list(product(*grid.starts))
    entropies = []
    for number in passes.drawn(count, SURVEY_WINDOWS):
        window = read_box(image, corners[number], grid.patch, **reading)
        if float(window.min()) != float(window.max()):
            ((_, values),) = passes.over([window], [count + 1 + number])
            entropies.append(values[-1].flatten())
    if not entropies:
        return math.inf
    pooled = torch.cat(entropies)
    rank = max(1, round(quantile * pooled.numel()))
    return float(pooled.kthvalue(rank).values)
