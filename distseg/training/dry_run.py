"""`dry_run=true`: what a run would take, from twenty steps of one worker's share in a folder that is then removed.

The trial is the loop itself on the run's own data, network and patches, in a fresh process, so that its memory is a
worker's. It has no other workers: their all-reduce, and what cores they take from each other, come on top.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from distseg.config.compose import from_plain, to_plain
from distseg.config.schema import LoggingConfig, ResourcesConfig, TrainRunConfig
from distseg.data.cohort import Cohort
from distseg.training.loop import LOOKS, LOOKS_TO_SELECT, set_threads, train_session
from distseg.training.reduce import SingleProcess
from distseg.training.remote_run import readable_run, run_directory
from distseg.training.setup import Session, open_run, start_session, wants_gpu

STEPS = 20
_SETTLING_STEPS = 5  # caches fill, threads start
_LOOK_EVERY = 10
_FLOAT32_NBYTES, _UINT8_NBYTES = 4, 1
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class DryRun:
    """Seconds and bytes of the run as it would go on from where it stands."""

    run: str
    workers: int
    slots: int  # a worker's, the largest share
    threads: int
    steps: int  # still to do
    step_s: float
    pause_s: float  # a look at validation, with a new list of doubt where the run keeps one
    pauses: int
    checkpoint_s: float
    checkpoints: int
    start_s: float
    memory_nbytes: int  # a worker's, at its peak
    volumes_nbytes: int  # of it, volumes kept in RAM
    gpu_memory_nbytes: int | None
    checkpoint_nbytes: int  # of one
    checkpoints_kept: int
    gradient_nbytes: int  # summed over workers each step
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        total = self.steps * self.step_s + self.pauses * self.pause_s + self.checkpoints * self.checkpoint_s
        return (self.start_s + total) / 3600

    @property
    def disk_nbytes(self) -> int:
        """Kept checkpoints, one being written, and the model; metrics and TensorBoard are small beside them."""
        return (self.checkpoints_kept + 2) * self.checkpoint_nbytes

    def lines(self) -> list[str]:
        gpu = "" if self.gpu_memory_nbytes is None else f", {self.gpu_memory_nbytes / _GIB:.2f} GiB of GPU memory"
        alone = (
            f"; the all-reduce of {self.gradient_nbytes / _MIB:.1f} MiB a step comes on top" if self.workers > 1 else ""
        )
        tried = f"{STEPS} steps of {self.slots} slots, {self.threads} threads"
        volumes = f"of it {self.volumes_nbytes / _GIB:.2f} GiB volumes"
        return [
            f"dry run: nothing was written to {self.run}",
            f"speed: {1 / self.step_s:.3g} steps/s ({tried}){alone}",
            f"time: {self.hours:.2g} hours for {self.steps} steps, {self.pauses} looks at validation, "
            f"{self.checkpoints} checkpoints",
            f"memory: {self.memory_nbytes / _GIB:.2f} GiB a worker, {volumes}{gpu}",
            f"disk: at most {self.disk_nbytes / _MIB:.1f} MiB ({self.checkpoint_nbytes / _MIB:.1f} MiB a checkpoint, "
            f"{self.checkpoints_kept} kept)",
            *(f"note: {note}" for note in self.notes),
        ]


def dry_run_local(config: TrainRunConfig) -> DryRun:
    """In a process of its own. Raises what the run itself would raise before its first step."""
    wants_gpu(config)
    steps_done = steps_of_same_run(config)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(trial, to_plain(config), threads=torch.get_num_threads(), steps_done=steps_done).result()


def steps_of_same_run(config: TrainRunConfig) -> int:
    """Steps that the run directory already has. Raises RunMismatchError if another run lives there."""
    with readable_run(config.run) as run:
        stored = run.stored()
        if stored is None:
            return 0
        run.check_same(config, stored)
    return run_directory(config.run).newest_step()


def trial(plain: Mapping[str, Any], *, threads: int, steps_done: int) -> DryRun:
    """Runs in the process that is measured."""
    begun = time.perf_counter()
    config = from_plain(plain, TrainRunConfig)
    slots = math.ceil(config.train.batch_size / config.resources.workers)
    set_threads(config, threads * config.resources.workers)
    with tempfile.TemporaryDirectory(prefix="distseg-dry-run-") as folder:
        session = _session(config, slots=slots, folder=Path(folder))
        watch = _Stopwatch(begun)
        train_session(session, SingleProcess(), watch)
        checkpoint_nbytes = sum(f.stat().st_size for f in session.run.checkpoints.rglob("*") if f.is_file())
        volumes_nbytes = _volumes_nbytes(config, session)
    steps = max(0, config.train.steps - steps_done)
    looks = LOOKS_TO_SELECT if config.train.select == "val" else LOOKS
    every = config.train.validate_every_steps or math.ceil(config.train.steps / looks)
    if config.sampling.unlabelled == "doubt":
        every = min(every, config.sampling.doubt_every_steps)
    return DryRun(
        run=config.run,
        workers=config.resources.workers,
        slots=slots,
        threads=torch.get_num_threads(),
        steps=steps,
        step_s=watch.step_s,
        pause_s=watch.pause_s / config.resources.workers,
        pauses=math.ceil(steps / every) if watch.looked else 0,
        checkpoint_s=watch.checkpoint_s,
        checkpoints=math.ceil(steps / config.checkpoint.every_steps),
        start_s=watch.start_s,
        memory_nbytes=_peak_nbytes() + volumes_nbytes - session.reader.kept_nbytes,
        volumes_nbytes=volumes_nbytes,
        gpu_memory_nbytes=torch.cuda.max_memory_reserved() if session.device.type == "cuda" else None,
        checkpoint_nbytes=checkpoint_nbytes,
        checkpoints_kept=config.checkpoint.keep + (config.train.select == "val"),
        gradient_nbytes=session.learner.gradients.nbytes,
        notes=session.plan.notes,
    )


def _session(config: TrainRunConfig, *, slots: int, folder: Path) -> Session:
    """This worker's share as a run of its own, short enough to try."""
    short = dataclasses.replace(
        config,
        run=str(folder / "run"),
        dry_run=False,
        launcher="local",
        resources=ResourcesConfig(workers=1, gpus_per_worker=config.resources.gpus_per_worker),
        logging=LoggingConfig(progress=False, tensorboard=False),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=STEPS),
        sampling=dataclasses.replace(config.sampling, doubt_every_steps=_LOOK_EVERY),
        train=dataclasses.replace(
            config.train, steps=STEPS, batch_size=slots, validate_every_steps=_LOOK_EVERY, select="last", profile=False
        ),
    )
    open_run(short)
    return start_session(short, SingleProcess())


