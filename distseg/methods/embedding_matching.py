"""Embedding matching (Xie et al., "Semi-Supervised Segmentation via Embedding Matching", MIDL 2024, sections 2.1-2.3).

Voxels the teacher is sure of take its argmax (L_UA); all others take the class whose references, labelled voxels at
object surfaces, their embedding is most similar to (L_NN, Eq 3); an entropy term pushes the similarities apart (L_EN,
Eq 4). Total: Eq 5, without L_S, which the step adds.

Shapes: B slots, M passes, K classes, E embedding width, Z Y X voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distseg.data.batch import Batch
from distseg.losses.masked_mean import masked_mean
from distseg.losses.schedules import ramp_up
from distseg.losses.similarity_entropy import similarity_entropy
from distseg.matching.prototypes import class_prototypes, prototype_similarity
from distseg.methods.base import At, Method, Share, Targets, Terms, share
from distseg.methods.uncertainty import reliable_voxels, uncertainty_and_label
from distseg.networks.best_class import best_class
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class EmbeddingMatching(Method):
    """Matching against prototypes of the slot's own labelled patch."""

    needs_references = True

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
            passes = self.stochastic_passes(teacher, batch, generators)  # [M, B, K, Z, Y, X]
            entropy, label = uncertainty_and_label(passes, uncertainty=self.config.uncertainty)
            reliable, threshold = reliable_voxels(entropy, self.config, at=at, num_classes=self.num_classes)
            embeddings = teacher(batch.reference_image).embeddings
            prototypes = class_prototypes(embeddings, batch.reference_index)  # [B, K, E]
        # Inference tensors cannot be saved for the student's backward pass; clones made outside can.
        return Targets(
            label=label.clone(),
            reliable=reliable.clone(),
            prototypes=prototypes.clone(),
            present=batch.reference_present,
            hidden=batch.hidden_target,
            threshold_nats=threshold.clone(),
        )

    def terms(self, output: NetworkOutput, targets: Targets) -> Terms:
        label, reliable, present = _given(targets.label), _given(targets.reliable), _given(targets.present)
        similarity = prototype_similarity(output.embeddings, _given(targets.prototypes), present)  # [B, K, Z, Y, X]
        matched = best_class(similarity.detach())  # Eq 3: K(f+, q) > K(f-, q)
        surface = present[:, 0] & present[:, 1:].any(1)  # [B]: without one, L_NN = L_EN = 0
        unreliable = ~reliable & surface.view(-1, 1, 1, 1)

        voxelwise = functional.cross_entropy(output.logits, torch.where(reliable, label, matched), reduction="none")
        entropy = similarity_entropy(similarity, temperature=self.config.temperature)
        losses = {
            "ua": masked_mean(voxelwise, reliable),
            "nn": masked_mean(voxelwise, unreliable),
            "en": torch.where(surface, entropy, torch.zeros_like(entropy)),
        }
        shares = {
            "coverage_reliable": share(reliable),
            "coverage_matched": share(unreliable),
            "foreground_matched": Share(((matched > 0) & unreliable).flatten(1).sum(1), unreliable.flatten(1).sum(1)),
            "foreground_pseudo": share(label > 0),
            "slots_with_surface": Share(surface, torch.ones_like(surface)),
        }
        if targets.hidden is not None:
            known = unreliable & (targets.hidden >= 0)
            for name, guess in (("matched_accuracy", matched), ("teacher_accuracy", label)):
                right = (guess == targets.hidden) & known
                shares[name] = Share(right.flatten(1).sum(1), known.flatten(1).sum(1))
            truth = (targets.hidden > 0) & known
            shares["foreground_true"] = Share(truth.flatten(1).sum(1), known.flatten(1).sum(1))
        return Terms(losses, shares)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "teach fills in every target that terms uses"
    return tensor
