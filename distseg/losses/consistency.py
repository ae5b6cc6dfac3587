"""Squared distance between softmaxes: the consistency term of mean teacher, and UA-MT's masked one."""

from __future__ import annotations

import torch
from torch import Tensor

from distseg.losses.masked_mean import masked_mean


def consistency_loss(logits: Tensor, target_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over voxels (those of `mask` where given) and classes of (softmax(logits) - softmax(target))^2, [B].

    UA-MT divides by C x sum(mask) (Yu et al. 2019), so with a full mask it equals mean teacher. An empty mask gives 0.

    Args:
        logits, target_logits: [B, K, Z, Y, X]; no gradient flows to the target.
        mask: bool [B, Z, Y, X].
    """
    difference = torch.softmax(logits, 1) - torch.softmax(target_logits.detach(), 1)
    voxelwise = difference.square().mean(1)  # [B, Z, Y, X]
    return voxelwise.flatten(1).mean(1) if mask is None else masked_mean(voxelwise, mask)
