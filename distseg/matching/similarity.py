"""Similarity of queries to given references, with gradient to the queries, and how the references of a class vote.

Cosine, or 1 / (1 + |p - q|) (`euclid`; Xie et al. 2024, section 3.4). A class's score is the mean of its references'
similarities (the paper), their maximum, or their mean weighted by softmax(similarity / temperature), between the two.

Shapes: N queries, K classes, R references per class, E embedding width; leading dimensions are free.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SIMILARITIES = ("cosine", "euclid")
REDUCTIONS = ("mean", "max", "softmax")


def pairwise_similarity(queries: Tensor, references: Tensor, *, similarity: str) -> Tensor:
    """Every query to every reference: [B, N, E] and [B, K, R, E] -> [B, N, K, R]."""
    batch, num_classes, count, width = references.shape
    flat = references.reshape(batch, num_classes * count, width)
    if similarity == "cosine":
        pairs = torch.bmm(functional.normalize(queries, dim=-1), functional.normalize(flat, dim=-1).transpose(1, 2))
    else:
        pairs = 1 / (1 + torch.cdist(queries, flat))
    return pairs.view(batch, queries.shape[1], num_classes, count)


def found_similarity(queries: Tensor, references: Tensor, *, similarity: str) -> Tensor:
    """Each query to its own references: [N, E] and [N, K, k, E] -> [N, K, k]."""
    if similarity == "cosine":
        return torch.einsum(
            "ne,nkre->nkr", functional.normalize(queries, dim=-1), functional.normalize(references, dim=-1)
        )
    # As cdist: a distance of exactly zero has no gradient, rather than an infinite one.
    squared = (queries[:, None, None] - references).square().sum(-1)
    distance = torch.where(squared > 0, squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt(), 0.0)
    return 1 / (1 + distance)


def class_scores(similarities: Tensor, *, reduction: str, temperature: float = 0.1) -> Tensor:
    """How a class's references speak as one: [..., R] -> [...]."""
    if reduction == "mean":
        return similarities.mean(-1)
    if reduction == "max":
        return similarities.amax(-1)
    return (torch.softmax(similarities / temperature, -1) * similarities).sum(-1)


def majority(similarities: Tensor) -> Tensor:
    """The class of most of a query's R nearest references, whatever their class: [N, K, R] -> int64 [N].

    The R nearest of all are among the R nearest of each class. A tie goes to the class whose votes are more similar.
    """
    num, num_classes, count = similarities.shape
    nearest = similarities.flatten(1).topk(count, dim=1)
    classes = nearest.indices // count  # [N, R]
    votes = torch.zeros(num, num_classes, dtype=similarities.dtype, device=similarities.device)
    votes.scatter_add_(1, classes, torch.ones_like(nearest.values))
    closeness = torch.zeros_like(votes).scatter_add_(1, classes, nearest.values)
    # Votes are whole numbers; their similarities, squeezed under one, only part equals.
    return (votes + closeness / (1 + closeness.abs()) / 2).argmax(1)
