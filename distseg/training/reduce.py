"""All of a step's sums over slots, gradients and logged numbers alike, in one flat buffer and one all-reduce.

Gradients are views into the buffer, so nothing is copied. One sum in a fixed order makes a step's result independent
of buckets and hooks, which DistributedDataParallel's would not be after a rebuild.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

LOGGED_CAPACITY = 64  # numbers beside the gradients


class Communicator(Protocol):
    """The process group as the loop needs it."""

    rank: int
    world_size: int

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum in place over ranks. All ranks must call."""

    def barrier(self) -> None:
        """All ranks must call."""


class SingleProcess:
    """One process: nothing to sum, nobody to wait for."""

    rank, world_size = 0, 1

    def all_reduce_sum(self, tensor: Tensor) -> None:
        pass

    def barrier(self) -> None:
        pass


class TorchDistributed:
    """torch.distributed's default process group, already initialised by Ray Train or torchrun."""

    def __init__(self) -> None:
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def all_reduce_sum(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    def barrier(self) -> None:
        torch.distributed.barrier()


class FlatGradients:
    """Makes every parameter's `.grad` a view into one buffer with a tail for logged numbers."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = [p for p in parameters if p.requires_grad]
        total = sum(p.numel() for p in parameters)
        first = parameters[0]
        self._buffer = torch.zeros(total + LOGGED_CAPACITY, dtype=first.dtype, device=first.device)
        offset = 0
        for parameter in parameters:
            # With the parameter's own strides: fused optimizers walk both in the order they lie in memory.
            parameter.grad = self._buffer.as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()
        self._tail = self._buffer[total:]

    @property
    def nbytes(self) -> int:
        """What ranks sum each step."""
        return self._buffer.nbytes

    def zero(self) -> None:
        self._buffer.zero_()

    def sum_over_ranks(self, communicator: Communicator, logged: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum gradients and `logged` scalars over ranks; returns the summed scalars. All ranks must call, with the
        same names in the same order."""
        if len(logged) > LOGGED_CAPACITY:
            raise ValueError(f"{len(logged)} logged numbers, room for {LOGGED_CAPACITY}")
        if logged:
            self._tail[: len(logged)] = torch.stack([v.to(self._tail.dtype) for v in logged.values()])
        communicator.all_reduce_sum(self._buffer)
        return dict(zip(logged, self._tail[: len(logged)].clone(), strict=True))
