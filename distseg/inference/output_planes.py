"""From planes of the run grid, as they come, to planes of the output grid: linear and nearest interpolation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distseg.data.volume import SAME_GRID_VOXELS


class OutputPlanes:
    """Takes run-grid planes in ascending order and gives each output plane once both its neighbours are there.

    Both grids share the corner of their first voxel. Beside one plane a call is given, it keeps the newest alone.
    """

    def __init__(
        self,
        *,
        run_shape: Sequence[int],
        run_spacing_mm: Sequence[float],
        output_shape: Sequence[int],
        output_spacing_mm: Sequence[float],
        device: torch.device | str,
    ) -> None:
        axes = zip(output_shape, run_shape, output_spacing_mm, run_spacing_mm, strict=True)
        self._z, self._y, self._x = (_Axis.of(*axis, device=device) for axis in axes)
        self._planes = int(output_shape[0])
        self._next = 0  # output plane to give
        self._newest: tuple[Tensor, Tensor | None] | None = None  # run-grid plane, a neighbour of planes to come

    def add(
        self, first_plane: int, linear: Tensor, nearest: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """`linear` [C, n, Y, X] and `nearest` [n, Y, X] follow directly on what was added before. Yields (output plane,
        [C, Y', X'], [Y', X']). Must be exhausted before the tensors change."""
        if self._z.same and self._y.same and self._x.same:
            for i in range(linear.shape[1]):
                yield first_plane + i, linear[:, i], None if nearest is None else nearest[i]
            return
        while self._next < self._planes:
            low, high = int(self._z.low[self._next]), int(self._z.high[self._next])
            if high >= first_plane + linear.shape[1]:
                break
            weight = float(self._z.weight[self._next])
            plane, codes = self._plane(low, first_plane, linear, nearest)
            if weight:
                above, codes_above = self._plane(high, first_plane, linear, nearest)
                plane = torch.lerp(plane, above, weight)
                codes = codes if weight < 0.5 else codes_above
            plane = self._x.linear(self._y.linear(plane, dim=1), dim=2)
            if codes is not None:
                codes = self._x.nearest(self._y.nearest(codes, dim=0), dim=1)
            yield self._next, plane, codes
            self._next += 1
        self._newest = linear[:, -1].clone(), None if nearest is None else nearest[-1].clone()

    def _plane(
        self, index: int, first_plane: int, linear: Tensor, nearest: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if index < first_plane:
            assert index == first_plane - 1
            assert self._newest is not None
            return self._newest
        at = index - first_plane
        return linear[:, at], None if nearest is None else nearest[at]


@dataclass(frozen=True)
class _Axis:
    """Interpolation along one axis: out[i] = (1 - weight[i]) in[low[i]] + weight[i] in[high[i]]."""

    low: Tensor  # int64 [n]
    high: Tensor  # int64 [n]
    weight: Tensor  # float32 [n]
    same: bool  # input and output are one grid

    @classmethod
    def of(
        cls, size: int, run_size: int, spacing_mm: float, run_spacing_mm: float, *, device: torch.device | str
    ) -> _Axis:
        """Output voxel i lies at (i + 1/2) spacing / run_spacing - 1/2 of the run grid, clamped to its extent."""
        ratio = spacing_mm / run_spacing_mm
        same = size == run_size and abs(ratio - 1) * size < SAME_GRID_VOXELS  # the rule of data.volume
        at = np.arange(size, dtype=np.float64)
        if not same:
            at = np.clip((at + 0.5) * ratio - 0.5, 0, run_size - 1)
        low = np.floor(at).astype(np.int64)
        high = np.minimum(low + 1, run_size - 1)
        weight = torch.as_tensor(at - low, dtype=torch.float32, device=device)
        return cls(torch.as_tensor(low, device=device), torch.as_tensor(high, device=device), weight, same)

    def linear(self, plane: Tensor, *, dim: int) -> Tensor:
        """Interpolate [C, Y, X] along `dim`."""
        if self.same:
            return plane
        shape = [1] * plane.ndim
        shape[dim] = -1
        low, high = plane.index_select(dim, self.low), plane.index_select(dim, self.high)
        return torch.lerp(low, high, self.weight.view(shape))

    def nearest(self, plane: Tensor, *, dim: int) -> Tensor:
        """The nearer neighbour of [Y, X] along `dim`; halfway, the higher."""
        if self.same:
            return plane
        return plane.index_select(dim, torch.where(self.weight < 0.5, self.low, self.high))
