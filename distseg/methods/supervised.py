"""The baseline: labelled patches alone. Its teacher is the student's moving average, as everyone's."""

from __future__ import annotations

from distseg.data.batch import Batch
from distseg.methods.base import At, Method, Targets, Terms
from distseg.networks.stochastic import Generators
from distseg.networks.unet import NetworkOutput, UNet3D


class Supervised(Method):
    """No term on unlabelled patches; the step does not run the student on them."""

    uses_unlabelled = False

    def weights(self, at: At) -> dict[str, float]:
        return {}

    def teach(self, teacher: UNet3D, batch: Batch, at: At, generators: Generators | None) -> Targets:
        return Targets()

    def terms(self, output: NetworkOutput, targets: Targets) -> Terms:
        return Terms({})
