"""Where a step's time goes, by section, without synchronising a GPU inside the step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


class Clock:
    """Sums the seconds spent in named sections since the last `read`. On a GPU, by events that `read` waits for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stopped = False
        self._in_network = False
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Sections inside are not counted."""
        self._stopped = True
        try:
            yield
        finally:
            self._stopped = False

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        if self._stopped:
            yield
        elif self._on_gpu:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
            start.record()
            yield
            stop.record()
            self._events.append((name, start, stop))
        else:
            begun = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begun

    def watch(self, network: nn.Module, *passes: str) -> None:
        """Count every call of these methods of `network` under "network", whoever asks for it; a part of another one
        once."""
        for name in passes:
            setattr(network, name, self._timed(getattr(network, name)))

    def _timed(self, method: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*args: Any) -> Result:
            if self._in_network:
                return method(*args)
            self._in_network = True
            try:
                with self.section("network"):
                    return method(*args)
            finally:
                self._in_network = False

        return timed

    def read(self) -> dict[str, float]:
        """Seconds by section, and start again. Waits for the GPU."""
        for name, start, stop in self._events:
            stop.synchronize()
            self._seconds[name] += start.elapsed_time(stop) / 1e3
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds
