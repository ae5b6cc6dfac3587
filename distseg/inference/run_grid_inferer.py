"""The inferer of an exported MONAI bundle: `distseg export format=monai_bundle` copies this file into its scripts/.

It needs MONAI, torch and numpy alone, so that a bundle runs where distseg is not installed. It does in few lines and
much memory what distseg does slab by slab: to the model's spacing, windows with Gaussian weights, class probabilities
back onto the image's own grid. Masks are the same (tests/unit/test_export.py).

Shapes: B scans, K classes, Z Y X voxels; Z points to the head, Y to the back, X to the left (MONAI's axcodes "SPL").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type
from torch import Tensor

SIGMA_SHARE = 0.125  # of the window's size
WEIGHT_FLOOR = 1e-3  # per axis
SAME_GRID_VOXELS = 0.01  # a grid whose far end would move by less is the same grid
SMALLEST_SD = 1e-6


class RunGridInferer(Inferer):
    """Raw intensities [B, 1, Z, Y, X] with an affine -> class probabilities [B, K, Z, Y, X] on the same grid.

    Args:
        spacing_mm: the model's, Z Y X.
        patch_zyx: size of a window in voxels of that spacing.
        overlap: share of a window that its neighbour covers too.
        intensity: {"kind": "ct", "low", "high", "mean", "sd"} clips and z-scores; {"kind": "per_scan"} z-scores by the
            scan's own nonzero voxels.
        sw_batch_size: windows a forward pass.
    """

    def __init__(
        self,
        *,
        spacing_mm: Sequence[float],
        patch_zyx: Sequence[int],
        overlap: float,
        intensity: dict[str, Any],
        sw_batch_size: int = 4,
    ) -> None:
        super().__init__()
        self.spacing_mm, self.patch, self.overlap = tuple(spacing_mm), tuple(patch_zyx), overlap
        self.intensity, self.sw_batch_size = intensity, sw_batch_size

    @torch.inference_mode()
    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        affines = inputs.affine.reshape(-1, 4, 4)  # type: ignore[attr-defined]  # a MetaTensor, by MONAI's convention
        scans = zip(inputs.as_tensor(), affines, strict=True)  # type: ignore[attr-defined]  # likewise
        found = torch.stack([self._probabilities(scan[0], affine, network) for scan, affine in scans])
        with_meta: Tensor = convert_to_dst_type(found, inputs)[0]  # the affine and what Invertd undoes
        return with_meta

    def _probabilities(self, image: Tensor, affine: Tensor, network: Callable[..., Tensor]) -> Tensor:
        """[Z, Y, X] -> [K, Z, Y, X]."""
        spacing = np.linalg.norm(affine.double().cpu().numpy()[:3, :3], axis=0)
        shape = [max(1, round(n * float(s) / r)) for n, s, r in zip(image.shape, spacing, self.spacing_mm, strict=True)]
        nonzero = image[image != 0].double()
        on_run_grid = image.float()
        for axis in range(3):
            on_run_grid = _interpolated(on_run_grid, axis, shape[axis], self.spacing_mm[axis] / float(spacing[axis]))
        minimum = image.min().float()
        probabilities = self._windows(
            self._normalised(on_run_grid, nonzero), self._normalised(minimum, nonzero), network
        )
        for axis in range(3):
            ratio = float(spacing[axis]) / self.spacing_mm[axis]
            probabilities = _interpolated(probabilities, 1 + axis, image.shape[axis], ratio)
        return probabilities

    def _normalised(self, values: Tensor, nonzero: Tensor) -> Tensor:
        if self.intensity["kind"] == "ct":
            clipped = values.clamp(self.intensity["low"], self.intensity["high"])
            scaled: Tensor = (clipped - self.intensity["mean"]) / self.intensity["sd"]
            return scaled
        if not nonzero.numel():
            return values / SMALLEST_SD
        return (values - nonzero.mean().float()) / max(float(nonzero.std(correction=0)), SMALLEST_SD)

    def _windows(self, image: Tensor, fill: Tensor, network: Callable[..., Tensor]) -> Tensor:
        """Means of overlapping windows' class probabilities [K, Z, Y, X]; beyond the scan lies `fill`."""
        low = [max(0, (p - n) // 2) for n, p in zip(image.shape, self.patch, strict=True)]
        padded = image.new_full([max(n, p) for n, p in zip(image.shape, self.patch, strict=True)], float(fill))
        inside = tuple(slice(start, start + n) for start, n in zip(low, image.shape, strict=True))
        padded[inside] = image
        starts = [_starts(n, p, self.overlap) for n, p in zip(padded.shape, self.patch, strict=True)]
        boxes = [tuple(slice(s, s + p) for s, p in zip(corner, self.patch, strict=True)) for corner in product(*starts)]
        z, y, x = (_profile(p).to(image.device) for p in self.patch)
        weight = z[:, None, None] * y[:, None] * x
        total, weights = None, torch.zeros_like(padded)
        for first in range(0, len(boxes), self.sw_batch_size):
            batch = boxes[first : first + self.sw_batch_size]
            logits = network(torch.stack([padded[box] for box in batch])[:, None])
            for box, probabilities in zip(batch, torch.softmax(logits.float(), dim=1), strict=True):
                if total is None:
                    total = probabilities.new_zeros((len(probabilities), *padded.shape))
                total[(slice(None), *box)] += probabilities * weight
                weights[box] += weight
        assert total is not None
        mean: Tensor = (total / weights)[(slice(None), *inside)]
        return mean


def _starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: every patch (1 - overlap) voxels, the last flush with the end."""
    return [*range(0, size - patch, max(1, int(patch * (1 - overlap)))), size - patch]


def _profile(patch: int) -> Tensor:
    distance = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    return torch.exp(-0.5 * (distance / (SIGMA_SHARE * patch)) ** 2).clamp(min=WEIGHT_FLOOR).float()


def _interpolated(values: Tensor, axis: int, size: int, ratio: float) -> Tensor:
    """Linear along `axis` onto `size` voxels of `ratio` times the length; the grids' first voxel edges coincide."""
    there = values.shape[axis]
    if size == there and abs(ratio - 1.0) * size < SAME_GRID_VOXELS:
        return values
    position = np.clip((np.arange(size) + 0.5) * ratio - 0.5, 0.0, there - 1.0)
    low = torch.from_numpy(np.floor(position).astype(np.int64)).to(values.device)
    high = (low + 1).clamp(max=there - 1)
    weight = torch.from_numpy(position).to(values.device) - low
    shape = [1] * values.ndim
    shape[axis] = -1
    return torch.lerp(values.index_select(axis, low), values.index_select(axis, high), weight.float().reshape(shape))
