"""`distseg tune`: trials of a search space side by side, to the best model, a table and a report.

The same command again goes on: what has ended is kept, what was running resumes from its run directory, what failed is
tried again. Who runs the trials is a `TrialRunner`: this machine's processes here, Ray Tune in `distributed/tune.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from distseg.config.verbs import TuneRunConfig
from distseg.errors import FinishedWithFailures
from distseg.training.local import train_local
from distseg.work.executor import Executor, available_cores
from distseg.work.tune_best import write_best
from distseg.work.tune_checks import Prepared, claimed, prepare
from distseg.work.tune_estimate import estimate
from distseg.work.tune_progress import TuneProgress
from distseg.work.tune_report import value_text, write_report
from distseg.work.tune_sweep import DEFAULT, Sweep
from distseg.work.tune_trial import Train, TrialJob, is_trained, run_trial
from distseg.work.tune_trials import FAILED, Trials

_SHOWN = 5  # trials on the terminal, and the default


@dataclass(frozen=True)
class TuneResult:
    """`best`: name of the best trial, its values and its objective; None and empty where none finished."""

    run: str
    best: str | None
    values: dict[str, Any]
    objective: float | None
    finished: tuple[str, ...]
    stopped: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]


class TrialRunner(Protocol):
    """Runs what `trials.next()` gives until it gives no more, tells `trials` what became of each, and `progress`."""

    def ready(self, sweep: Sweep) -> AbstractContextManager[None]:
        """Around everything that computes. Raises InputError where the sweep could never run here."""

    def run(self, sweep: Sweep, trials: Trials, progress: TuneProgress) -> None: ...


class LocalTrials:
    """As many processes of this machine as `executor` has, without Ray and without a scheduler."""

    def __init__(self, executor: Executor, train: Train = train_local) -> None:
        self._executor, self._train = executor, train

    def ready(self, sweep: Sweep) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, sweep: Sweep, trials: Trials, progress: TuneProgress) -> None:
        begun: dict[str, float] = {}
        threads = max(1, available_cores() // self._executor.workers)

        def jobs() -> Iterator[TrialJob]:
            while (trial := trials.next()) is not None:
                begun[trial.name] = time.monotonic()
                yield TrialJob(sweep, trial.name, trial.run, trial.values, self._train, threads)

        for outcome in self._executor.map(run_trial, jobs(), key=_name):
            seconds = time.monotonic() - begun[outcome.key]
            progress.ended(trials.end(outcome.key, seconds=seconds, error=outcome.error))


def _name(job: TrialJob) -> str:
    return job.name


def run_tune(config: TuneRunConfig, *, runner: TrialRunner, train: Train) -> TuneResult:
    """Run or resume the sweep in `config.run` (absolute). `train` trains the shared warm-up.

    Raises ConfigError, DataError, RunMismatchError or InputError before anything runs; FinishedWithFailures, once all
    else is written, naming the trials that failed.
    """
    prepared = prepare(config)
    sweep = prepared.sweep
    for note in prepared.notes:
        print(note, flush=True)
    if config.dry_run:
        _show_plan(prepared)
        return TuneResult(config.run, None, {}, None, (), (), ())
    with claimed(prepared):
        trials = Trials(sweep, prepared.search)
        if trials.left():
            with runner.ready(sweep):
                if sweep.warmup is not None and not is_trained(Path(sweep.warmup.run)):
                    train(sweep.warmup)
                with TuneProgress(trials, enabled=config.logging.progress) as progress:
                    runner.run(sweep, trials, progress)
        best = trials.best()
        if best is not None:
            write_best(trials, best)
        write_report(trials, best)
    _show_result(trials)
    return _result(config.run, trials)


def _result(run: str, trials: Trials) -> TuneResult:
    best = trials.best()
    names = {state: tuple(t.name for t in trials.ended if t.state == state) for state in ("finished", "stopped")}
    failed = tuple((trial.name, trial.reason) for trial in trials.ended if trial.state == FAILED)
    result = TuneResult(
        run,
        best.name if best else None,
        trials.values_of(best) if best else {},
        trials.value(best) if best else None,
        names["finished"],
        names["stopped"],
        failed,
    )
    if failed:
        done = f"{run}: {len(result.finished)} trials finished, {len(result.stopped)} stopped early"
        raise FinishedWithFailures(done, failed)
    return result


def _show_plan(prepared: Prepared) -> None:
    """`dry_run=true`: the trials and what they would take, on stdout."""
    sweep = prepared.sweep
    for line in estimate(sweep):
        print(line)
    if prepared.planned is None:
        print(f"values: chosen by Optuna as results come in, from space {sweep.space.name}")
        return
    table = Table(title=f"space {sweep.space.name}")
    for head in ("trial", *sweep.space.keys):
        table.add_column(head)
    for number, values in enumerate(prepared.planned):
        is_default = not values and sweep.settings.default_first
        shown = sweep.default_values() if is_default else values
        name = DEFAULT if is_default else f"t{number:03d}"
        table.add_row(name, *(value_text(shown.get(key, "")) for key in sweep.space.keys))
    Console().print(table)


def _show_result(trials: Trials) -> None:
    """The best few on stdout, and where everything is."""
    sweep, best = trials.sweep, trials.best()
    if best is not None:
        sign = -1 if sweep.best_is_max else 1
        finished = [t for t in trials.ended if trials.value(t) is not None]
        ranked = sorted(finished, key=lambda t: sign * (trials.value(t) or 0.0))
        table = Table(title=f"{sweep.settings.objective} of the finished trials")
        for head in ("trial", sweep.settings.objective, *sweep.space.keys):
            table.add_column(head)
        for trial in [*ranked[:_SHOWN], *(t for t in ranked[_SHOWN:] if t.name == DEFAULT)]:
            values = trials.values_of(trial)
            figure = f"{trials.value(trial):.3f}"
            table.add_row(trial.name, figure, *(value_text(values.get(key, "")) for key in sweep.space.keys))
        Console().print(table)
        print(f"best: {best.name}, {sweep.run / 'best'}")
    print(f"report: {sweep.run / 'report.html'}", flush=True)
