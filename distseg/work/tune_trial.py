"""One trial where it runs: its run directory, what of it can be told, and a run that goes on as another did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distseg.config.schema import TrainRunConfig
from distseg.training.checkpoint import newest_step
from distseg.training.run import RunDirectory, write_atomic
from distseg.training.setup import open_run
from distseg.work.owner import owning
from distseg.work.tune_sweep import Sweep

# What a killed sweep leaves running for a moment: its trials see their owner's death a little later.
WAIT_FOR_OLD_S = 60.0

Train = Callable[[TrainRunConfig], Any]


@dataclass(frozen=True)
class TrialJob:
    """What goes to a worker process. `train` must be picklable where that is another process."""

    sweep: Sweep
    name: str
    run: str
    values: dict[str, Any]
    train: Train
    threads: int


def run_trial(job: TrialJob) -> None:
    """Train to the end from wherever the run directory stands; nothing where it is done. Raises what training does."""
    run = job.sweep.folder(job.run)
    with owning(run / ".lock", what="trial", name=run, wait_s=WAIT_FOR_OLD_S):
        if not is_trained(run):
            config = job.sweep.config_of(job.run, job.values)
            config.train.threads = config.train.threads or job.threads
            job.train(config)


def is_trained(run: Path) -> bool:
    return (run / "model" / "model.json").is_file()  # written last


def looks_of(sweep: Sweep, run: str) -> dict[int, float]:
    """Step -> objective, as far as a checkpoint of that step or a later one is on disk: what a kill cannot take back.

    The last look counts once the model is written, so that a scheduler's stop never comes between the two. May be
    called while the run is being written.
    """
    directory, key = RunDirectory(sweep.folder(run)), sweep.settings.objective
    kept, done = newest_step(directory.checkpoints), is_trained(directory.path)
    if not kept:
        return {}
    content = directory.metrics_file.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]  # what follows the last newline is unfinished
    rows = [json.loads(line) for line in whole.splitlines() if f'"{key}"' in line]
    return {
        int(row["step"]): float(row[key])
        for row in rows
        if row[key] is not None and row["step"] <= kept and (done or row["step"] < sweep.steps)
    }


def fork_run(sweep: Sweep, donor: str, step: int, config: TrainRunConfig) -> None:
    """Make `config.run` a run that went as `donor` did up to `step` and goes on under its own config.

    The donor may be running: its checkpoint of `step` stays, as PBT's trials keep one for every look.
    """
    here, there = RunDirectory(config.run), RunDirectory(sweep.folder(donor))
    shutil.rmtree(here.path, ignore_errors=True)  # of a take-over that was interrupted
    open_run(config)
    rows = [json.loads(line) for line in there.metrics_file.read_text(encoding="utf-8").splitlines()[:step]]
    write_atomic(here.metrics_file, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    for part in ("bank", "doubt"):
        if (there.path / part).is_dir():
            shutil.copytree(there.path / part, here.path / part, ignore=shutil.ignore_patterns(".*"))
    partial = here.path / ".checkpoints.partial"
    for folder in there.checkpoints.glob("step_*"):
        if int(folder.name.removeprefix("step_")) <= step:
            shutil.copytree(folder, partial / folder.name)
    partial.rename(here.checkpoints)  # last: a run without checkpoints would start from its beginning
