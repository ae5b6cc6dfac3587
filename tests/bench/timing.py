"""Timing several functions side by side: interleaved rounds, so that a machine that drifts drifts for all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call: minimum, median and maximum over rounds."""

    minimum: float
    median: float
    maximum: float


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    now: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Call each function once a round, in turn, after one round that is not counted. `now`: None for the device's
    clock; the wall's where a function waits for another process."""
    now = now or clock_of(device)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            _wait(device)
            begun = now()
            function()
            _wait(device)
            if number:
                seconds[name].append(now() - begun)
    return {n: Timing(min(s), statistics.median(s), max(s)) for n, s in seconds.items()}


def clock_of(device: torch.device) -> Callable[[], float]:
    """One thread on a CPU is timed by the CPU time of the process, which other processes on the core do not lengthen
    but for the cache they take; anything else by the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def clock_name(device: torch.device) -> str:
    return "CPU time" if clock_of(device) is time.process_time else "wall time"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
