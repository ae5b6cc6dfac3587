"""Mean teacher (Tarvainen and Valpola, NeurIPS 2017) in its usual 3D medical form (SSL4MIS; BASELINES section 1).

L_c = mean over unlabelled voxels and classes of (student softmax - teacher softmax)^2, weight ramp_up(T, 0.1). The
teacher sees noise of sigma 0.1 clipped at 0.2 and its own dropout. Departures: instance norm, so no batch statistics;
the teacher starts as a copy of the student; its noise is the recipe's to change.
"""

from __future__ import annotations

import torch

from distseg.data.batch import Batch
from distseg.losses.consistency import consistency_loss
from distseg.methods.base import At, Method, Targets, Terms, share
from distseg.networks.best_class import best_class
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class MeanTeacher(Method):
    """One stochastic teacher pass a step; consistency on unlabelled patches only."""

    def weights(self, at: At) -> dict[str, float]:
        return {"consistency": self.consistency_weight(at)}

    @property
    def teacher_passes(self) -> int:
        return 1

    @torch.no_grad()
    def teach(self, teacher: UNet3D, batch: Batch, at: At, generators: Generators | None) -> Targets:
        with torch.inference_mode():
            logits = self.stochastic_passes(teacher, batch, generators)
        return Targets(logits=logits[0].clone())  # made outside, so that the student's backward pass may keep it

    def terms(self, output: NetworkOutput, targets: Targets) -> Terms:
        assert targets.logits is not None, "teach fills it in"
        loss = consistency_loss(output.logits, targets.logits)
        return Terms({"consistency": loss}, {"foreground_pseudo": share(best_class(targets.logits) > 0)})
