"""The local executor: unordered results, failures as lines, and a worker that dies costs its own item only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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


def say_and_sleep(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def test_a_killed_driver_leaves_no_worker(tmp_path: Path) -> None:
    script = (
        "from tests.unit.test_executor import say_and_sleep\n"
        "from distseg.work.executor import LocalExecutor\n"
        f"if __name__ == '__main__': list(LocalExecutor(2).map(say_and_sleep, [{str(tmp_path)!r}] * 2))\n"
    )
    file = tmp_path / "driver.py"
    file.write_text(script)
    root = str(Path(__file__).parents[2])
    driver = subprocess.Popen([sys.executable, str(file)], env={**os.environ, "PYTHONPATH": root})
    try:
        wait_for(lambda: len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 2)
    finally:
        driver.kill()
        driver.wait()
    workers = [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]
    wait_for(lambda: not any(alive(pid) for pid in workers))
    assert not any(alive(pid) for pid in workers)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Running; a zombie that nobody has reaped is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
