"""A run's progress in the terminal: one bar with loss, coverage and time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distseg.training.alarms import WINDOW, alarm_text


class TerminalReporter:
    """Draws on stderr, so that stdout stays for results. Use as a context manager."""

    def __init__(self, *, title: str, enabled: bool) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not enabled,
        )
        self._told: set[str] = set()  # each alarm and each skipped step once
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self._task = self._progress.add_task(title, total=None, figures="starting")

    def __enter__(self) -> TerminalReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, row: Mapping[str, Any], total_steps: int) -> None:
        self._rows.append(row)
        for name in [n for n in row if n.startswith("alarm_") and n not in self._told]:
            self._told.add(name)
            self.note(alarm_text(name, self._rows))
        if "not_finite" in row:
            text = f"step {row['step']} skipped: {row['not_finite']}"
            if text not in self._told:  # a driver reads lines again that were cut back and written anew
                self._told.add(text)
                self.note(text)
        self._progress.update(self._task, total=total_steps, completed=row["step"], figures=figures(row))

    def checkpoint(self, step: int) -> None:
        pass  # the bar says enough

    def note(self, text: str) -> None:
        """Said with and without a bar."""
        self._console.print(f"note: {text}", style="yellow", highlight=False, markup=False)


def figures(row: Mapping[str, Any]) -> str:
    """The handful of numbers worth a glance: loss, share of sure voxels, validation Dice, seconds a step."""
    parts = []
    for key, label in (("loss", "loss"), ("coverage_reliable", "sure"), ("val_dice", "Dice")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.2f}")
    if row.get("time_step_s") is not None:
        parts.append(f"{row['time_step_s']:.1f} s")
    return " ".join(parts)
