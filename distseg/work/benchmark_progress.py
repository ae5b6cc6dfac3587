"""How a benchmark gets on: cells done, time left, and a line for each cell that ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distseg.errors import DataError
from distseg.methods import passes_a_slot
from distseg.training.run import RunDirectory
from distseg.work.benchmark_cells import Cell

POLL_S = 2.0
SPEED_OVER_S = 900.0  # cells of fast and slow methods take turns: a shorter memory makes the time left jump
PASSES_A_SCAN = 50  # what evaluating a scan takes, in passes over a batch; a guess is enough for the time left


class BenchmarkProgress:
    """A bar over the work of all cells, in network passes, fed from the cells' own metrics.jsonl. A context manager."""

    def __init__(self, todo: Sequence[Cell], *, done: int, scans: int, enabled: bool) -> None:
        self._todo, self._done, self._total = {cell.name: cell for cell in todo}, done, done + len(todo)
        self._passes = {cell.name: passes_a_slot(cell.config) for cell in todo}
        self._scans = scans  # that an evaluation measures
        self._ended: set[str] = set()
        self._console = Console(stderr=True)
        self._enabled = enabled and bool(todo)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._enabled,
            speed_estimate_period=SPEED_OVER_S,
        )
        self._task = self._progress.add_task(self._words(), total=sum(self._work(cell) for cell in todo) or 1)
        self._progress.update(self._task, completed=self._work_done())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> BenchmarkProgress:
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

    def ended(self, name: str, error: str | None) -> None:
        """A cell is finished, or failed with this line."""
        self._ended.add(name)
        self._done += 1
        if self._enabled:
            wall = self._todo[name].wall_s()
            times = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in wall.items())
            said = f"failed: {error}" if error is not None else times or "done"
            self._console.print(f"[{self._done}/{self._total}] {name}: {said}", highlight=False, markup=False)
        self._progress.update(self._task, description=self._words(), completed=self._work_done())

    def _words(self) -> str:
        return f"cells {self._done}/{self._total}"

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            self._progress.update(self._task, completed=self._work_done())

    def _work(self, cell: Cell) -> float:
        evaluation = 0 if cell.evaluate is None else PASSES_A_SCAN * self._scans
        return cell.config.train.steps * self._passes[cell.name] + evaluation

    def _work_done(self) -> float:
        return sum(self._work_of(cell) for cell in self._todo.values())

    def _work_of(self, cell: Cell) -> float:
        if cell.name in self._ended:
            return self._work(cell)
        try:
            last = RunDirectory(cell.run).last_metrics()
        except (OSError, ValueError, DataError):  # being replaced at this moment; the next look will do
            return 0.0
        return float(last["step"]) * self._passes[cell.name] if last else 0.0
