"""The local executor: unordered results, failures as lines, and a worker that dies costs its own item only."""

from __future__ import annotations

import os
import signal

import pytest

from distseg.errors import DataError, InputError
from distseg.work.executor import LocalExecutor, Outcome, attempt


def work(item: int) -> int:
    if item == 3:
        raise DataError("bad", where="three")
    if item == 4:
        raise ZeroDivisionError("a fault\nof ours")
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def test_local_pool_reports_failures_and_survives_a_dead_worker() -> None:
    executor = LocalExecutor(2)
    try:
        outcomes = {outcome.key: outcome for outcome in executor.map(work, range(9))}
    finally:
        executor.close()
    assert [outcomes[str(n)].value for n in (0, 1, 2, 6, 7, 8)] == [0, 1, 4, 36, 49, 64]
    assert outcomes["3"].error == "three: bad"
    assert outcomes["4"].error == "ZeroDivisionError: a fault of ours"
    assert "worker process died" in outcomes["5"].error
    assert len(outcomes) == 9


def test_oneworker_is_this_process() -> None:
    seen = list(LocalExecutor(1).map(lambda item: (item, os.getpid()), [1, 2], key=lambda item: f"n{item}"))
    assert seen == [Outcome("n1", (1, os.getpid())), Outcome("n2", (2, os.getpid()))]
    assert attempt(work, 3, "k") == Outcome("k", error="three: bad")
    with pytest.raises(InputError, match=r"resources\.workers"):
        LocalExecutor(0)
