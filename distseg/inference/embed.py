"""Teacher embeddings of labelled voxels: the references of one batch of patches.

Shapes: B patches, E embedding width, Z Y X voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distseg.losses.entropy import entropy_nats
from distseg.networks.stochastic import Generators, stochastic_logits
from distseg.networks.unet import UNet3D


@torch.inference_mode()
def embed_patches(
    network: UNet3D, images: Tensor, *, doubt_passes: int, noise_sigma: float, generators: Generators | None
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, E, Z, Y, X] of a deterministic pass without noise, and doubt [B, Z, Y, X]: entropy in nats of that
    pass or, with `doubt_passes`, the mean entropy of so many Monte-Carlo passes (Eq 2). Both on CPU.

    Args:
        images: [B, 1, Z, Y, X] on the network's device.
        generators: one for every (pass, patch), or None for torch's global one.
    """
    logits, embeddings = network(images)
    if doubt_passes:
        passes = stochastic_logits(network, images, passes=doubt_passes, noise_sigma=noise_sigma, generators=generators)
        doubt = entropy_nats(passes.float(), dim=2).mean(0)
    else:
        doubt = entropy_nats(logits.float(), dim=1)
    return embeddings.float().cpu(), doubt.cpu()
