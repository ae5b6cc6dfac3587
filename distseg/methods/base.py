"""The contract between the step and a method.

A step asks a method twice: `teach` runs the teacher, without gradient, and returns targets; `terms` compares the
student's output on the unlabelled patch with them. Every term and statistic is one value per slot, [B].

Shapes: B slots, M passes, K classes, E embedding width, Z Y X voxels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distseg.config.schema import MethodConfig
from distseg.data.batch import Batch
from distseg.matching.bank import Bank
from distseg.networks.stochastic import Generators, stochastic_logits
from distseg.networks.unet import NetworkOutput, UNet3D


class At(NamedTuple):
    """Where a run stands: `step` runs from 1 to `total_steps` (T and T_N)."""

    step: int
    total_steps: int


class Share(NamedTuple):
    """A ratio whose parts add up over slots and ranks: [B] each."""

    part: Tensor
    whole: Tensor


class Queries(NamedTuple):
    """Voxels of each slot that are matched against a bank; `valid` is False where a slot has fewer than Q."""

    voxels: Tensor  # int64 [B, Q], flat indices
    valid: Tensor  # bool [B, Q]


@dataclass(frozen=True)
class Targets:
    """What the teacher asks of the student on the unlabelled patches; a method fills in what it uses."""

    label: Tensor | None = None  # int64 [B, Z, Y, X], the teacher's pseudo-label
    reliable: Tensor | None = None  # bool [B, Z, Y, X]
    logits: Tensor | None = None  # [B, K, Z, Y, X], of a consistency target
    references: Tensor | None = None  # prototypes [B, K, E], or each reference [B, K, R, E]
    queries: Queries | None = None
    query_vectors: Tensor | None = None  # [B, Q, E], the teacher's, where it is its embeddings that are matched
    entropy_queries: Queries | None = None  # of L_EN where it is taken over all voxels
    bank: Bank | None = None
    present: Tensor | None = None  # bool [B, K], classes with references
    hidden: Tensor | None = None  # int64 [B, Z, Y, X], diagnostics only, -1 unknown
    threshold_nats: Tensor | None = None  # [B]


@dataclass(frozen=True)
class Terms:
    """Loss terms, [B] each, and shares to log."""

    losses: dict[str, Tensor]
    shares: dict[str, Share] = field(default_factory=dict)


class Method(ABC):
    """One way of learning from unlabelled patches."""

    uses_unlabelled = True
    needs_references = False  # of the slot's labelled patch
    needs_bank = False

    def __init__(self, config: MethodConfig, *, num_classes: int) -> None:
        self.config, self.num_classes = config, num_classes

    @abstractmethod
    def weights(self, at: At) -> dict[str, float]:
        """Term name -> weight at this step."""

    @property
    def teacher_passes(self) -> int:
        """Stochastic forward passes of the teacher over each unlabelled patch, a step."""
        return 0

    def stochastic_passes(self, teacher: UNet3D, batch: Batch, generators: Generators | None) -> Tensor:
        """The teacher's `teacher_passes` passes over the unlabelled patches: logits [M, B, K, Z, Y, X]."""
        return stochastic_logits(
            teacher,
            batch.unlabelled_image,
            passes=self.teacher_passes,
            noise_sigma=self.config.teacher_noise_sigma,
            noise_clip=self.config.teacher_noise_clip,
            generators=generators,
        )

    @abstractmethod
    def teach(self, teacher: UNet3D, batch: Batch, at: At, generators: Generators | None) -> Targets:
        """Run the teacher. `generators`: one for every (pass, slot), or None for torch's global one."""

    @abstractmethod
    def terms(self, output: NetworkOutput, targets: Targets) -> Terms:
        """Compare the student's output on the unlabelled patches with the targets; gradient to the student alone."""


def share(mask: Tensor) -> Share:
    """The share of True voxels of a mask [B, Z, Y, X]."""
    flat = mask.flatten(1)
    return Share(flat.sum(1), torch.full_like(flat[:, 0], flat.shape[1], dtype=torch.int64))
