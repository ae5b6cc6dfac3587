"""Mean of a voxelwise loss over a subset of voxels: the reduction of L_UA and of L_NN, Eq 3 (Xie et al. 2024)."""

from __future__ import annotations

from torch import Tensor


def masked_mean(voxelwise: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, Z, Y, X] over a bool mask of that shape, [B]; 0 where the mask is empty (METHOD trap 2: 0/0).

    A product with the mask, not a gather: no synchronisation, and faster on CPU at the coverages that occur.
    """
    weight = mask.to(voxelwise.dtype).flatten(1)
    return (voxelwise.flatten(1) * weight).sum(1) / weight.sum(1).clamp_min(1.0)
