"""What some methods put beside the student's U-Net while it trains, and leave behind: its artefact is the U-Net alone.

Each is built from the U-Net it serves, with weights of its own drawn from torch's global generator, and reads the
U-Net's maps: `features` are the encoder's, finest first.

Shapes: A auxiliary decoders, B samples, K classes, E embedding width, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distseg.networks.dropout import keyed
from distseg.networks.perturb import Generators, Perturbation, channel_dropout, feature_drop, feature_noise
from distseg.networks.unet import UNet3D, decoder_stack, he_initialise, remove_dropout, run_level


class AuxiliaryDecoder(nn.Module):
    """A decoder of the U-Net's own shape. Without `skips` it sees the coarsest map alone."""

    def __init__(self, trunk: UNet3D, *, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        self.recompute = trunk.activation_checkpointing
        widths = trunk.encoder_widths if skips else [0] * len(trunk.encoder_widths)
        up, levels = decoder_stack(widths, trunk.decoder_widths, trunk.dropout_rate)
        self.up, self.levels = nn.ModuleList(up), nn.ModuleList(levels)
        self.head = nn.Conv3d(trunk.embedding_width, trunk.num_classes, kernel_size=1)
        self.apply(he_initialise)
        if trunk.dropout == "last":
            remove_dropout(self.up, self.levels[:-1])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """-> [B, K, Z, Y, X]."""
        y = features[-1]
        for up, level, skip in zip(self.up, self.levels, reversed(features[:-1]), strict=True):
            y = up(y)
            y = run_level(level, torch.cat([skip, y], dim=1) if self.skips else y, recompute=self.recompute)
        out: Tensor = self.head(y)
        return out


class PerturbedDecoders(nn.Module):
    """One auxiliary decoder for each perturbation, which it sees at every level of the encoder (CCT)."""

    PERTURBATIONS: tuple[Perturbation, ...] = (feature_noise, feature_drop, channel_dropout)

    def __init__(self, trunk: UNet3D) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(AuxiliaryDecoder(trunk) for _ in self.PERTURBATIONS)

    def forward(self, features: Sequence[Tensor], generators: Generators | None) -> Tensor:
        """-> logits [A, B, K, Z, Y, X]. `generators`: A * B of them, decoder by decoder, or None.

        Every decoder perturbs the maps as they came: nothing accumulates from one to the next.
        """
        batch, logits = features[0].shape[0], []
        for number, (decoder, perturb) in enumerate(zip(self.decoders, self.PERTURBATIONS, strict=True)):
            mine = None if generators is None else generators[number * batch : (number + 1) * batch]
            with keyed(decoder, mine):
                logits.append(decoder([perturb(feature, mine) for feature in features]))
        return torch.stack(logits)


class ReconstructionDecoder(nn.Module):
    """The coarsest map, without skips, to one reconstruction of the image for each class (MTC)."""

    def __init__(self, trunk: UNet3D) -> None:
        super().__init__()
        self.decoder = AuxiliaryDecoder(trunk, skips=False)

    def forward(self, features: Sequence[Tensor], generators: Generators | None) -> Tensor:
        """-> [B, K, Z, Y, X] before the sigmoid. `generators`: B of them, or None."""
        with keyed(self.decoder, generators):
            out: Tensor = self.decoder(features)
        return out


class DistanceHead(nn.Module):
    """The embedding to one signed distance for each foreground class, by a 1x1x1 convolution (DTC)."""

    def __init__(self, trunk: UNet3D) -> None:
        super().__init__()
        self.conv = nn.Conv3d(trunk.embedding_width, trunk.num_classes - 1, kernel_size=1)
        self.apply(he_initialise)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, E, Z, Y, X] -> [B, K - 1, Z, Y, X] before the tanh."""
        out: Tensor = self.conv(embeddings)
        return out
