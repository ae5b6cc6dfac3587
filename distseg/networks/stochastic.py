"""Several stochastic passes of a network over the same images: dropout on, fresh input noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distseg.networks.dropout import dropout_active, keyed
from distseg.networks.unet import NetworkOutput, UNet3D

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
    (output,) = pass_outputs(
        network,
        image,
        passes=passes,
        at_once=passes,
        noise_sigma=noise_sigma,
        noise_clip=noise_clip,
        generators=generators,
    )
    return output.logits.view(passes, image.shape[0], *output.logits.shape[1:])


def pass_outputs(
    network: UNet3D,
    image: Tensor,
    *,
    passes: int,
    at_once: int,
    noise_sigma: float,
    noise_clip: float | None = None,
    generators: Generators | None = None,
) -> Iterator[NetworkOutput]:
    """The passes of `stochastic_logits`, `at_once` of them a time as one batch [m * B, ...], pass by pass: memory for
    a few passes instead of all."""
    batch = image.shape[0]
    features: list[Tensor] | None = None
    for first in range(0, passes, at_once):
        count = min(at_once, passes - first)
        drawn = None if generators is None else generators[first * batch : (first + count) * batch]
        with dropout_active(network), keyed(network, drawn):
            if network.dropout == "decoder":
                if features is None:
                    noisy = add_noise(image, noise_sigma, noise_clip, None if drawn is None else drawn[:batch])
                    features = network.encode(noisy)
                output = network.decode([f.repeat(count, 1, 1, 1, 1) for f in features])
            else:
                output = network(add_noise(image.repeat(count, 1, 1, 1, 1), noise_sigma, noise_clip, drawn))
        yield output


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
