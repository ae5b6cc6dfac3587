"""Labelling by one and by two Ray actors, in turns, one thread each.

The scans of `label`, --scans of them (default 12, hard links where there are fewer files). Keys:
  label_actors.1.scans_per_s     from the first result to the last: without starting Ray, its actors and the network's
                                 first call, which a large cohort pays once
  label_actors.2.scans_per_s
  label_actors.2_over_1          of the medians; 2 is ideal, on two idle cores
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distseg.distributed.actor_pool import ActorPool
from distseg.work.executor import Executor
from tests.bench.label import Bench

SCANS, FEWEST = 12, 4  # below it nothing lies between a first and a last result of two actors


def run(
    trained: str | None = None, cohort: str | None = None, scans: int | None = None, rounds: int = 3
) -> dict[str, float]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    count = max(scans or SCANS, FEWEST)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as scratch:
        bench = Bench(Path(scratch), trained, cohort, count)
        folder = _linked(bench.images, Path(scratch) / "many", count)
        for _ in range(rounds):  # interleaved: a machine that drifts drifts for both alike
            for actors, taken in rates.items():
                taken.append(_scans_per_s(bench, folder, actors))
                Console().print(f"{actors} actors: {taken[-1]:.3f} scans a second")
    one, two = (statistics.median(rates[actors]) for actors in (1, 2))
    keys = {"label_actors.1.scans_per_s": one, "label_actors.2.scans_per_s": two, "label_actors.2_over_1": two / one}
    Console().print({key: round(value, 3) for key, value in keys.items()})
    return keys


def _linked(images: Path, folder: Path, count: int) -> Path:
    """A folder of `count` images."""
    folder.mkdir()
    sources = sorted(images.iterdir())
    for number in range(count):
        os.link(sources[number % len(sources)], folder / f"{number:03d}.nii.gz")
    return folder


def _scans_per_s(bench: Bench, folder: Path, actors: int) -> float:
    times: list[float] = []
    pool = ActorPool(actors, at_once=2)
    try:
        bench.label(cohort=folder, executor=_Watched(pool, times))
    finally:
        pool.close()
    return (len(times) - 1) / (times[-1] - times[0])


class _Watched:
    """An executor that notes when each result came."""

    def __init__(self, inner: Executor, times: list[float]) -> None:
        self.workers, self._inner, self._times = inner.workers, inner, times

    def map(self, fn: Any, items: Any, *, key: Any = str) -> Any:
        for outcome in self._inner.map(fn, items, key=key):
            self._times.append(time.perf_counter())
            yield outcome

    def close(self) -> None: ...
