"""The contract between the step and a method.

A step asks a method twice: `teach` runs the teacher, without gradient, and returns targets; `terms` compares the
student's output on the unlabelled patch with them. A method with heads, modules of the student that only training uses
(networks/heads.py), is asked twice more: `run_heads` runs them and `head_terms` gives their terms. Every term and
statistic is one value per slot, [B].

Shapes: B slots, M passes, K classes, E embedding width, Z Y X voxels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distseg.config.schema import MethodConfig
from distseg.data.batch import Batch
from distseg.losses.schedules import ramp_up
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


class Passes(NamedTuple):
    """What a method costs a slot and step, in passes over one patch: equal steps are not equal compute.

    `forward` and `backward` are of the whole network, `decoders` of auxiliary decoders, each forward and backward. A
    stochastic pass counts whole, though with network.dropout other than "all" they share a part.
    """

    forward: float
    backward: int
    decoders: int = 0

    def __str__(self) -> str:
        decoders = f", {self.decoders} decoders" if self.decoders else ""
        return f"{self.forward:.3g} forward, {self.backward} backward{decoders}"


@dataclass(frozen=True)
class StudentPass:
    """The student on the labelled and, where the method uses them, the unlabelled patches; in float32 or better."""

    labelled: NetworkOutput
    unlabelled: NetworkOutput | None
    heads: Tensor | None = None  # what `run_heads` returned


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

    def joined(self, other: Terms) -> Terms:
        return Terms({**self.losses, **other.losses}, {**self.shares, **other.shares})


class Method(ABC):
    """One way of learning from unlabelled patches."""

    uses_unlabelled = True
    needs_references = False  # of the slot's labelled patch
    needs_bank = False
    needs_distances = False  # signed distance maps of the labelled patches
    head_passes = 0  # auxiliary decoders that run over each slot, a step: their draws, and their cost
    max_classes: int | None = None  # with the background; None: as many as a cohort has

    def __init__(self, config: MethodConfig, *, num_classes: int) -> None:
        self.config, self.num_classes = config, num_classes

    @abstractmethod
    def weights(self, at: At) -> dict[str, float]:
        """Term name -> weight at this step."""

    @property
    def teacher_passes(self) -> int:
        """Stochastic forward passes of the teacher over each unlabelled patch, a step."""
        return 0

    @property
    def passes(self) -> Passes:
        """Its cost a slot and step, without the making of a bank (see `passes_per_step`)."""
        patches = 2 if self.uses_unlabelled else 1
        forward = patches + self.teacher_passes + (1 if self.needs_references else 0)
        return Passes(forward, backward=patches, decoders=self.head_passes)

    def consistency_weight(self, at: At) -> float:
        """`weight_consistency`, ramped up (Eq 1) over the first `consistency_ramp` of the run."""
        length = max(1, round(self.config.consistency_ramp * at.total_steps))
        return ramp_up(min(at.step, length), length, self.config.weight_consistency)

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

    def teach(self, teacher: UNet3D, batch: Batch, at: At, generators: Generators | None) -> Targets:
        """Run the teacher. `generators`: one for every (pass, slot), or None for torch's global one."""
        return Targets()

    def terms(self, output: NetworkOutput, targets: Targets) -> Terms:
        """Compare the student's output on the unlabelled patches with the targets; gradient to the student alone."""
        return Terms({})

    def make_heads(self, student: UNet3D) -> nn.Module | None:
        """Its heads beside this student, drawn from torch's global generator; None: it has none."""
        return None

    def run_heads(
        self, heads: nn.Module, features: list[Tensor], output: NetworkOutput, generators: Generators | None
    ) -> Tensor:
        """The heads on the student's maps of the labelled and then the unlabelled patches, [2 B, ...] each.

        `generators`: one for every (head pass, slot), or None for torch's global one.
        """
        raise TypeError(f"{type(self).__name__} makes no heads")

    def head_terms(self, seen: StudentPass, batch: Batch) -> Terms:
        """The terms that need the heads' output."""
        return Terms({})


def share(mask: Tensor) -> Share:
    """The share of True voxels of a mask [B, Z, Y, X]."""
    flat = mask.flatten(1)
    return Share(flat.sum(1), torch.full_like(flat[:, 0], flat.shape[1], dtype=torch.int64))
