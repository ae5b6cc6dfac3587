"""Perturbations of an encoder's maps (Ouali, Hudelot and Tami, CVPR 2020, section 3.2; BASELINES section 3).

Each takes a map [B, C, Z, Y, X] and draws for sample b from generators[b], or for all from torch's global generator
where there are none. So a slot's perturbation does not depend on what else is in its batch; the released code shares
one draw over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]
Perturbation = Callable[[Tensor, Generators | None], Tensor]

NOISE_REACH = 0.3
DROP_FROM, DROP_TO = 0.7, 0.9  # share of the largest activation from which places are dropped
CHANNEL_DROPOUT = 0.5


def feature_noise(features: Tensor, generators: Generators | None = None) -> Tensor:
    """F-Noise: z (1 + n), n uniform in +-0.3 for every channel and place."""
    return features * (1 + NOISE_REACH * (2 * _uniform(features, tuple(features.shape[1:]), generators) - 1))


def feature_drop(features: Tensor, generators: Generators | None = None) -> Tensor:
    """F-Drop: z where its mean over channels is below gamma times the sample's largest; gamma uniform in 0.7 to 0.9.

    So the most active places go.
    """
    attention = features.detach().mean(1, keepdim=True)  # [B, 1, Z, Y, X]
    gamma = DROP_FROM + (DROP_TO - DROP_FROM) * _uniform(features, (1, 1, 1, 1), generators)
    return features * (attention < gamma * attention.amax((2, 3, 4), keepdim=True)).to(features.dtype)


def channel_dropout(features: Tensor, generators: Generators | None = None) -> Tensor:
    """DropOut: whole channels, with probability 1/2; the others are doubled."""
    keep = _uniform(features, (features.shape[1], 1, 1, 1), generators) >= CHANNEL_DROPOUT
    return features * keep.to(features.dtype) / (1 - CHANNEL_DROPOUT)


def _uniform(like: Tensor, shape: tuple[int, ...], generators: Generators | None) -> Tensor:
    """Uniform in [0, 1), [B, *shape], of the type and on the device of `like`."""
    kind, device, batch = like.dtype, like.device, like.shape[0]
    if generators is None:
        return torch.rand((batch, *shape), dtype=kind, device=device)
    if len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for a batch of {batch}")
    return torch.stack([torch.rand(shape, generator=g, dtype=kind, device=device) for g in generators])
