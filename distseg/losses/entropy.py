"""Entropy of a softmax, from its logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def entropy_nats(logits: Tensor, dim: int) -> Tensor:
    """-sum_c p_c log p_c along `dim`, in nats; `dim` goes. Exact where p_c underflows, unlike p log(p + eps)."""
    log_p = functional.log_softmax(logits, dim=dim)
    return -(log_p.exp() * log_p).sum(dim)
