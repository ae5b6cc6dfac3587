"""3D U-Net (Cicek et al., MICCAI 2016) of MONAI blocks that also returns its last decoder map, the embedding.

Shapes: B batch, C channels, K classes, E embedding width, Z Y X voxels.

Departures from Cicek: instance norm in place of batch norm, so that no statistics cross samples (DESIGN section 5);
dropout by element after every convolution but the output's (Xie et al. 2024, section 3.2; METHOD section 2b).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from monai.networks.blocks.convolutions import Convolution
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distseg.networks import dropout as _registers_keyed  # noqa: F401  # MONAI's factory learns "keyed" on import


class NetworkOutput(NamedTuple):
    logits: Tensor  # [B, K, Z, Y, X]
    embeddings: Tensor  # [B, E, Z, Y, X]: the map before the last 1x1x1 convolution


class UNet3D(nn.Module):
    """`levels` resolutions, f = base_filters; the last decoder map, the embedding, is E = 2 f wide.

    Args:
        widening: "within" is Cicek's: the two convolutions of encoder level l have f 2^l and 2 f 2^l filters, so its
            half-size network has f = 16. "between": both have f 2^l; a third of the cost, for CPUs.
        dropout: "all" puts dropout after every convolution but the output's; "decoder" only in the decoder, so that
            Monte-Carlo passes share one encoder pass.
        activation_checkpointing: recompute each level in the backward pass instead of keeping its maps.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        base_filters: int,
        levels: int,
        widening: str = "within",
        dropout: str = "all",
        dropout_rate: float = 0.15,
        in_channels: int = 1,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dropout, self.dropout_rate = dropout, dropout_rate
        self.num_classes = num_classes
        self.stride = 2 ** (levels - 1)
        self.activation_checkpointing = activation_checkpointing
        encoder_rate = dropout_rate if dropout == "all" else 0.0
        first = [base_filters * 2**level for level in range(levels)]  # filters of each level's first convolution
        second = [2 * f for f in first] if widening == "within" else first
        self.encoder = nn.ModuleList(
            _level(below, a, b, encoder_rate)
            for below, a, b in zip([in_channels, *second], first, second, strict=False)
        )
        self.pool = nn.MaxPool3d(2)
        self.embedding_width = 2 * base_filters
        self.encoder_widths = tuple(second)  # of each level's encoder map, finest first
        self.decoder_widths = (self.embedding_width, *second[1:])  # of each level's last map
        self.up, self.decoder = decoder_stack(self.encoder_widths, self.decoder_widths, dropout_rate)
        self.head = nn.Conv3d(self.embedding_width, num_classes, kernel_size=1)
        self.apply(he_initialise)

    def encode(self, x: Tensor) -> list[Tensor]:
        """[B, C, Z, Y, X] -> one map a level, finest first."""
        features = [self._run(self.encoder[0], x)]
        for level in self.encoder[1:]:
            features.append(self._run(level, self.pool(features[-1])))
        return features

    def decode(self, features: list[Tensor]) -> NetworkOutput:
        """The encoder's maps -> logits and embeddings at full resolution."""
        y = features[-1]
        for up, level, skip in zip(self.up, self.decoder, reversed(features[:-1]), strict=True):
            y = self._run(level, torch.cat([skip, up(y)], dim=1))
        return NetworkOutput(self.head(y), y)

    def forward(self, x: Tensor) -> NetworkOutput:
        return self.decode(self.encode(x))

    def _run(self, level: nn.Module, x: Tensor) -> Tensor:
        return run_level(level, x, recompute=self.activation_checkpointing)


def decoder_stack(skips: Sequence[int], widths: Sequence[int], rate: float) -> tuple[nn.ModuleList, nn.ModuleList]:
    """A decoder's up-convolutions and levels, coarsest first.

    Args:
        skips: channels that each level but the coarsest takes from the encoder, finest first; 0 where it takes none.
        widths: of each level's last map, finest first, the coarsest being the encoder's.
    """
    up = nn.ModuleList(_block(width, width, rate, transposed=True) for width in reversed(widths[1:]))
    levels = nn.ModuleList(
        _level(skip + above, width, width, rate)
        for skip, above, width in reversed(list(zip(skips, widths[1:], widths, strict=False)))
    )
    return up, levels


def run_level(level: nn.Module, x: Tensor, *, recompute: bool) -> Tensor:
    """`recompute`: in the backward pass, instead of keeping the level's maps."""
    out: Tensor = checkpoint(level, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else level(x)
    return out


def _block(in_channels: int, out_channels: int, rate: float, *, transposed: bool = False) -> nn.Module:
    return Convolution(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=2 if transposed else 3,
        strides=2 if transposed else 1,
        padding=0 if transposed else 1,
        output_padding=0 if transposed else None,
        is_transposed=transposed,
        bias=False,  # instance norm takes it out again; its gradient is rounding noise that Adam would scale up
        adn_ordering="NAD",
        act="RELU",
        norm=("INSTANCE", {"affine": True}),
        dropout=("keyed", {"p": rate}) if rate else None,
        dropout_dim=1,  # by element
    )


def _level(in_channels: int, middle: int, out_channels: int, rate: float) -> nn.Module:
    return nn.Sequential(_block(in_channels, middle, rate), _block(middle, out_channels, rate))


def he_initialise(module: nn.Module) -> None:
    """He et al. 2015 for convolutions, zeros for their biases; for `Module.apply`."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
