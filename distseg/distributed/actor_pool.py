"""The Executor of `distseg.work` as a pool of Ray actors: each keeps what its items share, a model on a device.

Every actor has a few items at a time, in threads: one uses the network while another reads or packs. Nothing more is
in flight, so a million items are as cheap as ten. Results come as they finish.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

from distseg.distributed.cluster import Connection, connect
from distseg.errors import InputError, is_out_of_memory
from distseg.work.executor import MOST_OFTEN, OUT_OF_MEMORY, Item, Outcome, Value, attempt

MOST_FAILED_STARTS = 3  # of actors in a row, before the pool gives up


class _Worker:
    """Lives in an actor."""

    def started(self) -> bool:
        return True

    def run(self, fn: Callable[[Any], Any], item: Any, key: str) -> Outcome[Any]:
        return attempt(fn, item, key)


@dataclass(eq=False)
class _Actor:
    handle: Any
    started: Any  # Ray's reference, there once the actor is
    ready: bool = False
    in_flight: dict[Any, _Work] = field(default_factory=dict)


@dataclass(eq=False)
class _Work:
    item: Any
    died_before: bool = False  # in an actor that died: now it has one to itself, so that the culprit shows


class ActorPool:
    """Connects (or starts an embedded Ray) when first used; `close` stops what it started.

    An actor that dies, or its node, is replaced where the cluster has room; its items run once more, each alone in its
    actor, and are an Outcome with an error if that dies too. Ray gives an actor `cpus_per_actor` OpenMP threads.
    """

    def __init__(
        self, workers: int = 1, *, cpus_per_actor: float = 1.0, gpus_per_actor: float = 0.0, at_once: int = 1
    ) -> None:
        if workers < 1:
            raise InputError("too few workers", where="resources.workers", value=workers, rule="at least 1")
        self.workers = workers
        self._share = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor}
        self._at_once = at_once
        self._connection: Connection | None = None
        self._actors: list[_Actor] = []  # from one `map` to the next: what they hold was costly to load

    def map(
        self, fn: Callable[[Item], Value], items: Iterable[Item], *, key: Callable[[Item], str] = str
    ) -> Iterator[Outcome[Value]]:
        if self._connection is None:
            self._connection = connect(
                workers=self.workers, cpus_per_worker=self._share["num_cpus"], gpus_per_worker=self._share["num_gpus"]
            )
        while len(self._actors) < self.workers:
            self._actors.append(self._new_actor())
        run = _Run(self._new_actor, self._actors, self._at_once, fn, iter(items), key)
        try:
            yield from run.outcomes()
        finally:
            run.leave()

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _new_actor(self) -> _Actor:
        kind: Any = ray.remote(_Worker)
        options = {**self._share, "max_concurrency": self._at_once, "max_restarts": 0}
        handle = kind.options(**options).remote()
        return _Actor(handle, handle.started.remote())


class _Run:
    """One `map`: the actors, what they hold, and what waits."""

    def __init__(
        self,
        new_actor: Callable[[], _Actor],
        actors: list[_Actor],
        at_once: int,
        fn: Callable[[Any], Any],
        items: Iterator[Any],
        key: Callable[[Any], str],
    ) -> None:
        self._new_actor, self._at_once = new_actor, at_once
        self._fn, self._items, self._key = fn, items, key
        self._again: deque[_Work] = deque()
        self._waiting: dict[Any, _Actor] = {}  # Ray's reference -> the actor that owes its result
        self._failed_starts = 0
        self._exhausted = False
        self._actors = actors  # the pool's own list
        self._waiting.update({actor.started: actor for actor in actors if not actor.ready})

    def outcomes(self) -> Iterator[Outcome[Any]]:
        while True:
            for actor in self._actors:
                self._fill(actor)
            if self._exhausted and not self._again and not any(actor.in_flight for actor in self._actors):
                return
            (done,), _ = ray.wait(list(self._waiting), num_returns=1)
            yield from self._take(done)

    def leave(self) -> None:
        """An actor that still works on something, as the caller stopped early, is ended."""
        for actor in [actor for actor in self._actors if actor.in_flight]:
            self._actors.remove(actor)
            ray.kill(actor.handle)

    def _start(self) -> None:
        actor = self._new_actor()
        self._actors.append(actor)
        self._waiting[actor.started] = actor

    def _fill(self, actor: _Actor) -> None:
        """Give a ready actor what it can hold; an item that an actor died with gets one that holds nothing else."""
        while actor.ready and len(actor.in_flight) < self._at_once:
            if any(work.died_before for work in actor.in_flight.values()):
                return
            if self._again:
                if actor.in_flight:
                    return
                work = self._again.popleft()
            else:
                try:
                    work = _Work(next(self._items))
                except StopIteration:
                    self._exhausted = True
                    return
            reference = actor.handle.run.remote(self._fn, work.item, self._key(work.item))
            actor.in_flight[reference] = work
            self._waiting[reference] = actor

    def _take(self, done: Any) -> Iterator[Outcome[Any]]:
        actor = self._waiting.pop(done)
        work = actor.in_flight.pop(done, None)
        try:
            result = ray.get(done)
        except ray.exceptions.RayError as error:
            yield from self._bury(actor, work, error)
            return
        self._failed_starts = 0
        if work is None:
            actor.ready = True
        else:
            yield result

    def _bury(self, actor: _Actor, work: _Work | None, error: Exception) -> Iterator[Outcome[Any]]:
        """An actor died: replace it, and see to all that it held."""
        self._actors.remove(actor)
        self._failed_starts += not actor.ready
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise InputError(
                "workers do not start", where="launcher=ray", value=_line(error), fix="launcher=local shows more"
            ) from error
        for reference in actor.in_flight:
            del self._waiting[reference]
        ray.kill(actor.handle)
        self._start()
        for held in ([work] if work else []) + list(actor.in_flight.values()):
            if held.died_before:
                # Ray knows why only of what it killed itself: not of the kernel's killer, nor of a library that aborts.
                why = f"its worker died twice ({type(error).__name__}: {_line(error)}), {MOST_OFTEN}"
                if is_out_of_memory(error):
                    why = f"its worker was killed by Ray: {OUT_OF_MEMORY}"
                yield Outcome(self._key(held.item), error=why)
            else:
                self._again.append(_Work(held.item, died_before=True))


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
