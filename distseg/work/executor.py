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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Generic, Protocol, TypeVar

from distseg.errors import DistsegError, InputError, is_out_of_memory

Item = TypeVar("Item")
Value = TypeVar("Value")

# Set while a caller that is interrupted waits for its threads: work that takes long looks at it and gives up.
STOPPING = threading.Event()
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What became of one item: `error` is None and `value` is the result, or `error` is one line and `value` None."""

    key: str
    value: Value | None = None
    error: str | None = None


OUT_OF_MEMORY = "out of memory; use fewer resources.workers"
MOST_OFTEN = "most often for want of memory; use fewer resources.workers"  # of a worker that died without a word


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
        if is_out_of_memory(error):
            return Outcome(key, error=OUT_OF_MEMORY)
        known = str(error) if isinstance(error, DistsegError) else f"{type(error).__name__}: {error}"
        return Outcome(key, error=" ".join(known.split()))


class LocalExecutor:
    """`workers` processes started by spawn, each with its share of the cores; one worker is this process itself.

    With more than one, a script that calls this needs the usual `if __name__ == "__main__":`. One worker has `at_once`
    items in hand, in threads, so that one can read or write while another computes; several processes need not.
    """

    def __init__(self, workers: int = 1, *, at_once: int = 1) -> None:
        if workers < 1:
            raise InputError("too few workers", where="resources.workers", value=workers, rule="at least 1")
        self.workers, self._at_once = workers, at_once
        self._pool: ProcessPoolExecutor | None = None

    def map(
        self, fn: Callable[[Item], Value], items: Iterable[Item], *, key: Callable[[Item], str] = str
    ) -> Iterator[Outcome[Value]]:
        if self.workers == 1:
            if self._at_once == 1:
                for item in items:
                    yield attempt(fn, item, key(item))
            else:
                yield from self._map_in_threads(fn, items, key)
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

    def _map_in_threads(
        self, fn: Callable[[Item], Value], items: Iterable[Item], key: Callable[[Item], str]
    ) -> Iterator[Outcome[Value]]:
        running: set[Future[Outcome[Value]]] = set()
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="worker") as pool:
            try:
                for item in items:
                    running.add(pool.submit(attempt, fn, item, key(item)))
                    while len(running) >= self._at_once:
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        for future in done:
                            yield future.result()
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                if running:  # the caller stopped early
                    STOPPING.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    STOPPING.clear()

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
                        yield Outcome(key(item), error=f"its worker process died, {MOST_OFTEN}")
                    else:
                        suspects.append(item)
            if broken:
                suspects.extend(running.values())
                running.clear()
                self.close()
            alone = bool(running) and alone

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers, mp_context=get_context("spawn"), initializer=_end_with_parent, initargs=(os.getpid(),)
        )

    def _submit(self, fn: Callable[[Item], Value], item: Item, key: Callable[[Item], str]) -> Future[Outcome[Value]]:
        if self._pool is None:
            self._pool = self._new_pool()
        # Processes start at submit and read these as they import numpy; this process keeps its own threads.
        threads = str(max(1, available_cores() // self.workers))
        before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, threads))
        try:
            return self._pool.submit(attempt, fn, item, key(item))
        except BrokenProcessPool:  # a worker died while idle: nothing was lost with it
            self._pool = self._new_pool()
            return self._pool.submit(attempt, fn, item, key(item))
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _end_with_parent(parent: int) -> None:
    """In a worker: end it once the process that started it is gone. A pool's workers outlive a parent that is killed,
    wait for ever, and hold its memory and its GPU."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def available_cores() -> int:
    """Cores this process may use, not those the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
