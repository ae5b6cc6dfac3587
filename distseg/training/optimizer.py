"""Adam as every run has it, and its state put back in the order its parameters lie in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distseg.config.schema import OptimizerConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam, fused: one kernel over all parameters."""
    return torch.optim.Adam(parameters, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)


def step_where_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step of an optimizer of `make_optimizer`, or none where `finite` (bool []) is false: its kernel looks itself,
    so that no GPU is waited for."""
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # how torch's own GradScaler tells it
    optimizer.step()


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a checkpoint's optimizer state.

    A run may branch from one with another `train.channels_last`. The fused kernel walks parameter, gradient and moments
    in the order they lie in memory, so moments get their parameter's strides.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
