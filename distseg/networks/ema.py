"""The teacher: an exponential moving average of the student (Tarvainen and Valpola 2017; METHOD section 2b)."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def make_teacher(student: Network) -> Network:
    """A copy without gradients, in eval mode."""
    teacher = copy.deepcopy(student).eval()
    teacher.requires_grad_(False)
    return teacher


def ema_decay(step: int, decay: float) -> float:
    """min(1 - 1/(T + 1), decay) for T from 1: a plain running average until it reaches `decay`."""
    return min(1.0 - 1.0 / (step + 1), decay)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, *, decay: float) -> None:
    """teacher := decay x teacher + (1 - decay) x student, in place; buffers are copied."""
    theirs: list[torch.Tensor] = list(teacher.parameters())
    torch._foreach_lerp_(theirs, [p.detach() for p in student.parameters()], 1.0 - decay)
    for ours, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        ours.copy_(buffer)
