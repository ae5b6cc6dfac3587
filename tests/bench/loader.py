"""A gradient step fed by the real loader, against the same step on one batch that is kept: what reading costs.

Preset `small` (32^3, 2 slots) on CT-like scans of 96 x 256 x 256, with data.memory_gib=0: each patch is read from the
store. Blocks of steps of the two kinds alternate in one process. CPU time counts every thread of the process,
so it gives the loader no credit for running beside the step; wall time does, where a second core is free.

Keys, for METHOD in supervised, embedding_matching (matching=prototypes):
  loader.cpu_over_cached.METHOD, loader.wall_over_cached.METHOD    medians of the blocks' ratios (target 1.05)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console

from distseg.config.compose import train_config
from distseg.data.arrays import reader_name
from distseg.data.batch import Batch
from distseg.methods.base import At
from distseg.training.clock import Clock
from distseg.training.reduce import SingleProcess
from distseg.training.setup import Session, open_run, start_session
from distseg.training.step import training_step
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort
from tests.bench.volumes import write_nnunet_source

SCANS, LABELLED, SHAPE = 4, 2, (96, 256, 256)
BLOCKS, STEPS = 5, 4
METHODS = ("supervised", "embedding_matching")


def run() -> dict[str, float]:
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        root = Path(folder)
        source = write_nnunet_source(root / "source", scans=SCANS, shape=SHAPE, labelled=LABELLED)
        path = root / "c.zarr"
        ingest_cohort(source=str(source), cohort=str(path), executor=LocalExecutor(1), progress=False)
        for method in METHODS:
            cpu, wall = _ratios(_session(path, root / method, method))
            results[f"loader.cpu_over_cached.{method}"], results[f"loader.wall_over_cached.{method}"] = cpu, wall
    Console().print({name: round(value, 3) for name, value in results.items()}, f"read by {reader_name()}")
    return results


def _session(cohort: Path, run: Path, method: str) -> Session:
    steps = 2 * BLOCKS * STEPS + 2 * STEPS
    overrides = {"train.steps": steps, "data.memory_gib": 0.0, "launcher": "local", "train.threads": 1}
    config = train_config(
        cohort=str(cohort), run=str(run), method=method, preset="small", matching="prototypes", overrides=overrides
    )
    open_run(config)
    return start_session(config, SingleProcess())


def _ratios(session: Session) -> tuple[float, float]:
    clock, communicator, total = Clock(session.device), SingleProcess(), session.config.train.steps
    kept = session.feed.batch(1)

    def block(batches: Iterator[Batch]) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(STEPS):
            training_step(
                session.learner,
                next(batches).to(session.device, session.dtype),
                method=session.method,
                at=At(1, total),
                settings=session.settings,
                communicator=communicator,
                clock=clock,
            )
        return time.process_time() - cpu, time.perf_counter() - wall

    cached = iter(lambda: kept, None)
    with closing(session.feed.ahead(1, total)) as fed:
        pairs = [(block(fed), block(cached)) for _ in range(BLOCKS + 1)]  # the first pair warms up
    cpu, wall = np.array([[real[n] / same[n] for n in (0, 1)] for real, same in pairs[1:]]).T
    return float(np.median(cpu)), float(np.median(wall))
