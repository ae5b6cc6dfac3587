"""Dropout whose masks belong to a sample's key, and Monte-Carlo passes with nothing but dropout switched on.

With a generator per sample, a sample's masks do not depend on what else is in its batch: slots can be batched as the
machine likes and one worker computes what two would (DESIGN section 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from monai.networks.layers.factories import Dropout as MonaiDropout
from torch import Tensor, nn
from torch.nn import functional

from distseg.errors import ConfigError

_BITS = 16  # random bits per element: the rate is exact to 2^-16


class KeyedDropout(nn.Dropout):
    """Dropout by element. With `generators` set (see `keyed`), sample b draws from generators[b]."""

    generators: Sequence[torch.Generator] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x is [B, C, Z, Y, X]."""
        if self.training and self.generators is not None:
            return self.by_key(x)
        return functional.dropout(x, self.p, self.training)

    def by_key(self, x: Tensor) -> Tensor:
        assert self.generators is not None, "forward has looked"
        if len(self.generators) != x.shape[0]:
            raise ValueError(f"{len(self.generators)} generators for a batch of {x.shape[0]}")
        dropped = round(self.p * 2**_BITS)
        keep = torch.stack([_random_int16(x[0], g) >= dropped - 2 ** (_BITS - 1) for g in self.generators])
        return x * keep.to(x.dtype).mul_(2**_BITS / (2**_BITS - dropped))


def _random_int16(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform 16-bit numbers, four to a draw: on CPU several times faster than bernoulli_, which was 11 % of a step."""
    draws = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)  # None: the full range
    return draws.view(torch.int16)[: like.numel()].view(like.shape)


@MonaiDropout.factory_function("keyed")
def _keyed_dropout(_dim: int) -> type[KeyedDropout]:
    """Registered with MONAI's layer factory, so that its blocks can be built with it."""
    return KeyedDropout


@contextmanager
def keyed(network: nn.Module, generators: Sequence[torch.Generator] | None) -> Iterator[None]:
    """Inside, each sample's dropout masks come from its own generator, layer after layer. None: torch's global one."""
    layers = [m for m in network.modules() if isinstance(m, KeyedDropout)]
    for layer in layers:
        layer.generators = generators
    try:
        yield
    finally:
        for layer in layers:
            layer.generators = None


@contextmanager
def dropout_active(network: nn.Module) -> Iterator[None]:
    """Inside, the network's dropout is in train mode; everything else stays as it was (METHOD trap 5).

    Raises ConfigError if the network has none: its passes would all be the same.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    if not layers:
        raise ConfigError(
            "Monte-Carlo passes need dropout and the network has none",
            where="network.dropout_rate",
            fix="set network.dropout_rate=0.15",
        )
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.train(True)
    try:
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.train(mode)
