"""Embedding matching against a bank of references from all labelled scans (`matching=index`).

As methods/embedding_matching.py, but an unreliable voxel is compared with the k references of each class that are most
similar to its embedding, out of thousands: anatomy that the slot's labelled patch does not show, several modes a
class, many classes (METHOD traps 1 and 10). At most `matching.queries` unreliable voxels a slot are matched, drawn
afresh each step. [ours]

Shapes: B slots, Q queries a slot, N queries of all slots that are searched for, K classes, E embedding width, V voxels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from distseg.config.schema import MatchingConfig, MethodConfig
from distseg.data.batch import Batch
from distseg.losses.entropy import entropy_nats
from distseg.losses.masked_mean import masked_mean
from distseg.matching.bank import Bank
from distseg.methods.base import At, Queries, Share, Targets, Terms, share
from distseg.methods.embedding_matching import EmbeddingMatching, accuracies, given, share_of
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class BankMatching(EmbeddingMatching):
    """`bank_of` gives the version that serves a step."""

    needs_references = False  # of the slot
    needs_bank = True

    def __init__(
        self, config: MethodConfig, *, num_classes: int, matching: MatchingConfig, bank_of: Callable[[int], Bank]
    ) -> None:
        super().__init__(config, num_classes=num_classes, matching=matching, draws=1)
        self._bank_of = bank_of

    @torch.no_grad()
    def teach(self, teacher: UNet3D, batch: Batch, at: At, generators: Generators | None) -> Targets:
        """M stochastic passes on the unlabelled patches; and which of their voxels will be searched for."""
        with torch.inference_mode():
            label, reliable, threshold = self.pseudo_labels(teacher, batch, at, generators)
            queries = choose_queries(~reliable, self.matching.queries, generators)
            teachers = None
            if self.matching.queries_from == "teacher":
                teachers = _vectors_at(teacher(batch.unlabelled_image).embeddings, queries.voxels)
            everywhere = None
            if self.config.entropy_over == "all":
                everywhere = choose_queries(torch.ones_like(reliable), self.matching.queries, generators)
        return Targets(
            label=label.clone(),
            reliable=reliable.clone(),
            queries=Queries(*(t.clone() for t in queries)),
            query_vectors=None if teachers is None else teachers.clone(),
            entropy_queries=None if everywhere is None else Queries(*(t.clone() for t in everywhere)),
            bank=self._bank_of(at.step),
            hidden=batch.hidden_target,
            threshold_nats=threshold.clone(),
        )

    def terms(self, output: NetworkOutput, targets: Targets) -> Terms:
        label, reliable = given(targets.label), given(targets.reliable)
        assert targets.queries is not None, "teach fills it in"
        assert targets.bank is not None, "teach fills it in"
        queries, bank = targets.queries, targets.bank
        index = queries.voxels
        students = _vectors_at(output.embeddings, index)
        matched, scores = _search(bank, students, queries.valid)  # [B, Q], [B, K, Q]
        if targets.query_vectors is not None:
            matched, _ = _search(bank, targets.query_vectors, queries.valid)
        usable = bool(bank.present[0]) and bool(bank.present[1:].any())  # a class to tell from another
        valid = queries.valid & usable
        if self.matching.min_similarity is not None:
            valid = valid & (scores.detach().amax(1) >= self.matching.min_similarity)

        voxelwise = functional.cross_entropy(output.logits, label, reduction="none")
        logits = output.logits.flatten(2).gather(2, index[:, None].expand(-1, self.num_classes, -1))  # [B, K, Q]
        entropy_at = (scores, valid)
        if targets.entropy_queries is not None:
            voxels, valid_everywhere = targets.entropy_queries
            _, everywhere = _search(bank, _vectors_at(output.embeddings, voxels), valid_everywhere)
            entropy_at = (everywhere, valid_everywhere & usable)
        entropies = entropy_nats(entropy_at[0] / self.config.temperature, dim=1)  # [B, Q]
        losses = {
            "ua": masked_mean(voxelwise, reliable),
            "nn": masked_mean(functional.cross_entropy(logits, matched, reduction="none"), valid),
            "en": masked_mean(entropies, entropy_at[1]),
        }
        shares = {
            "coverage_reliable": share(reliable),
            "coverage_matched": Share(valid.sum(1), share(reliable).whole),
            "coverage_rejected": Share((queries.valid & ~valid).sum(1), share(reliable).whole),
            "foreground_matched": share_of(matched > 0, valid),
            "foreground_pseudo": share(label > 0),
        }
        if targets.hidden is not None:
            hidden, guess = (t.flatten(1).gather(1, index) for t in (targets.hidden, label))
            shares |= accuracies(matched, guess, hidden, among=valid)
        return Terms(losses, shares)


def choose_queries(eligible: Tensor, count: int | None, generators: Generators | None) -> Queries:
    """At most `count` of each slot's eligible voxels, by lot; None: all voxels, in order.

    Of fixed size and without waiting for a device: where a slot has fewer, the rest of its Q are not valid.

    Args:
        eligible: bool [B, Z, Y, X].
        generators: the first B draw the slots' lots; None draws from torch's global one.
    """
    flat = eligible.flatten(1)
    if count is None or count >= flat.shape[1]:
        return Queries(torch.arange(flat.shape[1], device=flat.device).expand_as(flat), flat)
    if generators is None:
        lots = torch.rand(flat.shape, device=flat.device)
    else:
        lots = torch.stack([torch.rand(row.shape, generator=g) for row, g in zip(flat, generators, strict=False)])
    index = (lots + flat).topk(count, dim=1).indices
    return Queries(index, flat.gather(1, index))


def _vectors_at(embeddings: Tensor, voxels: Tensor) -> Tensor:
    """Embeddings [B, E, Z, Y, X] at flat voxel indices [B, Q]: [B, Q, E]."""
    index = voxels[:, None].expand(-1, embeddings.shape[1], -1)
    return embeddings.flatten(2).gather(2, index).transpose(1, 2)


def _search(bank: Bank, vectors: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The class each query [B, Q, E] is matched to, int64 [B, Q], and its scores [B, K, Q] with gradient to the query.

    On a CPU invalid queries are left out of the search and score 0; on a GPU that would wait for their number.
    """
    num_classes, flat = len(bank.present), vectors.flatten(0, 1)  # [B Q, E]
    wanted = torch.nonzero(valid.flatten()).flatten() if flat.device.type == "cpu" else None
    asked = flat if wanted is None else flat[wanted]
    similarities = bank.similarities(asked, bank.find(asked))
    matched, scores = bank.classes(similarities), bank.scores(similarities)
    if wanted is not None:
        matched = torch.zeros(len(flat), dtype=torch.int64).index_put((wanted,), matched)
        scores = flat.new_zeros(len(flat), num_classes).index_put((wanted,), scores)
    return matched.view_as(valid), scores.view(*valid.shape, num_classes).transpose(1, 2)
