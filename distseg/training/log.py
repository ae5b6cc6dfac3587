"""What a run says while it trains: metrics.jsonl, trackers, warnings. Rank 0 writes; all ranks check."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from distseg.config.schema import TrainRunConfig
from distseg.errors import NonFiniteLossError
from distseg.methods.base import At, Method
from distseg.training.alarms import Alarms
from distseg.training.clock import Clock
from distseg.training.run import RunDirectory
from distseg.training.step import record
from distseg.training.trackers import open_trackers

Row = dict[str, Any]


class Reporter(Protocol):
    """Who is told how the run gets on. Called on rank 0 only, but for `checkpoint`."""

    def step(self, row: Mapping[str, Any], total_steps: int) -> None: ...

    def checkpoint(self, step: int) -> None:
        """A checkpoint of `step` is on disk. Called on all ranks."""

    def note(self, text: str) -> None: ...


class StepLog:
    """Collects what steps return and writes it out later, so that a GPU never waits for a number to be printed.

    On CPU every step is written at once; on a GPU every `GPU_FLUSH_STEPS`, times being means over those.
    """

    GPU_FLUSH_STEPS = 10

    def __init__(
        self,
        run: RunDirectory,
        *,
        method: Method,
        clock: Clock,
        reporter: Reporter | None,
        config: TrainRunConfig,
        flush_steps: int,
        first_step: int,
        scan_ids: Callable[[int, Sequence[int]], tuple[str, ...]],
    ) -> None:
        self._run, self._method, self._batch_size = run, method, config.train.batch_size
        self._clock, self._reporter, self._flush_steps = clock, reporter, flush_steps
        self._config, self._scan_ids = config, scan_ids
        earlier = [row for row in run.metrics_from(None)[0] if row["step"] < first_step]  # others may yet be cut
        self._skipped = _skipped_last(earlier)  # steps in a row
        self._pending: list[tuple[At, tuple[str, ...], Tensor, dict[str, float]]] = []
        self._waited_s, self._since = 0.0, time.perf_counter()
        self._alarms = Alarms(earlier if reporter is not None else (), branched=config.train.init_from is not None)
        self._trackers = open_trackers(run, config.logging, first_step) if reporter is not None else []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the loop waits for a batch."""
        begun = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begun

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Inside is time that belongs to no step: validation, a checkpoint."""
        begun = time.perf_counter()
        with self._clock.stopped():
            yield
        self._since += time.perf_counter() - begun

    def add(self, at: At, logged: Mapping[str, Tensor], extra: dict[str, float]) -> None:
        """`extra` joins the row as it is, e.g. val_dice. Raises NonFiniteLossError, on all ranks, after too many
        skipped steps in a row."""
        self._pending.append((at, tuple(logged), torch.stack(list(logged.values())), extra))
        if len(self._pending) >= self._flush_steps:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        sections = self._clock.read()  # waits for the GPU
        now, count = time.perf_counter(), len(self._pending)
        times = {
            "time_step_s": (now - self._since) / count,
            "time_data_s": self._waited_s / count,
            "time_network_s": sections.get("network", 0.0) / count,
            "time_matching_s": sections.get("matching", 0.0) / count,
        }
        if "bank" in sections:  # making a version, its network passes included
            times["time_bank_s"] = sections["bank"] / count
        self._since, self._waited_s = now, 0.0
        pending, self._pending = self._pending, []
        for at, names, values, extra in pending:
            logged = dict(zip(names, values.tolist(), strict=True))
            row: Row = {**record(logged, method=self._method, at=at, batch_size=self._batch_size), **extra, **times}
            if logged["skipped"]:
                row["not_finite"] = self._trouble(row, logged)
            row.update(self._alarms.of(row))
            if self._reporter is not None:
                self._run.append_metrics(row)
                self._to_trackers(row)
                self._reporter.step(row, at.total_steps)
            self._skipped = self._skipped + 1 if "not_finite" in row else 0
            if self._skipped == self._config.train.skips_in_a_row:
                raise NonFiniteLossError(at.step, self._skipped, row["not_finite"])

    def close(self) -> None:
        self.flush()
        for tracker in self._trackers:
            tracker.close()

    def _to_trackers(self, row: Row) -> None:
        every = self._config.logging.tensorboard_every_steps
        due = row["step"] % every == 0 or any(k.startswith("val_") for k in row)
        if due:
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            values = {name: float(value) for name, value in numbers.items() if name != "step"}
            for tracker in self._trackers:
                tracker.log(values, int(row["step"]))

    def _trouble(self, row: Row, logged: Mapping[str, float]) -> str:
        """Which terms, on which scans; where the losses are finite it is their gradient, on any of the step's."""
        terms = [n for n, v in row.items() if n.startswith("loss_") and v is not None and not math.isfinite(v)]
        slots = [slot for slot in range(self._batch_size) if logged[f"broken/{slot}"]]
        scans = self._scan_ids(row["step"], slots or range(self._batch_size))
        return f"{', '.join(terms) or 'the gradient'} not finite on {', '.join(dict.fromkeys(scans))}"


def _skipped_last(earlier: Sequence[Mapping[str, Any]]) -> int:
    """How many steps in a row were skipped at the end of `earlier`."""
    return sum(1 for _ in itertools.takewhile(lambda row: "not_finite" in row, reversed(earlier)))
