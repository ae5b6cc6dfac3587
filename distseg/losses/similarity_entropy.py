"""L_EN: entropy of the softmax over classes of the similarities (Xie et al. 2024, Eq 4)."""

from __future__ import annotations

from torch import Tensor

from distseg.losses.entropy import entropy_nats
from distseg.losses.masked_mean import masked_mean


def similarity_entropy(similarity: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Mean over voxels of the entropy of softmax(similarity / temperature), [B], gradient to the similarity.

    With two classes, cosines and temperature 1 it has a floor of 0.365 nats (METHOD trap 3).

    Args:
        similarity: [B, K, ...]: the similarity of each voxel's embedding to each class's references.
        mask: bool [B, ...]: the voxels meant; None: all.
    """
    entropy = entropy_nats(similarity / temperature, dim=1)
    return entropy.flatten(1).mean(1) if mask is None else masked_mean(entropy, mask)
