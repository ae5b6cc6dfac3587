"""Uncertainty-aware mean teacher (Yu et al., MICCAI 2019; BASELINES section 2).

T = 8 stochastic teacher passes give the entropy of their mean; the consistency of mean teacher is taken only where it
lies under the threshold [0.75 + ramp_up(T, 0.25)] ln C. The target is one further, independent pass, so nine in all.
Departure: ln C for C classes where the paper, with two, writes ln 2.
"""

from __future__ import annotations

import torch

from distseg.data.batch import Batch
from distseg.losses.consistency import consistency_loss
from distseg.methods.base import At, Targets, Terms, share
from distseg.methods.mean_teacher import MeanTeacher
from distseg.methods.uncertainty import reliable_voxels, uncertainty_and_label
from distseg.networks.best_class import best_class
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class UncertaintyAwareMeanTeacher(MeanTeacher):
    """Mean teacher's consistency where the teacher is sure."""

    @property
    def teacher_passes(self) -> int:
        return self.config.passes + 1

    @torch.no_grad()
    def teach(self, teacher: UNet3D, batch: Batch, at: At, generators: Generators | None) -> Targets:
        with torch.inference_mode():
            passes = self.stochastic_passes(teacher, batch, generators)
            entropy, label = uncertainty_and_label(passes[1:], uncertainty=self.config.uncertainty)
            reliable, threshold = reliable_voxels(entropy, label, self.config, at=at, num_classes=self.num_classes)
        # Clones made outside inference mode, so that the student's backward pass may keep them.
        return Targets(reliable=reliable.clone(), logits=passes[0].clone(), threshold_nats=threshold.clone())

    def terms(self, output: NetworkOutput, targets: Targets) -> Terms:
        assert targets.logits is not None, "teach fills it in"
        assert targets.reliable is not None, "teach fills it in"
        loss = consistency_loss(output.logits, targets.logits, targets.reliable)
        shares = {
            "coverage_reliable": share(targets.reliable),
            "foreground_pseudo": share(best_class(targets.logits) > 0),
        }
        return Terms({"consistency": loss}, shares)