def _volumes_nbytes(config: TrainRunConfig, session: Session) -> int:
    """All volumes of the run on its grid, images as float32 and labels, up to what data.memory_gib keeps."""
    plan = session.plan
    labelled = {*plan.labelled, *plan.validation}
    ids = {*labelled, *plan.unlabelled}
    voxel_mm3 = math.prod(plan.spacing_mm)
    total = 0.0
    for record in Cohort.open(config.cohort).records:
        if record.scan_id in ids:
            voxels = math.prod(n * mm for n, mm in zip(record.shape, record.spacing_mm, strict=True)) / voxel_mm3
            total += voxels * (_FLOAT32_NBYTES + (_UINT8_NBYTES if record.scan_id in labelled else 0))
    return max(session.reader.kept_nbytes, min(int(total), int(config.data.memory_gib * _GIB)))


class _Stopwatch:
    """A Reporter that takes times."""

    def __init__(self, begun: float) -> None:
        self._begun, self._rows = begun, list[tuple[float, Mapping[str, Any]]]()
        self.checkpoint_s = 0.0

    def step(self, row: Mapping[str, Any], total_steps: int) -> None:
        self._rows.append((time.perf_counter(), row))

    def checkpoint(self, step: int) -> None:
        self.checkpoint_s = time.perf_counter() - self._rows[-1][0]

    def note(self, text: str) -> None:
        pass

    @property
    def step_s(self) -> float:
        return float(statistics.median(row["time_step_s"] for _, row in self._rows[_SETTLING_STEPS:]))

    @property
    def start_s(self) -> float:
        return self._rows[0][0] - self._begun

    @property
    def looked(self) -> bool:
        return any("val_dice" in row for _, row in self._rows)

    @property
    def pause_s(self) -> float:
        """What lies between steps, a look; on a GPU rows come in bundles, so all of it over the looks after the first
        bundle."""
        first, last = self._rows[0][0], self._rows[-1][0]
        later = [row for at, row in self._rows if at - first > self._rows[0][1]["time_step_s"] / 2]
        looks = sum("val_dice" in row for row in later)
        return max(0.0, last - first - sum(row["time_step_s"] for row in later)) / looks if looks else 0.0


def _peak_nbytes() -> int:
    """Of this process since it started; ru_maxrss would be its parent's where that was larger."""
    kib = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kib is not None, "Linux tells the peak"
    return int(kib[1]) * 1024
