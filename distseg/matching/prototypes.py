"""The paper's matching in closed form: mean cosine similarity to a set of references is a dot product with one vector.

mean_k cos(q, r_k) = q_hat . mean_k(r_hat_k), and averaging over l draws is linear too (METHOD trap 1), so one
prototype per class stands for all its references.

Shapes: B slots, K classes, E embedding width, R references per class, V = Z * Y * X voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Similarity to a class without references: far below any cosine, finite so that entropies stay so.
NO_REFERENCES = -1e4


def reference_embeddings(embeddings: Tensor, reference_index: Tensor) -> Tensor:
    """Each class's references: [B, K, R, E].

    Args:
        embeddings: [B, E, Z, Y, X] of the patches the references lie in (the teacher's, deterministic pass).
        reference_index: int64 [B, K, R], flat voxel indices.
    """
    batch, num_classes, count = reference_index.shape
    flat = embeddings.flatten(2)  # [B, E, V]
    index = reference_index.flatten(1)[:, None].expand(-1, flat.shape[1], -1)  # [B, E, K R]
    return flat.gather(2, index).transpose(1, 2).reshape(batch, num_classes, count, -1)


def class_prototypes(embeddings: Tensor, reference_index: Tensor) -> Tensor:
    """Mean of the unit-length embeddings of each class's references: [B, K, E], at most unit length; arguments as
    `reference_embeddings`."""
    return functional.normalize(reference_embeddings(embeddings, reference_index), dim=-1).mean(2)


def prototype_similarity(queries: Tensor, prototypes: Tensor, present: Tensor) -> Tensor:
    """K(f_c, q) of every voxel to every class: [B, K, Z, Y, X], with gradient to the queries.

    Args:
        queries: [B, E, Z, Y, X] student embeddings.
        prototypes: [B, K, E] from `class_prototypes`.
        present: bool [B, K], classes that have references.
    """
    flat = queries.flatten(2)  # [B, E, V]
    length = flat.square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()  # [B, 1, V]
    similarity = torch.bmm(prototypes.to(flat.dtype), flat) / length  # [B, K, V]
    similarity = similarity.masked_fill(~present[:, :, None], NO_REFERENCES)
    return similarity.view(-1, similarity.shape[1], *queries.shape[2:])
