"""Cross-consistency training (Ouali, Hudelot and Tami, CVPR 2020; BASELINES section 3).

Auxiliary decoders see perturbed encoder maps of the unlabelled patch and shall agree with the main decoder, which sees
them as they are: L_c = mean over decoders k of mean over voxels and classes of (softmax g_k(P_k(z)) - softmax g(z))^2,
L = L_S + w(T) L_c. The target takes no gradient, the auxiliary decoders never see a label and are dropped at test; w
ramps up over the first tenth of the run.

Departures: three decoders (F-Noise, F-Drop, DropOut) of the U-Net's own shape where theirs are thirty single layers;
every level of the encoder is perturbed, since clean skips would carry the answer past a perturbed bottleneck; draws
belong to the slot; the weight is theirs brought from 21 classes to two. The teacher is the moving average of encoder
and main decoder, and no part of the method.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distseg.data.batch import Batch
from distseg.losses.consistency import consistency_loss
from distseg.methods.base import At, Method, StudentPass, Terms, share
from distseg.networks.heads import PerturbedDecoders
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class CrossConsistency(Method):
    """The main decoder teaches auxiliary ones, and through them the encoder."""

    head_passes = len(PerturbedDecoders.PERTURBATIONS)

    def weights(self, at: At) -> dict[str, float]:
        return {"consistency": self.consistency_weight(at)}

    def make_heads(self, student: UNet3D) -> PerturbedDecoders:
        return PerturbedDecoders(student)

    def run_heads(
        self, heads: nn.Module, features: list[Tensor], output: NetworkOutput, generators: Generators | None
    ) -> Tensor:
        """Logits of the auxiliary decoders on the unlabelled patches, [A, B, K, Z, Y, X]."""
        batch = features[0].shape[0] // 2
        logits: Tensor = heads([feature[batch:] for feature in features], generators)
        return logits

    def head_terms(self, seen: StudentPass, batch: Batch) -> Terms:
        assert seen.unlabelled is not None, "the method uses unlabelled patches"
        assert seen.heads is not None, "run_heads came first"
        target = seen.unlabelled.logits.detach()
        loss = torch.stack([consistency_loss(logits, target) for logits in seen.heads]).mean(0)
        return Terms({"consistency": loss}, {"foreground_pseudo": share(target.argmax(1) > 0)})
