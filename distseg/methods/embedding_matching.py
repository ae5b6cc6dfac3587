"""Embedding matching (Xie et al., "Semi-Supervised Segmentation via Embedding Matching", MIDL 2024, sections 2.1-2.3).

Voxels the teacher is sure of take its argmax (L_UA); all others take the class whose references, labelled voxels at
object surfaces, their embedding is most similar to (L_NN, Eq 3); an entropy term pushes the similarities apart (L_EN,
Eq 4). Total: Eq 5, without L_S, which the step adds.

Here references are the slot's own labelled patch, as in the paper. Against a bank over all labelled scans:
methods/bank_matching.py.

Shapes: B slots, M passes, K classes, E embedding width, l draws of k references per class, V = Z * Y * X voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distseg.config.schema import MatchingConfig, MethodConfig
from distseg.data.batch import Batch
from distseg.losses.masked_mean import masked_mean
from distseg.losses.schedules import ramp_up
from distseg.losses.similarity_entropy import similarity_entropy
from distseg.matching.prototypes import (
    NO_REFERENCES,
    class_prototypes,
    prototype_similarity,
    reference_embeddings,
)
from distseg.matching.similarity import class_scores, pairwise_similarity
from distseg.methods.base import At, Method, Share, Targets, Terms, share
from distseg.methods.uncertainty import reliable_voxels, uncertainty_and_label
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class EmbeddingMatching(Method):
    """Matching against references of the slot's own labelled patch; mean cosines in closed form, by prototypes."""

    needs_references = True

    def __init__(self, config: MethodConfig, *, num_classes: int, matching: MatchingConfig, draws: int) -> None:
        super().__init__(config, num_classes=num_classes)
        self.matching, self._draws = matching, draws
        self._closed_form = (matching.similarity, matching.reduction) == ("cosine", "mean")

    def weights(self, at: At) -> dict[str, float]:
        """w_UA = ramp_up(T, 0.25); w_PS = ramp_up(T, 0.125) for L_NN and L_EN (Eq 5)."""
        ramp = ramp_up(at.step, at.total_steps, 1.0)
        c = self.config
        return {"ua": c.weight_ua * ramp, "nn": c.weight_nn * ramp, "en": c.weight_en * ramp}

    @property
    def teacher_passes(self) -> int:
        return self.config.passes

    @torch.no_grad()
    def teach(self, teacher: UNet3D, batch: Batch, at: At, generators: Generators | None) -> Targets:
        """M stochastic passes on the unlabelled patches, one deterministic pass on the reference patches."""
        with torch.inference_mode():
            label, reliable, threshold = self.pseudo_labels(teacher, batch, at, generators)
            embeddings = teacher(batch.reference_image).embeddings
            summary = class_prototypes if self._closed_form else reference_embeddings
            references = summary(embeddings, batch.reference_index)  # [B, K, E], or [B, K, l k, E]
        # Inference tensors cannot be saved for the student's backward pass; clones made outside can.
        return Targets(
            label=label.clone(),
            reliable=reliable.clone(),
            references=references.clone(),
            present=batch.reference_present,
            hidden=batch.hidden_target,
            threshold_nats=threshold.clone(),
        )

    def pseudo_labels(
        self, teacher: UNet3D, batch: Batch, at: At, generators: Generators | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's label [B, Z, Y, X], where it is reliable (bool), and each slot's threshold in nats [B]."""
        passes = self.stochastic_passes(teacher, batch, generators)  # [M, B, K, Z, Y, X]
        entropy, label = uncertainty_and_label(passes, uncertainty=self.config.uncertainty)
        reliable, threshold = reliable_voxels(entropy, label, self.config, at=at, num_classes=self.num_classes)
        return label, reliable, threshold

    def terms(self, output: NetworkOutput, targets: Targets) -> Terms:
        label, reliable, present = given(targets.label), given(targets.reliable), given(targets.present)
        similarity = self._similarity(output.embeddings, targets, present)  # [B, K, Z, Y, X]
        closest, matched = similarity.detach().max(1)  # Eq 3: K(f+, q) > K(f-, q)
        surface = present[:, 0] & present[:, 1:].any(1)  # [B]: without one, L_NN = L_EN = 0
        unreliable = ~reliable & surface.view(-1, 1, 1, 1)
        if self.matching.min_similarity is not None:
            unreliable = unreliable & (closest >= self.matching.min_similarity)

        voxelwise = functional.cross_entropy(output.logits, torch.where(reliable, label, matched), reduction="none")
        meant = unreliable if self.config.entropy_over == "unreliable" else None
        entropy = similarity_entropy(similarity, temperature=self.config.temperature, mask=meant)
        losses = {
            "ua": masked_mean(voxelwise, reliable),
            "nn": masked_mean(voxelwise, unreliable),
            "en": torch.where(surface, entropy, torch.zeros_like(entropy)),
        }
        shares = {
            "coverage_reliable": share(reliable),
            "coverage_matched": share(unreliable),
            "foreground_matched": share_of((matched > 0), unreliable),
            "foreground_pseudo": share(label > 0),
            "slots_with_surface": Share(surface, torch.ones_like(surface)),
        }
        if targets.hidden is not None:
            shares |= accuracies(matched, label, targets.hidden, among=unreliable)
        return Terms(losses, shares)

    def _similarity(self, embeddings: Tensor, targets: Targets, present: Tensor) -> Tensor:
        references = given(targets.references)
        if self._closed_form:
            return prototype_similarity(embeddings, references, present)
        queries = embeddings.flatten(2).transpose(1, 2)  # [B, V, E]
        scores = []
        for of_class in references.unbind(1):  # [B, l k, E]; one class at a time: V x l k pairs are much already
            pairs = pairwise_similarity(queries, of_class[:, None].to(queries), similarity=self.matching.similarity)
            by_draw = pairs.view(*queries.shape[:2], self._draws, -1)  # [B, V, l, k]
            scores.append(
                class_scores(by_draw, reduction=self.matching.reduction, temperature=self.matching.temperature).mean(-1)
            )
        similarity = torch.stack(scores, 1).masked_fill(~present[:, :, None], NO_REFERENCES)  # [B, K, V]
        return similarity.view(*similarity.shape[:2], *embeddings.shape[2:])


def accuracies(matched: Tensor, label: Tensor, hidden: Tensor, *, among: Tensor) -> dict[str, Share]:
    """What matching and the teacher guess right `among` some voxels, and the true foreground there; diagnostics only.

    All [B, ...] of one shape; `hidden` is -1 where the truth is not known.
    """
    known = among & (hidden >= 0)
    return {
        "matched_accuracy": share_of(matched == hidden, known),
        "teacher_accuracy": share_of(label == hidden, known),
        "foreground_true": share_of(hidden > 0, known),
    }


def share_of(part: Tensor, whole: Tensor) -> Share:
    """The share of the True voxels of `whole` that are True in `part`: bool [B, ...] each."""
    return Share((part & whole).flatten(1).sum(1), whole.flatten(1).sum(1))


def given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "teach fills in every target that terms uses"
    return tensor
