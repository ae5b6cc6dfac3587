"""L_S: cross-entropy plus foreground Dice, one to one, slot by slot (Xie et al. 2024; METHOD section 2b).

Shapes: B slots, K classes, Z Y X voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

DICE_SMOOTHING = 1e-5
IGNORE = 255  # target of a voxel whose class is not known well enough: no part of either term


def supervised_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy + (1 - Dice), [B], over the voxels whose target is not IGNORE.

    Dice is the mean over foreground classes c of 2 sum(p_c y_c) / (sum(p_c^2) + sum(y_c)), sums over the slot's
    voxels; a class absent from both costs nothing.

    Args:
        logits: [B, K, Z, Y, X].
        target: int64 [B, Z, Y, X], classes or IGNORE.
    """
    log_p = torch.log_softmax(logits, dim=1)  # once for both
    voxelwise = functional.nll_loss(log_p, target, reduction="none", ignore_index=IGNORE).flatten(1)  # ignored: 0
    cross_entropy = voxelwise.sum(1) / (target != IGNORE).flatten(1).sum(1).clamp_min(1)
    return cross_entropy + _one_minus_dice(log_p, target)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean foreground Dice, [B]; shapes as in `supervised_loss`."""
    return _one_minus_dice(torch.log_softmax(logits, dim=1), target)


def _one_minus_dice(log_p: Tensor, target: Tensor) -> Tensor:
    known = (target != IGNORE).flatten(1)[:, None].to(log_p.dtype)  # [B, 1, V]
    foreground = log_p[:, 1:].flatten(2).exp() * known  # [B, K-1, V]
    classes = torch.arange(1, log_p.shape[1], device=target.device)[None, :, None]
    truth = (target.flatten(1)[:, None] == classes).to(foreground.dtype)  # [B, K-1, V]
    overlap = (foreground * truth).sum(-1)
    total = (foreground * foreground).sum(-1) + truth.sum(-1)
    dice = (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)
    return 1 - dice.mean(1)
