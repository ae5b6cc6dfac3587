"""Banks by version: what each holds and which steps it serves.

Version v holds embeddings by the teacher after step v R (R = references.every_steps) and serves steps (v + 1) R + 1 to
(v + 2) R, so that it can be made while R steps go by; version 0 is made before step 1 and serves steps 1 to 2 R. Which
version a step uses depends on its number alone, never on what has arrived. Every version is on disk before the first
step that uses it, and before any checkpoint that a later step could resume from.

    RUN/bank/v_0003/   matching/bank.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from distseg.matching.bank import Bank
from distseg.networks.unet import UNet3D
from distseg.training.bank_builder import Piece, ReferenceBuilder
from distseg.training.bank_folder import ServiceSettings
from distseg.training.reduce import Communicator


def version_serving(step: int, every_steps: int) -> int:
    """The version that step `step` (from 1) uses."""
    return max(0, (step - 1) // every_steps - 1)


def newest_version_after(step: int, every_steps: int) -> int:
    """The newest version there is once `step` steps are done."""
    return step // every_steps


class ReferenceService(Protocol):
    """Where banks come from: each rank offers its share of a version and later takes the whole."""

    def has(self, version: int) -> bool:
        """Whether the version is on disk already, as after a resume. The same answer on all ranks, which all ask."""

    def offer(self, version: int, step: int, pieces: list[Piece]) -> None:
        """Give this rank's share. All ranks must call; need not wait."""

    def take(self, version: int) -> Bank:
        """The bank, waiting until it is there. Raises DataError where it can never be."""

    def settle(self, version: int) -> None:
        """Wait until `version`, offered before, is on disk. All ranks must call."""

    def discard(self, *, before: int | None = None, after: int | None = None) -> None:
        """Remove versions from disk that no step will use again. Rank 0 only."""


# How a launcher makes its service: `LocalReferences` in one process or under torchrun, Ray's otherwise.
MakeReferenceService = Callable[[ServiceSettings], ReferenceService]


class Banks:
    """The versions of one run, as the loop and the method see them."""

    def __init__(
        self, builder: ReferenceBuilder, service: ReferenceService, *, every_steps: int, communicator: Communicator
    ) -> None:
        self._builder, self._service, self._every = builder, service, every_steps
        self._rank, self._world_size = communicator.rank, communicator.world_size
        self._current: Bank | None = None
        self._waited_s = 0.0

    def start(self, first_step: int, teacher: UNet3D) -> None:
        """Before step `first_step`: version 0 of a fresh run; nothing left over of steps that will be done again."""
        if first_step == 1:
            self.refresh_after(0, teacher)
        elif self._rank == 0:
            self._service.discard(after=newest_version_after(first_step - 1, self._every))

    def refresh_after(self, step: int, teacher: UNet3D) -> None:
        """Embed this rank's share of the version that is due after `step`, if one is. All ranks must call."""
        version = step // self._every
        if step % self._every == 0 and not self._service.has(version):
            pieces = self._builder.pieces(teacher, version, rank=self._rank, world_size=self._world_size)
            self._service.offer(version, step, pieces)

    def serving(self, step: int) -> Bank:
        """The bank that step `step` uses; waits for it where it is not there yet."""
        version = version_serving(step, self._every)
        if self._current is None or self._current.version != version:
            begun = time.perf_counter()
            self._current = self._service.take(version)
            self._waited_s += time.perf_counter() - begun
        return self._current

    def waited_s(self) -> float:
        """Seconds spent waiting for versions, their reading included, since this was last asked."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def settle(self, step: int) -> None:
        """Before a checkpoint of `step`: what a run resumed from it will ask for is on disk. All ranks must call."""
        self._service.settle(newest_version_after(step, self._every))

    def prune(self, oldest_checkpoint: int) -> None:
        """Remove what no run resumed from a checkpoint of that step or later will ask for. Rank 0 only."""
        self._service.discard(before=version_serving(oldest_checkpoint + 1, self._every))
