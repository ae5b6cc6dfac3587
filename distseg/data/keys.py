"""Counter-based random numbers: what happens at (seed, purpose, step, slot, ...) depends on nothing else.

So there is no sampler state to save, a resumed run is the run, and one worker draws what two would (DESIGN section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a key's draws are for; the numbers are part of every run's identity, so never renumber them."""

    SUBSET = 1
    INITIAL_WEIGHTS = 2
    LABELLED_PATCH = 3
    UNLABELLED_PATCH = 4
    REFERENCE_PATCH = 5
    REFERENCES = 6
    STUDENT_LABELLED = 7
    STUDENT_UNLABELLED = 8
    TEACHER = 9
    VALIDATION = 10
    DOUBT = 11
    BANK_PATCH = 12
    BANK_PASSES = 13
    BANK_VOXELS = 14
    BANK_INDEX = 15
    HEAD_WEIGHTS = 20
    HEADS = 21
    LABELLED_PATCHES = 22
    LABEL = 23  # the teacher's passes over a whole scan
    NEXT_TO_LABEL = 24
    TRIAL = 25
    PERTURB = 26
    PSEUDO_VOXELS = 27


def _sequence(seed: int, purpose: Purpose, counters: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy=seed, spawn_key=(int(purpose), *counters))


def generator(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """A Philox generator of its own for this key."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, counters)))


def torch_generators(
    seed: int, purpose: Purpose, step: int, slots: Sequence[int], passes: int = 1
) -> list[torch.Generator]:
    """One CPU generator for every (pass, slot), pass by pass."""
    return [
        torch.Generator().manual_seed(torch_seed(seed, purpose, step, slot, number))
        for number in range(passes)
        for slot in slots
    ]


def torch_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """A seed for `torch.manual_seed` for this key."""
    return int(_sequence(seed, purpose, counters).generate_state(1, np.uint64)[0] >> 1)
