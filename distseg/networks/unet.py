"""3D U-Net (Cicek et al., MICCAI 2016) of MONAI blocks that also returns its last decoder map, the embedding.

Shapes: B batch, C channels, K classes, E embedding width, Z Y X voxels.

Departures from Cicek: instance norm in place of batch norm, so that no statistics cross samples (DESIGN section 5);
dropout by element after every convolution but the output's (Xie et al. 2024, section 3.2; METHOD section 2b).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from monai.networks.blocks.acti_norm import ADN
from monai.networks.blocks.convolutions import Convolution
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distseg.networks import dropout as _registers_keyed  # noqa: F401  # MONAI's factory learns "keyed" on import

PASSES = ("encode", "decode", "before_dropout", "after_dropout")  # the network's own parts of a forward pass


class NetworkOutput(NamedTuple):
    logits: Tensor  # [B, K, Z, Y, X]
    embeddings: Tensor  # [B, E, Z, Y, X]: the map before the last 1x1x1 convolution


class UNet3D(nn.Module):
    """`levels` resolutions, f = base_filters; the last decoder map, the embedding, is E = 2 f wide.

    Args:
        widening: "within" is Cicek's: the two convolutions of encoder level l have f 2^l and 2 f 2^l filters, so its
            half-size network has f = 16. "between": both have f 2^l; a third of the cost, for CPUs.
        dropout: "all" puts dropout after every convolution but the output's; "decoder" only in the decoder and "last"
            only after the finest decoder level's convolutions, so that Monte-Carlo passes share what comes before.
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
        up, decoder = decoder_stack(self.encoder_widths, self.decoder_widths, dropout_rate)
        self.up, self.decoder = nn.ModuleList(up), nn.ModuleList(decoder)
        self.head = nn.Conv3d(self.embedding_width, num_classes, kernel_size=1)
        self.apply(he_initialise)
        if dropout == "last":
            remove_dropout(self.up, self.decoder[:-1])

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

    def before_dropout(self, x: Tensor) -> list[Tensor]:
        """Maps that passes with other dropout masks share, for `after_dropout`.

        "decoder": the deepest map, and for each decoder level, coarsest first, what its first convolution makes of the
        skip: it is linear, so the skip's part and the part from below are computed apart and added. "last": the finest
        level's map before its first dropout.
        """
        features = self.encode(x)
        skips = features[-2::-1]
        if self.dropout == "decoder":
            return [features[-1], *(_part_of(level, s, 0) for level, s in zip(self.decoder, skips, strict=True))]
        y = features[-1]
        for up, level, skip in zip(self.up, self.decoder, skips, strict=True):
            y = torch.cat([skip, up(y)], dim=1)
            y = level(y) if level is not self.decoder[-1] else _blocks(level)[0].conv(y)
        return [_normed(_blocks(self.decoder[-1])[0], y)]

    def after_dropout(self, shared: list[Tensor]) -> NetworkOutput:
        """One pass from the maps of `before_dropout`, repeated along the batch for several."""
        if self.dropout == "decoder":
            y, *skips = shared
            for up, level, skip in zip(self.up, self.decoder, skips, strict=True):
                below = up(y)
                first, second = _blocks(level)
                y = second(first.adn(_part_of(level, below, first.conv.in_channels - below.shape[1]).add_(skip)))
        else:
            first, second = _blocks(self.decoder[-1])
            y = second(first.adn.D(shared[0]))
        return NetworkOutput(self.head(y), y)

    def _run(self, level: nn.Module, x: Tensor) -> Tensor:
        return run_level(level, x, recompute=self.activation_checkpointing)


def decoder_stack(skips: Sequence[int], widths: Sequence[int], rate: float) -> tuple[list[nn.Module], list[nn.Module]]:
    """A decoder's up-convolutions and levels, coarsest first.

    Args:
        skips: channels that each level but the coarsest takes from the encoder, finest first; 0 where it takes none.
        widths: of each level's last map, finest first, the coarsest being the encoder's.
    """
    up = [_block(width, width, rate, transposed=True) for width in reversed(widths[1:])]
    levels = [
        _level(skip + above, width, width, rate)
        for skip, above, width in reversed(list(zip(skips, widths[1:], widths, strict=False)))
    ]
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


def remove_dropout(*parts: nn.Module) -> None:
    for part in parts:
        for module in part.modules():
            if isinstance(module, ADN) and hasattr(module, "D"):
                del module.D


def _part_of(level: nn.Module, x: Tensor, start: int) -> Tensor:
    """What the first convolution of `level` makes of the channels `x`, of which `start` is the first."""
    conv = _blocks(level)[0].conv
    return functional.conv3d(x, conv.weight[:, start : start + x.shape[1]], padding=conv.padding)


def _blocks(level: nn.Module) -> tuple[Any, Any]:
    """A level's two blocks, MONAI's Convolutions: `conv`, then `adn`. MONAI has no types."""
    first, second = cast(nn.Sequential, level)
    return first, second


def _normed(block: Any, x: Tensor) -> Tensor:
    """What follows the convolution of `block`, without its dropout, which comes last."""
    for name, layer in block.adn.named_children():
        x = layer(x) if name != "D" else x
    return x


def he_initialise(module: nn.Module) -> None:
    """He et al. 2015 for convolutions, zeros for their biases; for `Module.apply`."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
