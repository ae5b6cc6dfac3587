"""The cells of a benchmark: what each trains and measures, whether it is finished, and doing one of them.

    RUN/cells/phase_a__SUBSET__seedK/   the shared start: a run directory
    RUN/cells/ROW__SUBSET__seedK/       a row's branch: a run directory with evaluation/SPLIT/
        cell.json                       wall times of its work, over all its attempts

A cell is finished when evaluation/SPLIT/metrics.json counts every scan of the split; phase A, when it has its model.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distseg.config.compose import train_config
from distseg.config.schema import LoggingConfig, TrainRunConfig
from distseg.config.subsets import Name
from distseg.config.suites import Row, Suite
from distseg.config.verbs import BenchmarkConfig, EvaluateConfig
from distseg.errors import ConfigError, DistsegError, FinishedWithFailures
from distseg.training.checkpoint import newest_step
from distseg.training.run import RunDirectory, write_atomic
from distseg.work.evaluate import evaluate_run
from distseg.work.executor import LocalExecutor, available_cores

Train = Callable[[TrainRunConfig], Any]
Evaluate = Callable[[EvaluateConfig], Any]


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark. `labelled` names its subset; `evaluate` is None where it is only branched from;
    `parent` names a phase A cell."""

    row: str
    labelled: Name
    seed: int
    config: TrainRunConfig
    evaluate: EvaluateConfig | None
    parent: str | None

    @property
    def name(self) -> str:
        return cell_name(self.row, self.labelled, self.seed)

    @property
    def run(self) -> Path:
        return Path(self.config.run)

    @property
    def evaluation(self) -> Path:
        split = self.evaluate.split if self.evaluate is not None else "none"
        return self.run / "evaluation" / split

    def is_trained(self) -> bool:
        return (self.run / "model" / "model.json").is_file()  # written last

    def is_finished(self) -> bool:
        """Trained and, where asked, measured on every scan."""
        if self.evaluate is None:
            return self.is_trained()
        metrics = self.metrics()
        return self.is_trained() and metrics is not None and not metrics["scans_failed"]

    def metrics(self) -> dict[str, Any] | None:
        """metrics.json of its evaluation, None where there is none yet."""
        try:
            content: dict[str, Any] = json.loads((self.evaluation / "metrics.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return content

    def wall_s(self) -> Mapping[str, float]:
        """{"train": seconds, "evaluate": seconds} as far as they are known."""
        try:
            content: dict[str, float] = json.loads((self.run / "cell.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return content


def cell_name(row: str, labelled: Name, seed: int) -> str:
    return f"{row}__{labelled}__seed{seed}"


class Labels(NamedTuple):
    """A subset as the cohort fills it."""

    name: Name
    ids: Sequence[str]
    patches: int | None


def make_cells(
    suite: Suite, config: BenchmarkConfig, *, subsets: Mapping[Name, Sequence[str]], taken: Callable[[Cell], Cell]
) -> tuple[list[Cell], list[Cell]]:
    """Phase A and phase B cells in the order they run: by seed, then subset, then row.

    `subsets`: the labelled ids of each; `taken`: the same cell where it is finished elsewhere. Raises ConfigError for a
    key or value that `distseg train` refuses.
    """
    phase_a, phase_b = [], []
    for seed in suite.seeds:
        for name in suite.labelled:
            labels = Labels(name, subsets[name], suite.subsets[name].patches)
            first = _cell(suite, config, suite.phase_a, labels, seed, steps=suite.phase_a_steps)
            first = taken(first if suite.evaluate_phase_a else dataclasses.replace(first, evaluate=None))
            phase_a.append(first)
            phase_b += [
                taken(_cell(suite, config, row, labels, seed, steps=suite.phase_b_steps, parent=first))
                for row in suite.rows
            ]
    return phase_a, phase_b


def _cell(
    suite: Suite,
    config: BenchmarkConfig,
    row: Row,
    labels: Labels,
    seed: int,
    *,
    steps: int,
    parent: Cell | None = None,
) -> Cell:
    run = str(Path(config.run) / "cells" / cell_name(row.name, labels.name, seed))
    overrides = {
        "train.threads": max(1, available_cores() // config.side_by_side),
        **suite.common,
        **row.overrides,
        "launcher": "local",
        "seed": seed,
        "data.labeled_ids": list(labels.ids),
        "data.labeled_patches": labels.patches,
        "train.steps": steps,
        "optimizer.schedule_steps": suite.phase_a_steps + suite.phase_b_steps,
        "resources.gpus_per_worker": config.resources.gpus_per_worker,
    }
    try:
        composed = train_config(
            cohort="", run="", method=row.method, preset=suite.preset, matching=row.matching, overrides=overrides
        )
    except ConfigError as error:
        where = f"suite {suite.name}, row {row.name}" + (f": {error.where}" if error.where else "")
        raise ConfigError(error.what, where=where, value=error.value, rule=error.rule, fix=error.fix) from None
    # Paths are set outside the merge, which would read "${" in them as an interpolation.
    train = dataclasses.replace(composed.train, init_from=None if parent is None else parent.config.run)
    logging = dataclasses.replace(config.logging, progress=False)
    composed = dataclasses.replace(composed, cohort=config.cohort, run=run, train=train, logging=logging)
    evaluation = EvaluateConfig(
        run=run,
        cohort=config.cohort,
        split=suite.split,
        network=suite.network,
        overlap=suite.overlap,
        components="all",  # islands are a method's; the tables show both readings
        logging=LoggingConfig(progress=False),
    )
    return Cell(row.name, labels.name, seed, composed, evaluation, None if parent is None else parent.name)


@dataclass(frozen=True)
class CellJob:
    """What goes to a worker."""

    cell: Cell
    train: Train
    evaluate: Evaluate


def job_name(job: CellJob) -> str:
    return job.cell.name


def run_cell(job: CellJob) -> None:
    """Runs in a worker: train to the end from wherever it stands, then measure. What is done already is not repeated.

    Raises DistsegError where scans could not be measured, and whatever training raises.
    """
    cell = job.cell
    if not cell.is_trained():
        before_s = _trained_before_s(cell)
        begun = time.perf_counter()
        job.train(cell.config)
        _add_wall(cell, "train", before_s + time.perf_counter() - begun)
    if cell.evaluate is not None and not cell.is_finished():
        begun = time.perf_counter()
        try:
            job.evaluate(cell.evaluate)
        except FinishedWithFailures as error:
            scans = ", ".join(f"{scan} ({why})" for scan, why in error.failures)
            raise DistsegError(f"scans not measured: {scans}") from None
        _add_wall(cell, "evaluate", time.perf_counter() - begun)


def evaluate_cell(config: EvaluateConfig) -> dict[str, Any]:
    """`distseg evaluate` inside a cell's own process."""
    return evaluate_run(
        run=config.run,
        cohort=config.cohort,
        split=config.split,
        name=config.split,
        network=config.network,
        overlap=config.overlap,
        components=config.components,
        executor=LocalExecutor(1),
        progress=False,
    )


def _trained_before_s(cell: Cell) -> float:
    """Seconds of the steps that an earlier, interrupted attempt brought to its last checkpoint."""
    run = RunDirectory(cell.run)
    kept = newest_step(run.checkpoints)
    if kept == 0:
        return 0.0
    return float(sum(row.get("time_step_s") or 0.0 for row in run.metrics() if row["step"] <= kept))


def _add_wall(cell: Cell, phase: str, seconds: float) -> None:
    wall = dict(cell.wall_s())
    wall[phase] = round(wall.get(phase, 0.0) + seconds, 3)
    write_atomic(cell.run / "cell.json", json.dumps(wall) + "\n")
