"""Monte-Carlo uncertainty of the teacher, its pseudo-label, and which voxels it is sure of (Xie et al. 2024, Eq 2).

Shapes: M passes, B slots, K classes, Z Y X voxels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distseg.config.schema import MethodConfig
from distseg.losses.schedules import threshold_nats
from distseg.methods.base import At
from distseg.networks.best_class import best_class


def uncertainty_and_label(logits: Tensor, *, uncertainty: str) -> tuple[Tensor, Tensor]:
    """Entropy in nats [B, Z, Y, X] and argmax of the mean of the passes, int64 [B, Z, Y, X], of logits [M, B, K, ...].

    `mean_of_entropies` is Eq 2: the mean over passes of each pass's entropy. `entropy_of_mean` is UA-MT's.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)  # passes may come in bfloat16
    mean_p = logits.new_zeros(logits.shape[1:], dtype=precise)  # [B, K, Z, Y, X]
    mean_log = torch.zeros_like(mean_p)
    for one_pass in logits:  # no map of M passes is made
        log_p = torch.log_softmax(one_pass, dim=1, dtype=precise)
        p = log_p.exp()
        mean_p.add_(p, alpha=1 / len(logits))
        if uncertainty == "mean_of_entropies":
            mean_log.addcmul_(p, log_p, value=1 / len(logits))
    if uncertainty == "entropy_of_mean":
        mean_log = torch.xlogy(mean_p, mean_p)
    return -mean_log.sum(1), best_class(mean_p)


def reliable_voxels(
    entropy: Tensor, label: Tensor, config: MethodConfig, *, at: At, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Voxels under the threshold, bool [B, Z, Y, X], and the threshold of each slot in nats, [B].

    `paper`: [0.75 + ramp_up(T, 0.25)] ln C. `fixed`: threshold_value x ln C. `quantile`: the threshold_value quantile
    of the slot's own entropies. `per_class`: the paper's; and of each class, as the teacher labels it, the
    threshold_value share that it is surest of in any case, so that no class is left out (METHOD trap 7).
    """
    flat = entropy.flatten(1)
    if config.threshold == "quantile":
        rank = max(1, round(config.threshold_value * flat.shape[1]))
        threshold = flat.kthvalue(rank, dim=1).values  # torch.quantile refuses more than 2^24 voxels
    elif config.threshold == "fixed":
        threshold = flat.new_full((flat.shape[0],), config.threshold_value * math.log(num_classes))
    else:
        threshold = flat.new_full((flat.shape[0],), threshold_nats(at.step, at.total_steps, num_classes))
    reliable = entropy < threshold.view(-1, 1, 1, 1)
    if config.threshold == "per_class":
        reliable = reliable | surest_of_each_class(
            entropy, label, share=config.threshold_value, num_classes=num_classes
        )
    return reliable, threshold


def surest_of_each_class(entropy: Tensor, label: Tensor, *, share: float, num_classes: int) -> Tensor:
    """Of each slot's voxels labelled c, for every c, the `share` with the lowest entropy: bool [B, Z, Y, X]."""
    flat, classes = entropy.flatten(1), label.flatten(1)
    by_entropy = flat.argsort(stable=True, dim=1)
    by_class = classes.gather(1, by_entropy).argsort(stable=True, dim=1)
    order = by_entropy.gather(1, by_class)  # [B, V]: class by class, surest first
    counts = torch.zeros(len(flat), num_classes, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(1, classes, torch.ones_like(classes))
    before = counts.cumsum(1) - counts  # voxels of the classes in front
    sorted_class = classes.gather(1, order)
    rank = torch.arange(flat.shape[1], device=flat.device) - before.gather(1, sorted_class)
    kept = rank < (share * counts.to(flat.dtype)).round().to(torch.int64).gather(1, sorted_class)
    return torch.zeros_like(kept).scatter_(1, order, kept).view_as(label)
