"""L_EN: entropy of the softmax over classes of the similarities (Xie et al. 2024, Eq 4)."""

from __future__ import annotations

from torch import Tensor

from distseg.losses.entropy import entropy_nats


def similarity_entropy(similarity: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over all voxels of the entropy of softmax(similarity / temperature), [B], gradient to the similarity.

    With two classes, cosines and temperature 1 it has a floor of 0.365 nats (METHOD trap 3).

    Args:
        similarity: [B, K, ...]: the similarity of each voxel's embedding to each class's references.
    """
    return entropy_nats(similarity / temperature, dim=1).flatten(1).mean(1)
