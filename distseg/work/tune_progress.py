"""How a sweep gets on: a bar over the steps of all trials, the best so far, and a line for each trial that ends."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distseg.errors import DataError
from distseg.training.run import RunDirectory
from distseg.work.tune_trials import FINISHED, OPEN, STOPPED, Trial, Trials

POLL_S = 2.0
SPEED_OVER_S = 300.0


class TuneProgress:
    """Draws on stderr. A trial counts whole once it has ended, however early: what is left is at most so much."""

    def __init__(self, trials: Trials, *, enabled: bool) -> None:
        self._trials, self._sweep = trials, trials.sweep
        self._enabled = enabled
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left at most"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not enabled,
            speed_estimate_period=SPEED_OVER_S,
        )
        total = max(self._sweep.trials, len(trials.by_name)) * self._sweep.steps
        self._task = self._progress.add_task(self._words(), total=total, completed=self._steps_done())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> TuneProgress:
        if self._enabled:
            self._progress.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._progress.stop()

    def ended(self, trial: Trial) -> None:
        """A trial is finished, stopped or failed."""
        if self._enabled:
            looks = trial.looks
            objective = self._sweep.settings.objective
            figure = f"{objective} {looks[trial.last_step]:.3f} at step {trial.last_step}" if looks else "no look"
            said = {FINISHED: figure, STOPPED: f"stopped early, {figure}"}.get(trial.state, f"failed: {trial.reason}")
            done = f"[{len(self._trials.ended)}/{self._sweep.trials}]"
            self._console.print(f"{done} {trial.name}: {said}, {trial.seconds:.0f} s", highlight=False, markup=False)
        self._progress.update(self._task, description=self._words(), completed=self._steps_done())

    def _words(self) -> str:
        best = self._trials.best()
        shown = f", best {self._trials.value(best):.3f} ({best.name})" if best else ""
        return f"trials {len(self._trials.ended)}/{self._sweep.trials}{shown}"

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            self._progress.update(self._task, completed=self._steps_done())

    def _steps_done(self) -> int:
        return sum(self._steps_of(trial) for trial in list(self._trials.by_name.values()))

    def _steps_of(self, trial: Trial) -> int:
        if trial.state != OPEN:
            return self._sweep.steps
        try:
            last = RunDirectory(self._sweep.folder(trial.run)).last_metrics()
        except (OSError, ValueError, DataError):  # being replaced at this moment; the next look will do
            return trial.last_step
        return int(last["step"]) if last else 0
