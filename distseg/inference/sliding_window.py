"""Segment a whole scan with overlapping Gaussian-weighted windows, holding only the planes one row of windows covers.

Legend: K classes, B windows of a batch, Z Y X voxels; p the window's size, so [K, pZ, Y, X] is the largest array held.
Three grids share the corner of their first voxel: *source* (the image as stored), *run* (the network's spacing) and
*output* (where the mask is wanted, by default the source's). Windows advance along Z on the run grid. As soon as no
later window reaches a plane it is normalised, interpolated to the output grid, reduced to its argmax and dropped.

Windows stand on a product grid and their weight is a product of three 1-D profiles, so the sum of weights is one too:
the normaliser is three vectors, not a volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distseg.data.volume import SAME_GRID_VOXELS, Geometry, resample_box, shape3, spacing3, target_geometry
from distseg.errors import InputError

Predictor = Callable[[Tensor], Tensor]  # [B, 1, pZ, pY, pX] float32 -> logits [B, K, pZ, pY, pX]
Normaliser = Callable[[np.ndarray], np.ndarray]

SIGMA_SHARE = 0.125  # of the window's size: the importance map of nnU-Net and MONAI
WEIGHT_FLOOR = 1e-3  # per axis; keeps corners that only one window covers away from 0/0


def segment(
    image: Any,
    *,
    source_spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    patch_zyx: Sequence[int],
    overlap: float,
    normalise: Normaliser,
    fill: float,
    predict: Mapping[str, Predictor],
    num_classes: int,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    output_shape: Sequence[int] | None = None,
    output_spacing_mm: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """Masks uint8 [Z, Y, X] on the output grid, one per entry of `predict`; all networks share one reading.

    `image` is array-like [Z, Y, X] (zarr or numpy), read by region, every plane once. `normalise` maps raw intensities
    to the network's and must be pointwise; `fill` is the raw value outside the scan. `overlap` is the share of a window
    that its neighbour covers too. A window larger than the scan is centred on it and padded.
    """
    if not 1 <= num_classes <= 256:
        raise InputError("a mask is uint8", where="classes", value=num_classes, rule="from 1 to 256 classes")
    output_shape = tuple(int(n) for n in (output_shape or image.shape))
    source = Geometry(shape3(image.shape), spacing3(source_spacing_mm), np.eye(4))
    grid = _Grid.of(target_geometry(source, target_spacing_mm).shape, patch_zyx, overlap)
    slabs = _slabs(
        image,
        grid,
        source_spacing_mm=source_spacing_mm,
        target_spacing_mm=target_spacing_mm,
        normalise=normalise,
        fill=fill,
    )
    masks = {name: np.zeros(output_shape, np.uint8) for name in predict}
    writers = {
        name: _PlaneWriter(
            mask,
            run_shape=grid.shape,
            run_spacing_mm=target_spacing_mm,
            output_spacing_mm=output_spacing_mm or source_spacing_mm,
            device=device,
        )
        for name, mask in masks.items()
    }
    for first_plane, planes in finished_planes(
        slabs, grid, predict=predict, num_classes=num_classes, batch_size=batch_size, device=device
    ):
        for name, probabilities in planes.items():
            writers[name].add(first_plane, probabilities)
    return masks


@dataclass(frozen=True)
class _Grid:
    """Windows on the run grid. `starts` may be negative: then the window is larger than the scan."""

    shape: tuple[int, ...]
    patch: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]  # per axis, ascending

    @classmethod
    def of(cls, shape: Sequence[int], patch_zyx: Sequence[int], overlap: float) -> _Grid:
        starts = tuple(window_starts(n, p, overlap) for n, p in zip(shape, patch_zyx, strict=True))
        return cls(tuple(shape), tuple(int(p) for p in patch_zyx), starts)

    @property
    def padded_yx(self) -> tuple[int, int]:
        """Size of the plane that the windows cover: the scan's, or the window's where that is larger."""
        y, x = (max(n, p) for n, p in zip(self.shape[1:], self.patch[1:], strict=True))
        return y, x

    def weight_sum(self, axis: int) -> np.ndarray:
        """[n] sum over the axis' windows of their profile at each voxel of the scan."""
        n, p = self.shape[axis], self.patch[axis]
        total = np.zeros(max(n, p))
        first = self.starts[axis][0]
        for start in self.starts[axis]:
            total[start - first : start - first + p] += gaussian_profile(p)
        return total[-first : n - first]


