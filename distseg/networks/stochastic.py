"""Several stochastic passes of a network over the same images: dropout on, fresh input noise.

Shapes: B images, M passes, K classes, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distseg.networks.dropout import dropout_active, keyed
from distseg.networks.unet import NetworkOutput, UNet3D

Generators = Sequence[torch.Generator]

# Voxels of input that run as one batch. On a CPU two patches of 32^3: the maps of more leave the cache, and what is
# larger than 32 MB the allocator gives back to the system and faults in again, together a factor of two; fewer than two
# images would miss the fast convolutions (tests/bench/RESULTS.md). On a GPU sixteen patches of 96^3 fill the device.
_VOXELS_AT_ONCE = {"cpu": 2 * 32**3, "cuda": 16 * 96**3}


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

    Where dropout begins late (`network.dropout`), all before it runs once, on one draw of noise, for all passes. As
    many passes run as one batch as the device is fast with, so memory does not grow with M, but for the logits.

    Args:
        generators: M * B of them, pass by pass; None draws from torch's global generator.
    """
    outputs = pass_outputs(
        network, image, passes=passes, noise_sigma=noise_sigma, noise_clip=noise_clip, generators=generators
    )
    logits = torch.cat([output.logits for output in outputs])
    return logits.view(passes, image.shape[0], *logits.shape[1:])


def pass_outputs(
    network: UNet3D,
    image: Tensor,
    *,
    passes: int,
    noise_sigma: float,
    noise_clip: float | None = None,
    generators: Generators | None = None,
) -> Iterator[NetworkOutput]:
    """The passes of `stochastic_logits`, a few at a time as one batch [m * B, ...], pass by pass."""
    batch = image.shape[0]
    shared: list[Tensor] | None = None
    for start, count in _groups(image, passes):
        draws = None if generators is None else generators[start * batch : (start + count) * batch]
        with dropout_active(network), keyed(network, draws):
            if network.dropout != "all":
                if shared is None:
                    first = None if draws is None else draws[:batch]
                    shared = network.before_dropout(add_noise(image, noise_sigma, noise_clip, first))
                output = network.after_dropout([_repeated(x, count) for x in shared])
            else:
                output = network(add_noise(_repeated(image, count), noise_sigma, noise_clip, draws))
        yield output


def _groups(image: Tensor, passes: int) -> Iterator[tuple[int, int]]:
    """First pass and number of passes of each batch; of nearly equal size, so that none is left with one image."""
    voxels = image.shape[0] * image[0].numel()
    at_once = max(1, _VOXELS_AT_ONCE.get(image.device.type, voxels) // voxels)
    parts = max(1, passes // max(at_once, -(-2 // image.shape[0])))
    starts = [passes * part // parts for part in range(parts + 1)]
    yield from ((first, after - first) for first, after in pairwise(starts))


def _repeated(x: Tensor, count: int) -> Tensor:
    return x if count == 1 else x.repeat(count, 1, 1, 1, 1)


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
