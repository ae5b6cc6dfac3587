"""When a checkpoint is due by the clock. Rank 0's clock decides, and all ranks learn of it at the same step."""

from __future__ import annotations

import time

import torch

from distseg.training.reduce import Communicator

ASK_EVERY_STEPS = 10  # an answer is a sum over ranks, which a GPU is waited for


class CheckpointTimer:
    """`every_minutes`: None never; counted from the last checkpoint, whatever was its reason."""

    def __init__(self, every_minutes: float | None, communicator: Communicator, device: torch.device) -> None:
        self._after_s = None if every_minutes is None else 60 * every_minutes
        self._communicator, self._device = communicator, device
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Asked after every step. A collective: all ranks must call."""
        if self._after_s is None or step % ASK_EVERY_STEPS:
            return False
        late = self._communicator.rank == 0 and time.monotonic() - self._since >= self._after_s
        answer = torch.tensor(float(late), device=self._device)
        self._communicator.all_reduce_sum(answer)
        return bool(answer)
