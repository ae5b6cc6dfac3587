"""All of a step's sums over slots, gradients and logged numbers alike, in one flat buffer and one all-reduce.

Gradients are views into the buffer, so nothing is copied. One sum in a fixed order makes a step's result independent
of buckets and hooks, which DistributedDataParallel's would not be after a rebuild.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from distseg.errors import WorkersLostError

LOGGED_CAPACITY = 64  # numbers beside the gradients
ROLL_CALL_S = 20.0
LINGER_S = 5.0  # that rank 0, in which the store may live, waits for the others to hear who is lost
_NOT_OF_A_GROUP = (torch.OutOfMemoryError, torch.AcceleratorError)  # RuntimeErrors of this rank's own


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
    """torch.distributed's default process group, already initialised by Ray Train or torchrun.

    Where it gives up (its timeout is `train.worker_timeout_s`) the ranks that are still there say so to each other:
    the others are named. Raises WorkersLostError.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._calls = 0  # the same number on all ranks

    def all_reduce_sum(self, tensor: Tensor) -> None:
        with self._lost_ones_named():
            torch.distributed.all_reduce(tensor)

    def barrier(self) -> None:
        with self._lost_ones_named():
            torch.distributed.barrier()

    @contextmanager
    def _lost_ones_named(self) -> Iterator[None]:
        self._calls += 1
        try:
            yield
        except _NOT_OF_A_GROUP:
            raise
        except RuntimeError as error:  # all that torch.distributed raises
            why = str(error).splitlines()[0]
            lost = self._lost()
            if lost:
                alone = len(lost) == 1
                fate = "it may hang or have died" if alone else "one may hang or have died, and others wait for it"
                raise WorkersLostError(lost, f"{fate}; {why}") from error
            raise

    def _lost(self) -> list[int]:
        """As `_roll_call`; rank 0 where its store does not even refuse: it lives there, unless torchrun keeps it."""
        answers: list[list[int]] = []
        asking = threading.Thread(target=lambda: answers.append(self._roll_call()), daemon=True)
        asking.start()
        asking.join(2 * ROLL_CALL_S)
        return answers[0] if answers else [0]

    def _roll_call(self) -> list[int]:
        """Ranks that do not say within a while that they gave up too. A collective of those that did."""
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set_timeout(datetime.timedelta(seconds=ROLL_CALL_S))
        keys = {rank: f"distseg/gave-up/{self._calls}/{rank}" for rank in range(self.world_size)}
        deadline = time.monotonic() + ROLL_CALL_S
        try:
            store.set(keys[self.rank], "1")
            while not store.check(list(keys.values())) and time.monotonic() < deadline:
                time.sleep(0.1)
            lost = [rank for rank, key in keys.items() if not store.check([key])]
            if lost and self.rank == 0:
                time.sleep(LINGER_S)
            return lost
        except RuntimeError:  # the store's
            return [0] if self.rank else []


class FlatGradients:
    """Makes every parameter's `.grad` a view into one buffer, with a tail for logged numbers and a number a slot.

    `broken` [slots]: where a rank puts 1 for a slot of its own whose loss is not finite.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, slots: int) -> None:
        parameters = [p for p in parameters if p.requires_grad]
        total = sum(p.numel() for p in parameters)
        first = parameters[0]
        self._buffer = torch.zeros(total + LOGGED_CAPACITY + slots, dtype=first.dtype, device=first.device)
        offset = 0
        for parameter in parameters:
            # With the parameter's own strides: fused optimizers walk both in the order they lie in memory.
            parameter.grad = self._buffer.as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()
        self._gradients, self._tail, self.broken = torch.split(self._buffer, [total, LOGGED_CAPACITY, slots])

    @property
    def nbytes(self) -> int:
        """What ranks sum each step."""
        return self._buffer.nbytes

    def zero(self) -> None:
        self._buffer.zero_()

    def finite(self) -> Tensor:
        """bool []: whether all gradients are, and with them the losses."""
        return torch.isfinite(self._gradients).all() & (self.broken == 0).all()

    def sum_over_ranks(self, communicator: Communicator, logged: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum gradients and `logged` scalars over ranks; returns the summed scalars. All ranks must call, with the
        same names in the same order."""
        if len(logged) > LOGGED_CAPACITY:
            raise ValueError(f"{len(logged)} logged numbers, room for {LOGGED_CAPACITY}")
        if logged:
            self._tail[: len(logged)] = torch.stack([v.to(self._tail.dtype) for v in logged.values()])
        communicator.all_reduce_sum(self._buffer)
        return dict(zip(logged, self._tail[: len(logged)].clone(), strict=True))
