"""Ramps and the reliability threshold as functions of the step (Xie et al. 2024, Eq 1 and section 2.1).

T runs from 1 to T_N = `total_steps`.
"""

from __future__ import annotations

import math


def ramp_up(step: int, total_steps: int, scale: float) -> float:
    """Eq 1: s exp(-5 (1 - T/T_N)^2)."""
    return scale * math.exp(-5.0 * (1.0 - step / total_steps) ** 2)


def threshold_nats(step: int, total_steps: int, num_classes: int) -> float:
    """lambda_T = [0.75 + ramp_up(T, 0.25)] ln C: rises to the largest entropy there is (METHOD trap 2)."""
    return (0.75 + ramp_up(step, total_steps, 0.25)) * math.log(num_classes)