def window_starts(size: int, patch: int, overlap: float) -> tuple[int, ...]:
    """First voxels of the windows along one axis: every patch (1 - overlap) voxels, the last one flush with the end."""
    if size <= patch:
        return (-((patch - size) // 2),)
    step = max(1, int(patch * (1 - overlap)))
    return (*range(0, size - patch, step), size - patch)


def gaussian_profile(patch: int) -> np.ndarray:
    """[patch] float64 weight of a window along one axis, 1 at its centre, at least `WEIGHT_FLOOR`."""
    distance = np.arange(patch) - (patch - 1) / 2
    weight: np.ndarray = np.maximum(np.exp(-0.5 * (distance / (SIGMA_SHARE * patch)) ** 2), WEIGHT_FLOOR)
    return weight


def _slabs(
    image: Any,
    grid: _Grid,
    *,
    source_spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    normalise: Normaliser,
    fill: float,
) -> Iterator[Tensor]:
    """Per row of windows the normalised image [pZ, Y, X] (padded_yx); planes of the row before are kept, not reread."""
    depth = grid.patch[0]
    slab = torch.empty(depth, *grid.padded_yx)
    previous_end: int | None = None
    for start in grid.starts[0]:
        kept = 0 if previous_end is None else previous_end - start
        if kept:
            slab[:kept] = slab[depth - kept :].clone()
        box = resample_box(
            image,
            source_spacing_mm=source_spacing_mm,
            target_spacing_mm=target_spacing_mm,
            start_zyx=(start + kept, grid.starts[1][0], grid.starts[2][0]),
            size_zyx=(depth - kept, *grid.padded_yx),
            order=1,
            fill=fill,
        )
        slab[kept:] = torch.from_numpy(np.ascontiguousarray(normalise(box), dtype=np.float32))
        previous_end = start + depth
        yield slab


@torch.inference_mode()
def finished_planes(
    slabs: Iterator[Tensor],
    grid: _Grid,
    *,
    predict: Mapping[str, Predictor],
    num_classes: int,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (first plane, {network: class probabilities [K, planes, Y, X]}) in ascending, gapless order.

    The tensors are views of buffers that the next iteration overwrites. Predictors are pure functions of a window: one
    that holds a single value (air, clipped) is predicted once per value. Class probabilities are averaged, not logits:
    what one window is sure of cannot be outvoted by another's scale.
    """
    depth, height, width = grid.patch
    top, left = grid.starts[1][0], grid.starts[2][0]
    corners = [(y - top, x - left) for y, x in product(grid.starts[1], grid.starts[2])]
    weight = _outer([gaussian_profile(p) for p in grid.patch], device)  # [pZ, pY, pX]
    inverse_yx = 1 / _outer([grid.weight_sum(1), grid.weight_sum(2)], device)  # [Y, X]
    inverse_z = (1 / torch.as_tensor(grid.weight_sum(0), dtype=torch.float32, device=device))[
        :, None, None
    ]  # [Z, 1, 1]
    sums = {name: torch.zeros(num_classes, depth, *grid.padded_yx, device=device) for name in predict}
    inner_y, inner_x = slice(-top, grid.shape[1] - top), slice(-left, grid.shape[2] - left)
    blank: dict[str, tuple[float, Tensor]] = {}
    for row, (start, slab) in enumerate(zip(grid.starts[0], slabs, strict=True)):
        windows = [slab[:, y : y + height, x : x + width] for y, x in corners]
        for name, network in predict.items():
            for at, probabilities in _predict_row(windows, network, name, blank, batch_size=batch_size, device=device):
                y, x = corners[at]
                sums[name][:, :, y : y + height, x : x + width] += probabilities * weight
        last = row + 1 == len(grid.starts[0])
        stop = grid.shape[0] if last else grid.starts[0][row + 1]
        begin = max(start, 0)
        scale = inverse_z[begin:stop] * inverse_yx  # [planes, Y, X]
        yield (
            begin,
            {
                name: total[:, begin - start : stop - start, inner_y, inner_x].mul_(scale)
                for name, total in sums.items()
            },
        )
        if not last:
            for total in sums.values():
                _advance(total, stop - start)


def _predict_row(
    windows: Sequence[Tensor],
    network: Predictor,
    name: str,
    blank: dict[str, tuple[float, Tensor]],
    *,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, class probabilities [K, pZ, pY, pX]) of each window. `blank` keeps a network's last blank one."""
    varied = []
    for i, window in enumerate(windows):
        low, high = (float(bound) for bound in window.aminmax())
        if low != high:
            varied.append(i)
            continue
        if name not in blank or blank[name][0] != low:
            blank[name] = low, torch.softmax(network(window[None, None].to(device)).float(), dim=1)[0]
        yield i, blank[name][1]
    for first in range(0, len(varied), batch_size):
        batch = varied[first : first + batch_size]
        logits = network(torch.stack([windows[i] for i in batch])[:, None].to(device))
        yield from zip(batch, torch.softmax(logits.float(), dim=1), strict=True)


def _advance(total: Tensor, planes: int) -> None:
    """Drop the first planes of [K, pZ, Y, X] in place; the planes that enter are zero."""
    kept = total.shape[1] - planes
    for plane in range(kept):  # plane by plane: a copy of the whole buffer would double the peak
        total[:, plane] = total[:, plane + planes]
    total[:, kept:] = 0


def _outer(profiles: Sequence[np.ndarray], device: torch.device | str) -> Tensor:
    """Product of 1-D profiles as a float32 array with one axis each."""
    total = torch.ones(())
    for profile in profiles:
        total = total[..., None] * torch.as_tensor(profile, dtype=torch.float32)
    return total.to(device)


class _PlaneWriter:
    """Takes run-grid planes in ascending order and writes each output plane once both its neighbours are there."""

    def __init__(
        self,
        mask: np.ndarray,
        *,
        run_shape: Sequence[int],
        run_spacing_mm: Sequence[float],
        output_spacing_mm: Sequence[float],
        device: torch.device | str,
    ) -> None:
        self._mask = mask
        axes = zip(mask.shape, run_shape, output_spacing_mm, run_spacing_mm, strict=True)
        self._z, self._y, self._x = (_Linear.of(*axis, device=device) for axis in axes)
        self._next = 0  # output plane to write
        self._last_plane: Tensor | None = None  # [K, Y, X] the newest run-grid plane, a neighbour of planes to come

    def add(self, first_plane: int, probabilities: Tensor) -> None:
        """`probabilities` [K, planes, Y, X] follow directly on what was added before."""
        if self._z.same and self._y.same and self._x.same:
            stop = first_plane + probabilities.shape[1]
            self._mask[first_plane:stop] = probabilities.argmax(0).to(torch.uint8).cpu().numpy()
            return
        while self._next < len(self._mask):
            low, high = int(self._z.low[self._next]), int(self._z.high[self._next])
            if high >= first_plane + probabilities.shape[1]:
                break
            weight = float(self._z.weight[self._next])
            plane = self._plane(low, first_plane, probabilities)
            if weight:
                plane = torch.lerp(plane, self._plane(high, first_plane, probabilities), weight)
            plane = self._x.apply(self._y.apply(plane, dim=1), dim=2)
            self._mask[self._next] = plane.argmax(0).to(torch.uint8).cpu().numpy()
            self._next += 1
        self._last_plane = probabilities[:, -1].clone()

    def _plane(self, index: int, first_plane: int, probabilities: Tensor) -> Tensor:
        if index < first_plane:
            assert index == first_plane - 1
            assert self._last_plane is not None
            return self._last_plane
        return probabilities[:, index - first_plane]


@dataclass(frozen=True)
class _Linear:
    """Linear interpolation along one axis: out[i] = (1 - weight[i]) in[low[i]] + weight[i] in[high[i]]."""

    low: Tensor  # int64 [n]
    high: Tensor  # int64 [n]
    weight: Tensor  # float32 [n]
    same: bool  # input and output are one grid

    @classmethod
    def of(
        cls, size: int, run_size: int, spacing_mm: float, run_spacing_mm: float, *, device: torch.device | str
    ) -> _Linear:
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

    def apply(self, planes: Tensor, *, dim: int) -> Tensor:
        """Interpolate [K, Y, X] along `dim`."""
        if self.same:
            return planes
        shape = [1] * planes.ndim
        shape[dim] = -1
        return torch.lerp(
            planes.index_select(dim, self.low), planes.index_select(dim, self.high), self.weight.view(shape)
        )
