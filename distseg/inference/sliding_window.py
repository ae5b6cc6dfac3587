"""Segment a whole scan with overlapping Gaussian-weighted windows, holding only the planes one row of windows covers.

Legend: K classes, B windows of a batch, Z Y X voxels; p the window's size, so [K, pZ, Y, X] is the largest array held.
Three grids share the corner of their first voxel: *source* (the image as stored), *run* (the network's spacing) and
*output* (where the mask is wanted, by default the source's). Windows advance along Z on the run grid. As soon as no
later window reaches a plane it is normalised, interpolated to the output grid, reduced to its argmax and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distseg.data.volume import Geometry, resample_box, shape3, spacing3, target_geometry
from distseg.errors import InputError
from distseg.inference.output_planes import OutputPlanes
from distseg.inference.windows import WindowGrid

Predictor = Callable[[Tensor], Tensor]  # [B, 1, pZ, pY, pX] float32 -> logits [B, K, pZ, pY, pX]
Normaliser = Callable[[np.ndarray], np.ndarray]


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
    grid = run_grid(image.shape, source_spacing_mm, target_spacing_mm, patch_zyx=patch_zyx, overlap=overlap)
    rows = read_rows(
        image,
        grid,
        source_spacing_mm=source_spacing_mm,
        target_spacing_mm=target_spacing_mm,
        normalise=normalise,
        fill=fill,
    )
    masks = {name: np.zeros(output_shape, np.uint8) for name in predict}
    outputs = {
        name: OutputPlanes(
            run_shape=grid.shape,
            run_spacing_mm=target_spacing_mm,
            output_shape=output_shape,
            output_spacing_mm=output_spacing_mm or source_spacing_mm,
            device=device,
        )
        for name in masks
    }
    with closing(ahead(rows)) as coming:
        for first_plane, planes in finished_planes(
            _slabs(coming, grid), grid, predict=predict, num_classes=num_classes, batch_size=batch_size, device=device
        ):
            for name, probabilities in planes.items():
                for at, plane, _ in outputs[name].add(first_plane, probabilities):
                    masks[name][at] = plane.argmax(0).to(torch.uint8).cpu().numpy()
    return masks


def run_grid(
    shape: Sequence[int],
    source_spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    *,
    patch_zyx: Sequence[int],
    overlap: float,
) -> WindowGrid:
    """Windows over the grid at the network's spacing of an image of `shape`."""
    source = Geometry(shape3(shape), spacing3(source_spacing_mm), np.eye(4))
    return WindowGrid.of(target_geometry(source, target_spacing_mm).shape, patch_zyx, overlap)


def read_rows(
    image: Any,
    grid: WindowGrid,
    *,
    source_spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    normalise: Normaliser,
    fill: float,
) -> Iterator[Tensor]:
    """Per row of windows the normalised planes [n, Y, X] (padded_yx) that no row before it holds: each is read once."""
    read = grid.starts[0][0]
    for start in grid.starts[0]:
        stop = start + grid.patch[0]
        yield read_box(
            image,
            (read, grid.starts[1][0], grid.starts[2][0]),
            (stop - read, *grid.padded_yx),
            source_spacing_mm=source_spacing_mm,
            target_spacing_mm=target_spacing_mm,
            normalise=normalise,
            fill=fill,
        )
        read = stop


def read_box(
    image: Any,
    start_zyx: Sequence[int],
    size_zyx: Sequence[int],
    *,
    source_spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    normalise: Normaliser,
    fill: float,
) -> Tensor:
    """A box of the network's grid, normalised."""
    box = resample_box(
        image,
        source_spacing_mm=source_spacing_mm,
        target_spacing_mm=target_spacing_mm,
        start_zyx=start_zyx,
        size_zyx=size_zyx,
        order=1,
        fill=fill,
    )
    return torch.from_numpy(np.ascontiguousarray(normalise(box), dtype=np.float32))


def ahead(rows: Iterator[Tensor]) -> Generator[Tensor, None, None]:
    """The same tensors; the next one is made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
        coming: Future[Tensor | None] = pool.submit(next, rows, None)
        while (row := coming.result()) is not None:
            coming = pool.submit(next, rows, None)
            yield row


def _slabs(rows: Iterator[Tensor], grid: WindowGrid) -> Iterator[Tensor]:
    """Per row of windows the image [pZ, Y, X] under it, in a buffer that the next one overwrites."""
    depth = grid.patch[0]
    slab = torch.empty(depth, *grid.padded_yx)
    for row in rows:
        kept = depth - len(row)
        if kept:
            slab[:kept] = slab[len(row) :].clone()
        slab[kept:] = row
        yield slab


@torch.inference_mode()
def finished_planes(
    slabs: Iterator[Tensor],
    grid: WindowGrid,
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
    corners = grid.corners_yx
    weight = grid.weight(device)  # [pZ, pY, pX]
    inverse_z, inverse_yx = grid.inverse_weight_sum(device)  # [Z, 1, 1], [Y, X]
    sums = {name: torch.zeros(num_classes, depth, *grid.padded_yx, device=device) for name in predict}
    inner_y, inner_x = grid.inner_yx
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
