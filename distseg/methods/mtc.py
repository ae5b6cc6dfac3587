"""Multi-task learning with attention (Chen et al., "Multi-task Attention-Based Semi-supervised Learning for Medical
Image Segmentation", MICCAI 2019), the "MTC" of Xie's Table 1; BASELINES section 4. It has no consistency term.

A second decoder, without skips, reconstructs from the bottleneck what each class covers of the image: targets p_c x,
the student's own soft mask times the input, on labelled and unlabelled patches alike. L = L_S + w L_R, L_R in
losses/reconstruction.py, both tasks in one update (the paper's "joint" variant; it found alternating updates better).

Departures: the image is rescaled from a fixed window of z-scores to [0, 1], the range of the sigmoid; a softmax over C
classes and C reconstructions where the paper has one mask and its complement; the U-Net's blocks and dropout. The
released code compares the reconstruction of the labelled patch with the unlabelled target; the paper does not.
With `mask_gradient` (the paper's) a segmentation can lower L_R by collapsing: `foreground_mask` says what it covers.
The teacher is the moving average of the U-Net, without the second decoder, and no part of the method.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distseg.data.batch import Batch
from distseg.losses.reconstruction import reconstruction_loss, unit_window
from distseg.methods.base import At, Method, Share, StudentPass, Terms
from distseg.networks.heads import ReconstructionDecoder
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class MultiTaskConsistency(Method):
    """Segmentation and reconstruction share an encoder."""

    head_passes = 2  # labelled and unlabelled patches

    def weights(self, at: At) -> dict[str, float]:
        return {"reconstruction": self.config.weight_reconstruction}

    def make_heads(self, student: UNet3D) -> ReconstructionDecoder:
        return ReconstructionDecoder(student)

    def run_heads(
        self, heads: nn.Module, features: list[Tensor], output: NetworkOutput, generators: Generators | None
    ) -> Tensor:
        """Reconstructions before the sigmoid, [2 B, K, Z, Y, X]."""
        logits: Tensor = heads(features, generators)
        return logits

    def head_terms(self, seen: StudentPass, batch: Batch) -> Terms:
        """The mean of a slot's labelled and unlabelled patch."""
        assert seen.unlabelled is not None, "the method uses unlabelled patches"
        assert seen.heads is not None, "run_heads came first"
        image = unit_window(torch.cat([batch.labelled_image, batch.unlabelled_image]))  # without the student's noise
        probability = torch.softmax(torch.cat([seen.labelled.logits, seen.unlabelled.logits]), 1)
        if not self.config.mask_gradient:
            probability = probability.detach()
        labelled, unlabelled = reconstruction_loss(seen.heads, image, probability).chunk(2)
        covered = 1 - probability.detach()[:, 0].flatten(1).chunk(2)[1]  # [B, voxels]
        shares = {"foreground_mask": Share(covered.sum(1), torch.full_like(covered[:, 0], covered.shape[1]))}
        return Terms({"reconstruction": (labelled + unlabelled) / 2}, shares)
