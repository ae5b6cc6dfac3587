"""How a sweep gets on: a bar over the steps of all trials, the best so far, and a line for each trial that ends."""

from __future__ import annotations

from distseg.work.runs_progress import RunsProgress, steps_of
from distseg.work.tune_trials import FINISHED, OPEN, STOPPED, Trial, Trials

SPEED_OVER_S = 300.0


class TuneProgress(RunsProgress):
    """A trial counts whole once it has ended, however early: what is left is at most so much."""

    def __init__(self, trials: Trials, *, enabled: bool) -> None:
        self._trials, self._sweep = trials, trials.sweep
        total = max(self._sweep.trials, len(trials.by_name)) * self._sweep.steps
        super().__init__(total=total, left="left at most", speed_over_s=SPEED_OVER_S, bar_width=16, enabled=enabled)

    def ended(self, trial: Trial) -> None:
        """A trial is finished, stopped or failed."""
        if not self._enabled:
            return
        looks = trial.looks
        objective = self._sweep.settings.objective
        figure = f"{objective} {looks[trial.last_step]:.3f} at step {trial.last_step}" if looks else "no look"
        said = {FINISHED: figure, STOPPED: f"stopped early, {figure}"}.get(trial.state, f"failed: {trial.reason}")
        done = f"[{len(self._trials.ended)}/{self._sweep.trials}]"
        self._say(f"{done} {trial.name}: {said}, {trial.seconds:.0f} s")

    def _words(self) -> str:
        best = self._trials.best()
        shown = f", best {self._trials.value(best):.3f} ({best.name})" if best else ""
        return f"trials {len(self._trials.ended)}/{self._sweep.trials}{shown}"

    def _work_done(self) -> float:
        return sum(self._steps_of(trial) for trial in list(self._trials.by_name.values()))

    def _steps_of(self, trial: Trial) -> int:
        if trial.state != OPEN:
            return self._sweep.steps
        return steps_of(self._sweep.folder(trial.run), unknown=trial.last_step)
