"""A bar over the work of many runs that others train, fed from the runs' own metrics.jsonl."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distseg.errors import DataError
from distseg.training.run import RunDirectory

POLL_S = 2.0


class RunsProgress(ABC):
    """Draws on stderr; a context manager. `total` is in the unit of `_work_done`, both of which a subclass chooses."""

    def __init__(self, *, total: float, left: str, speed_over_s: float, bar_width: int, enabled: bool) -> None:
        """What the subclass needs for its words and its work is there before. `left`: words before the time left."""
        self._enabled = enabled
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=bar_width),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn(left),
            TimeRemainingColumn(),
            console=self._console,
            disable=not enabled,
            speed_estimate_period=speed_over_s,
        )
        self._task = self._progress.add_task(self._words(), total=total or 1)
        self._progress.update(self._task, completed=self._work_done())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    @abstractmethod
    def _words(self) -> str:
        """Before the bar."""

    @abstractmethod
    def _work_done(self) -> float:
        """Called from a thread of its own."""

    def __enter__(self) -> Self:
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

    def _say(self, line: str) -> None:
        """A line above the bar, and the bar anew."""
        self._console.print(line, highlight=False, markup=False)
        self._progress.update(self._task, description=self._words(), completed=self._work_done())

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            self._progress.update(self._task, completed=self._work_done())


def steps_of(run: str | Path, *, unknown: int = 0) -> int:
    """Steps that a run's metrics.jsonl shows; `unknown` while the file is being replaced: the next look will do."""
    try:
        last = RunDirectory(run).last_metrics()
    except (OSError, ValueError, DataError):
        return unknown
    return int(last["step"]) if last else 0
