"""Several stochastic passes of a network over the same images: dropout on, fresh input noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distseg.networks.dropout import dropout_active, keyed
from distseg.networks.unet import UNet3D

Generators = Sequence[torch.Generator]


def stochastic_logits(
    network: UNet3D,
    image: Tensor,
    *,
    passes: int,
    noise_sigma: float,
    noise_clip: float | None = None,
    generators: Generators | None = None,
) -> Tensor:
    """`passes` logits with dropout on and input noise: [B, 1, Z, Y, X] -> [M, B, K, Z, Y, X].

    With dropout in the decoder alone the encoder runs once, on one draw of noise, for all passes.

    Args:
        generators: M * B of them, pass by pass; None draws from torch's global generator.
    """
    batch = image.shape[0]
    with dropout_active(network), keyed(network, generators):
        if network.dropout == "decoder":
            first = None if generators is None else generators[:batch]
            features = network.encode(add_noise(image, noise_sigma, noise_clip, first))
            output = network.decode([f.repeat(passes, 1, 1, 1, 1) for f in features])
        else:
            repeated = image.repeat(passes, 1, 1, 1, 1)
            output = network(add_noise(repeated, noise_sigma, noise_clip, generators))
    return output.logits.view(passes, batch, *output.logits.shape[1:])


def add_noise(image: Tensor, sigma: float, clip: float | None = None, generators: Generators | None = None) -> Tensor:
    """image [B, ...] + N(0, sigma^2), the noise clipped to +-clip where given. Intensities are z-scored."""
    if sigma == 0:
        return image
    if generators is None:
        noise = torch.randn_like(image)
    else:
        noise = torch.stack([torch.randn(x.shape, generator=g, dtype=x.dtype, device=x.device)
                             for x, g in zip(image, generators, strict=True)])  # fmt: skip
    noise *= sigma
    if clip is not None:
        noise.clamp_(-clip, clip)
    return image + noise
