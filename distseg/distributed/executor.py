"""The Executor of `distseg.work` on Ray: one task an item, as many in flight as there are workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from distseg.distributed.cluster import Connection, connect
from distseg.errors import InputError
from distseg.work.executor import Item, Outcome, Value, attempt


class RayExecutor:
    """Connects (or starts an embedded Ray) when first used; `close` stops what it started.

    Items and results travel through Ray, so both are paths and records, never volumes. Ray gives each task
    `cpus_per_task` cores and as many OpenMP threads. A worker that dies is tried once more by Ray, then is an Outcome
    with an error.
    """

    def __init__(self, workers: int = 1, *, cpus_per_task: float = 1.0, gpus_per_task: float = 0.0) -> None:
        if workers < 1:
            raise InputError("too few workers", where="resources.workers", value=workers, rule="at least 1")
        self.workers = workers
        self._cpus_per_task, self._gpus_per_task = cpus_per_task, gpus_per_task
        self._connection: Connection | None = None

    def map(
        self, fn: Callable[[Item], Value], items: Iterable[Item], *, key: Callable[[Item], str] = str
    ) -> Iterator[Outcome[Value]]:
        if self._connection is None:
            self._connection = connect(
                workers=self.workers, cpus_per_worker=self._cpus_per_task, gpus_per_worker=self._gpus_per_task
            )
        task: Any = ray.remote(attempt).options(
            num_cpus=self._cpus_per_task, num_gpus=self._gpus_per_task, max_retries=1
        )
        in_flight: dict[Any, str] = {}
        try:
            for item in items:
                name = key(item)
                in_flight[task.remote(fn, item, name)] = name
                if len(in_flight) >= self.workers:
                    yield self._next(in_flight)
            while in_flight:
                yield self._next(in_flight)
        finally:
            for reference in in_flight:  # the caller stopped early
                ray.cancel(reference, force=True)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @staticmethod
    def _next(in_flight: dict[Any, str]) -> Outcome[Any]:
        (done,), _ = ray.wait(list(in_flight), num_returns=1)
        name = in_flight.pop(done)
        try:
            outcome: Outcome[Any] = ray.get(done)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()
            line = reason[0] if reason else ""
            return Outcome(name, error=f"its worker process died ({type(error).__name__}: {line})")
        return outcome
