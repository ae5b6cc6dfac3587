"""MTC's reconstruction of what each class covers (Chen et al., MICCAI 2019; BASELINES section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW_SD = 3.0


def unit_window(image: Tensor) -> Tensor:
    """A z-scored image clipped at +-3 and rescaled to [0, 1], which a sigmoid can reach: 0 is then the darkest voxel,
    where in z-scores 0 is mean tissue."""
    return image.clamp(-WINDOW_SD, WINDOW_SD) / (2 * WINDOW_SD) + 0.5


def reconstruction_loss(reconstruction_logits: Tensor, image: Tensor, probability: Tensor) -> Tensor:
    """sum over classes c of w_c mean over voxels of (sigmoid(r_c) - p_c x)^2, [B]; w_c = mean of p_c over voxels.

    The weights are proportional to each class's size, as published, and constants to the gradient.

    Args:
        reconstruction_logits: r, [B, K, Z, Y, X].
        image: x, [B, 1, Z, Y, X] in [0, 1].
        probability: p, [B, K, Z, Y, X]; gradients reach it through the target p_c x unless it is detached.
    """
    error = (torch.sigmoid(reconstruction_logits) - probability * image).square().flatten(2).mean(2)  # [B, K]
    weight = probability.detach().flatten(2).mean(2)
    return (weight * error).sum(1)
