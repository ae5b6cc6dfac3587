"""How a benchmark gets on: cells done, time left, and a line for each cell that ends."""

from __future__ import annotations

from collections.abc import Sequence

from distseg.methods import passes_a_slot
from distseg.work.benchmark_cells import Cell
from distseg.work.runs_progress import RunsProgress, steps_of

SPEED_OVER_S = 900.0  # cells of fast and slow methods take turns: a shorter memory makes the time left jump
PASSES_A_SCAN = 50  # what evaluating a scan takes, in passes over a batch; a guess is enough for the time left


class BenchmarkProgress(RunsProgress):
    """The work of all cells in network passes."""

    def __init__(self, todo: Sequence[Cell], *, done: int, scans: int, enabled: bool) -> None:
        self._todo, self._done, self._total = {cell.name: cell for cell in todo}, done, done + len(todo)
        self._passes = {cell.name: passes_a_slot(cell.config) for cell in todo}
        self._scans = scans  # that an evaluation measures
        self._ended: set[str] = set()
        total = sum(self._work(cell) for cell in todo)
        enabled = enabled and bool(todo)
        super().__init__(total=total, left="left", speed_over_s=SPEED_OVER_S, bar_width=40, enabled=enabled)

    def ended(self, name: str, error: str | None) -> None:
        """A cell is finished, or failed with this line."""
        self._ended.add(name)
        self._done += 1
        if self._enabled:
            wall = self._todo[name].wall_s()
            times = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in wall.items())
            said = f"failed: {error}" if error is not None else times or "done"
            self._say(f"[{self._done}/{self._total}] {name}: {said}")

    def _words(self) -> str:
        return f"cells {self._done}/{self._total}"

    def _work_done(self) -> float:
        return sum(self._work_of(cell) for cell in self._todo.values())

    def _work(self, cell: Cell) -> float:
        evaluation = 0 if cell.evaluate is None else PASSES_A_SCAN * self._scans
        return cell.config.train.steps * self._passes[cell.name] + evaluation

    def _work_of(self, cell: Cell) -> float:
        if cell.name in self._ended:
            return self._work(cell)
        return steps_of(cell.run) * self._passes[cell.name]
