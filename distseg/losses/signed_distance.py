"""DTC's two terms on a predicted signed distance map (Luo et al., AAAI 2021; BASELINES section 5).

Shapes: B slots, K classes, Z Y X voxels. Distances are negative inside, in [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor


def distance_loss(distance: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over foreground classes and voxels of two maps [B, K - 1, Z, Y, X], [B]."""
    return (distance - target).square().flatten(1).mean(1)


def dual_task_loss(logits: Tensor, distance: Tensor, *, sharpness: float) -> Tensor:
    """Mean over foreground classes and voxels of (sigmoid(-sharpness z) - p)^2, [B]; gradients reach both tasks.

    Args:
        logits: of the segmentation, [B, K, Z, Y, X]; p is their softmax without the background.
        distance: z, [B, K - 1, Z, Y, X], float32 or better: 1500 z is beyond half precision.
    """
    from_distance = torch.sigmoid(-sharpness * distance)
    return (from_distance - torch.softmax(logits, 1)[:, 1:]).square().flatten(1).mean(1)
