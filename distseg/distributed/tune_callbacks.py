"""Between Ray Tune and the journal, on the driver: Tune's next trial is ours, what it hears is written down."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.search import Searcher

from distseg.work.tune_progress import TuneProgress
from distseg.work.tune_trials import Trial, Trials

MAX_DEATHS = 2  # of a trial's process, in a row with what it does: then it has failed


def payload(trial: Trial) -> dict[str, Any]:
    return {"name": trial.name, "run": trial.run, "values": trial.values}


def trial_name(trial: Any) -> str:
    """Asked once, when Tune makes its trial."""
    name: str = trial.config["trial"]["name"]
    return name


class _NotKept:
    """Tune pickles what it is given into its own state, which nobody reads; what belongs to this process stays out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Source(_NotKept, Searcher):
    """Tune's next trial is ours."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self._trials = trials

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **_: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        trial = self._trials.next()
        return Searcher.FINISHED if trial is None else {"trial": payload(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # Teller hears of it, with the trial's name

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Tune renames it; the truth is trials.jsonl

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep is never restored from Ray's state")


class Teller(_NotKept, ray.tune.Callback):
    """Writes down what Tune's trials report and how they end."""

    def __init__(self, trials: Trials, progress: TuneProgress) -> None:
        self._trials, self._progress = trials, progress
        self._begun: dict[str, float] = {}
        self._errors: dict[str, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._begun.setdefault(str(trial), time.monotonic())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        name = str(trial)
        if "taken_from" in result and result["run"] != self._trials.by_name[name].run:
            self._trials.took_over(
                name,
                run=result["run"],
                values=trial.config["trial"]["values"],
                donor=result["taken_from"],
                step=result["taken_step"],
            )
        if "error" in result:
            self._errors[name] = result["error"]
        else:
            self._trials.looked(name)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(str(trial), self._errors.get(str(trial)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(str(trial), f"its process died {MAX_DEATHS + 1} times, most often for want of memory")

    def _end(self, name: str, error: str | None) -> None:
        seconds = time.monotonic() - self._begun.get(name, time.monotonic())
        self._progress.ended(self._trials.end(name, seconds=seconds, error=error, stopped=True))
