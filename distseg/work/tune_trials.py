"""The trials of a sweep, and RUN/trials.jsonl: what was tried and what came of it, appended by the driver alone.

A line an event: `proposed` (values), `look` (step, value of the objective), `took_over` (PBT: other values, from
another trial's state), `ended` (state, reason, seconds). It is the only truth a sweep goes on from: a trial that has
not ended resumes its own run directory, whatever Ray knew of it. A last line cut short by a kill is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distseg.errors import DataError
from distseg.work.tune_search import Ended, Search, Values
from distseg.work.tune_sweep import DEFAULT, Sweep
from distseg.work.tune_trial import is_trained, looks_of

FINISHED, STOPPED, FAILED, OPEN = "finished", "stopped", "failed", "open"


@dataclass
class Trial:
    """`values`: what it sets, nothing in the default's; `run`: its folder under RUN/trials, PBT changes it."""

    name: str
    values: Values
    run: str
    state: str = OPEN
    reason: str = ""
    looks: dict[int, float] = field(default_factory=dict)  # step -> objective
    spent: int = 0  # steps trained, those taken over from another trial not counted
    seconds: float = 0.0

    @property
    def last_step(self) -> int:
        return max(self.looks, default=0)


class Trials:
    """All trials so far, and the next ones to run. Every change is on disk before it is in memory."""

    def __init__(self, sweep: Sweep, search: Search) -> None:
        self.sweep, self._search = sweep, search
        self._file = sweep.run / "trials.jsonl"
        self.by_name: dict[str, Trial] = {}
        self.history: list[tuple[str, int, float, int]] = []  # (trial, step, value, steps spent) in the order seen
        for event in _read(self._file):
            self._apply(event)
        self._again = [trial for trial in self.by_name.values() if trial.state in (OPEN, FAILED)]
        for trial in self._again:
            trial.state, trial.reason = OPEN, ""

    @property
    def ended(self) -> list[Trial]:
        return [trial for trial in self.by_name.values() if trial.state != OPEN]

    def next(self) -> Trial | None:
        """A trial left open by an earlier session, then new ones; None when there are no more."""
        if self._again:
            return self._again.pop(0)
        number = len(self.by_name)
        if number >= self.sweep.trials:
            return None
        has_default = self.sweep.settings.default_first
        values = {} if has_default and number == 0 else self._search.ask(number - int(has_default), self._known())
        if values is None:
            return None
        name = DEFAULT if has_default and number == 0 else f"t{number:03d}"
        self._append({"trial": name, "event": "proposed", "values": values, "run": name})
        return self.by_name[name]

    def left(self) -> int:
        """How many `next` may still give."""
        return len(self._again) + max(0, self.sweep.trials - len(self.by_name))

    def looked(self, name: str) -> list[int]:
        """Take what the trial's run directory has to show; the steps that are new."""
        trial = self.by_name[name]
        found = looks_of(self.sweep, trial.run)
        new = {step: value for step, value in found.items() if trial.looks.get(step) != value}
        for step, value in new.items():
            self._append({"trial": name, "event": "look", "step": step, "value": value})
        return list(new)

    def took_over(self, name: str, *, run: str, values: Mapping[str, Any], donor: str, step: int) -> None:
        """PBT: `name` goes on from `donor`'s state after `step`, with other values, in another run directory."""
        self._append(
            {"trial": name, "event": "took_over", "run": run, "values": dict(values), "from": donor, "step": step}
        )

    def end(self, name: str, *, seconds: float, error: str | None = None, stopped: bool = False) -> Trial:
        """The trial runs no more in this session: by itself, by the scheduler's word, or for an error."""
        self.looked(name)
        trial = self.by_name[name]
        state, reason = FINISHED, error or ""
        if error is None and not is_trained(self.sweep.folder(trial.run)):
            state = STOPPED
            if not stopped:
                state, reason = FAILED, "ended without a model"
        elif error is None and not trial.looks:
            state, reason = FAILED, f"never reported {self.sweep.settings.objective}"
        elif error is not None:
            state = FAILED
        event = {"trial": name, "event": "ended", "state": state, "reason": reason, "seconds": round(seconds, 1)}
        self._append(event)
        return trial

    def value(self, trial: Trial) -> float | None:
        """The objective of its model: at the last step, or the best look where train.select=val chose that."""
        if trial.state != FINISHED or not trial.looks:
            return None
        if self.sweep.base.train.select == "val":
            return (max if self.sweep.best_is_max else min)(trial.looks.values())
        return trial.looks[trial.last_step]

    def best(self) -> Trial | None:
        """The finished trial with the best model, the first of equals; None where none has finished."""
        finished = [(trial, value) for trial in self.ended if (value := self.value(trial)) is not None]
        if not finished:
            return None
        sign = 1 if self.sweep.best_is_max else -1
        return max(finished, key=lambda pair: sign * pair[1])[0]

    def values_of(self, trial: Trial) -> dict[str, Any]:
        """The swept keys that count in the trial, the default's own values among them."""
        return self.sweep.default_values() if trial.name == DEFAULT and not trial.values else dict(trial.values)

    def _known(self) -> list[Ended]:
        """What the next proposal may depend on; the best look where train.select=val takes that for the model."""
        return [Ended(self.values_of(t), t.looks, self.value(t)) for t in self.ended if t.state in (FINISHED, STOPPED)]

    def _append(self, event: Mapping[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._apply(event)

    def _apply(self, event: Mapping[str, Any]) -> None:
        name, kind = event["trial"], event["event"]
        if kind == "proposed":
            self.by_name[name] = Trial(name, event["values"], event["run"])
            return
        trial = self.by_name[name]
        if kind == "look":
            step, value = event["step"], event["value"]
            trial.spent += max(0, step - trial.last_step)
            trial.looks[step] = value
            self.history.append((name, step, value, trial.spent))
        elif kind == "took_over":
            donor = self.by_name[event["from"]]
            trial.run, trial.values = event["run"], event["values"]
            trial.looks = {step: value for step, value in donor.looks.items() if step <= event["step"]}
        elif kind == "ended":
            trial.state, trial.reason = event["state"], event["reason"]
            trial.seconds += event["seconds"]
        else:
            raise KeyError(kind)


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """Events on disk; what follows the last newline is cut off. Raises DataError for a line that is no event."""
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as torn:
            torn.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            event = json.loads(line)
            if not {"trial", "event"} <= event.keys():
                raise ValueError("no event")
        except (ValueError, AttributeError) as error:
            raise DataError(f"line {number} is no event: {error}", where=file, fix="restore it from a copy") from None
        yield event
