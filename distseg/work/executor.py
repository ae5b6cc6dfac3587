"""Running one function over many items: the protocol, and a pool of processes on this machine.

An item that fails is an Outcome with an error line; the other items go on. A worker that dies (out of memory, killed)
costs at most the item that kills it: what was in flight is tried again, one item at a time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Generic, Protocol, TypeVar

from distseg.errors import DistsegError, InputError

Item = TypeVar("Item")
Value = TypeVar("Value")

_WATCH_S = 0.5
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What became of one item: `error` is None and `value` is the result, or `error` is one line and `value` None."""

    key: str
    value: Value | None = None
    error: str | None = None


class Executor(Protocol):
    """Maps a picklable function over items; results in the order they finish. `close` frees the workers."""

    workers: int

    def map(
        self, fn: Callable[[Item], Value], items: Iterable[Item], *, key: Callable[[Item], str] = str
    ) -> Iterator[Outcome[Value]]: ...

    def close(self) -> None: ...


def attempt(fn: Callable[[Item], Value], item: Item, key: str) -> Outcome[Value]:
    """Run one item where the work is done, so that only a line of text crosses the process border."""
    try:
        return Outcome(key, value=fn(item))
    except Exception as error:  # any fault of one item must leave the others running
        if os.environ.get("DISTSEG_TRACEBACK") == "1":
            traceback.print_exc(file=sys.stderr)
        known = str(error) if isinstance(error, DistsegError) else f"{type(error).__name__}: {error}"
        return Outcome(key, error=" ".join(known.split()))


class LocalExecutor:
    """`workers` processes started by spawn, each with its share of the cores; one worker is this process itself.

    With more than one, a script that calls this needs the usual `if __name__ == "__main__":`.
    """

    def __init__(self, workers: int = 1) -> None:
        if workers < 1:
            raise InputError("too few workers", where="resources.workers", value=workers, rule="at least 1")
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def map(
        self, fn: Callable[[Item], Value], items: Iterable[Item], *, key: Callable[[Item], str] = str
    ) -> Iterator[Outcome[Value]]:
        if self.workers == 1:
            for item in items:
                yield attempt(fn, item, key(item))
            return
        try:
            yield from self._map_in_pool(fn, iter(items), key)
        except GeneratorExit:
            self.close()
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _map_in_pool(
        self, fn: Callable[[Item], Value], items: Iterator[Item], key: Callable[[Item], str]
    ) -> Iterator[Outcome[Value]]:
        running: dict[Future[Outcome[Value]], Item] = {}
        suspects: deque[Item] = deque()  # in flight when a worker died; now run alone, so that the culprit shows
        alone = False
        exhausted = False
        while True:
            while not exhausted and not suspects and not alone and len(running) < 2 * self.workers:
                try:
                    item = next(items)
                except StopIteration:
                    exhausted = True
                else:
                    running[self._submit(fn, item, key)] = item
            if suspects and not running:
                item, alone = suspects.popleft(), True
                running[self._submit(fn, item, key)] = item
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = False
            for future in done:
                item = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    broken = True
                    if alone:
                        why = "its worker process died, most often for want of memory; use fewer resources.workers"
                        yield Outcome(key(item), error=why)
                    else:
                        suspects.append(item)
            if broken:
                suspects.extend(running.values())
                running.clear()
                self.close()
            alone = bool(running) and alone

    def _submit(self, fn: Callable[[Item], Value], item: Item, key: Callable[[Item], str]) -> Future[Outcome[Value]]:
        if self._pool is None:
            self._pool = _new_pool(self.workers)
        # Processes start at submit and read these as they import numpy; this process keeps its own threads.
        threads = str(max(1, available_cores() // self.workers))
        before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, threads))
        try:
            return self._pool.submit(attempt, fn, item, key(item))
        except BrokenProcessPool:  # a worker died while idle: nothing was lost with it
            self._pool = _new_pool(self.workers)
            return self._pool.submit(attempt, fn, item, key(item))
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _new_pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_end_with_parent, initargs=(os.getpid(),)
    )


def _end_with_parent(parent: int) -> None:
    """Start a thread that ends this process once `parent` is gone: a killed driver must leave nobody at work."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def available_cores() -> int:
    """Cores this process may use, not those the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
