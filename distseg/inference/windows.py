"""Where windows stand on a scan, how they are weighted, and which voxels each is the most central window of.

Windows stand on a product grid and their weight is a product of three 1-D profiles, so the sum of weights is one too:
the normaliser is three vectors, not a volume; and the window whose centre is nearest to a voxel is found axis by axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

SIGMA_SHARE = 0.125  # of the window's size: the importance map of nnU-Net and MONAI
WEIGHT_FLOOR = 1e-3  # per axis; keeps corners that only one window covers away from 0/0


@dataclass(frozen=True)
class WindowGrid:
    """Windows on the run grid. `starts` may be negative: then the window is larger than the scan."""

    shape: tuple[int, ...]
    patch: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]  # per axis, ascending

    @classmethod
    def of(cls, shape: Sequence[int], patch_zyx: Sequence[int], overlap: float) -> WindowGrid:
        starts = tuple(window_starts(n, p, overlap) for n, p in zip(shape, patch_zyx, strict=True))
        return cls(tuple(shape), tuple(int(p) for p in patch_zyx), starts)

    @property
    def padded_yx(self) -> tuple[int, int]:
        """Size of the plane that the windows cover: the scan's, or the window's where that is larger."""
        y, x = (max(n, p) for n, p in zip(self.shape[1:], self.patch[1:], strict=True))
        return y, x

    @property
    def corners_yx(self) -> list[tuple[int, int]]:
        """First voxels of a row's windows in the padded plane, in the order that numbers them."""
        top, left = self.starts[1][0], self.starts[2][0]
        return [(y - top, x - left) for y, x in product(self.starts[1], self.starts[2])]

    @property
    def inner_yx(self) -> tuple[slice, slice]:
        """The scan's part of the padded plane."""
        top, left = self.starts[1][0], self.starts[2][0]
        return slice(-top, self.shape[1] - top), slice(-left, self.shape[2] - left)

    def cells(self, axis: int) -> list[tuple[int, int]]:
        """Per window of the axis the voxels (start, stop) of the scan that are nearest to its centre, ties to the
        earlier window. The cells cut the axis into pieces, so every voxel has one most central window."""
        starts, p = self.starts[axis], self.patch[axis]
        bounds = [0, *((a + b + p - 1) // 2 + 1 for a, b in pairwise(starts)), self.shape[axis]]
        return list(pairwise(bounds))

    def weight(self, device: torch.device | str) -> Tensor:
        """[pZ, pY, pX] of one window."""
        return _outer([gaussian_profile(p) for p in self.patch], device)

    def inverse_weight_sum(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """([Z, 1, 1], [Y, X]): their product normalises a weighted sum over windows."""
        z = 1 / torch.as_tensor(self.weight_sum(0), dtype=torch.float32, device=device)
        return z[:, None, None], 1 / _outer([self.weight_sum(1), self.weight_sum(2)], device)

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


def _outer(profiles: Sequence[np.ndarray], device: torch.device | str) -> Tensor:
    """Product of 1-D profiles as a float32 array with one axis each."""
    total = torch.ones(())
    for profile in profiles:
        total = total[..., None] * torch.as_tensor(profile, dtype=torch.float32)
    return total.to(device)
