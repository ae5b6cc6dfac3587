"""Dual-task consistency (Luo et al., AAAI 2021; BASELINES section 5).

A second head on the last decoder map regresses each foreground class's signed distance z = tanh(.). On labelled
patches L_sdf = (z - sdf)^2; on labelled and unlabelled ones L_c = (sigmoid(-k z) - p)^2, k = 1500, with gradient to
both heads. L = L_S + 0.3 L_sdf + w L_c, w ramping up to 1 over the run (0.3 is from
their code).

Departures: p is a softmax, one map a foreground class; L_S is every method's; the distance maps of patches without the
class, or full of it, are +1 and -1 where the paper's are 0, and distances are in mm (data/signed_distance.py);
sigmoid(-k z), the code's sign, since inside is negative. The teacher is the moving average of the U-Net, without the
second head, and no part of the method.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distseg.data.batch import Batch
from distseg.losses.signed_distance import distance_loss, dual_task_loss
from distseg.methods.base import At, Method, StudentPass, Terms, share
from distseg.networks.heads import DistanceHead
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class DualTaskConsistency(Method):
    """Segmentation and signed distance shall describe the same object."""

    needs_distances = True

    def weights(self, at: At) -> dict[str, float]:
        return {"sdf": self.config.weight_sdf, "consistency": self.consistency_weight(at)}

    def make_heads(self, student: UNet3D) -> DistanceHead:
        return DistanceHead(student)

    def run_heads(
        self, heads: nn.Module, features: list[Tensor], output: NetworkOutput, generators: Generators | None
    ) -> Tensor:
        """Distances before the tanh, [2 B, K - 1, Z, Y, X]."""
        raw: Tensor = heads(output.embeddings)
        return raw

    def head_terms(self, seen: StudentPass, batch: Batch) -> Terms:
        """L_c is the mean of a slot's labelled and unlabelled patch."""
        assert seen.unlabelled is not None, "the method uses unlabelled patches"
        assert seen.heads is not None, "run_heads came first"
        assert batch.labelled_distance is not None, "the feed makes it where a method needs it"
        of_labelled, of_unlabelled = torch.tanh(seen.heads).chunk(2)
        sharpness = self.config.sdf_sharpness
        both = dual_task_loss(seen.labelled.logits, of_labelled, sharpness=sharpness)
        both = both + dual_task_loss(seen.unlabelled.logits, of_unlabelled, sharpness=sharpness)
        losses = {"sdf": distance_loss(of_labelled, batch.labelled_distance), "consistency": both / 2}
        return Terms(losses, {"foreground_distance": share((of_unlabelled < 0).any(1))})
