"""Labelling by a pool of real Ray actors: bounded in flight, dead actors replaced, the same bytes as one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from distseg.data.label_output import KINDS, read_ledger
from distseg.distributed.actor_pool import ActorPool
from tests.unit import tiny_cohort
from tests.unit.test_label_cohort import ALL, contents, label
from tests.unit.tiny_run import make_run

_IN_FLIGHT: list[int] = []
_LOCK = threading.Lock()


def counted(item: int) -> tuple[int, int]:
    """The actor's process, and how many items it had in hand."""
    with _LOCK:
        _IN_FLIGHT.append(item)
        most = len(_IN_FLIGHT)
    time.sleep(0.05)
    with _LOCK:
        _IN_FLIGHT.remove(item)
    return os.getpid(), most


def dies(item: str) -> str:
    """One item kills every actor it meets, another the first one alone."""
    name, marker = item.split("|")
    if name == "always" or (name == "once" and not Path(marker).exists()):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return name


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_pool_is_bounded_and_outlives_its_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    pulled = []

    def items():
        for item in range(40):
            pulled.append(item)
            yield item

    pool = ActorPool(2, at_once=2)
    try:
        values = []
        for seen, outcome in enumerate(pool.map(counted, items()), start=1):
            values.append(outcome.value)
            assert len(pulled) <= seen + 4  # two actors with two each
        assert len({pid for pid, _ in values}) == 2
        assert max(most for _, most in values) == 2
        names = [f"{name}|{tmp_path / name}" for name in ("a", "always", "b", "once", "c", "d", "e", "f")]
        outcomes = {outcome.key.split("|")[0]: outcome for outcome in pool.map(dies, names)}
        assert sorted(outcomes) == sorted(name.split("|")[0] for name in names)
        assert {name for name, outcome in outcomes.items() if outcome.error} == {"always"}
        assert re.search(r"its worker died twice .* want of memory; use fewer", outcomes["always"].error)
        assert all(outcomes[name].value == name for name in outcomes if name != "always")
        assert list(pool.map(counted, [])) == []
        stopped = pool.map(counted, iter(range(100)))
        next(stopped)
        stopped.close()
    finally:
        pool.close()
    assert not ray.is_initialized()


DRIVE = """
import sys
from distseg.distributed.actor_pool import ActorPool
from distseg.work.label_cohort import label_cohort
from tests.unit.test_label_cohort import SETTINGS
run, cohort, output = sys.argv[1:]
pool = ActorPool(2, at_once=2)
try:
    label_cohort(run=run, cohort=cohort, output=output, settings=SETTINGS, executor=pool, progress=False)
finally:
    pool.close()
"""


def actors_of(driver: int) -> list[int]:
    """Processes of actors below a driver with an embedded Ray."""
    children: dict[int, list[int]] = {}
    names = {}
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            names[int(folder.name)] = (folder / "cmdline").read_text()
            children.setdefault(int(fields[1]), []).append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    found, below = [], [driver]
    while below:
        pid = below.pop()
        below += children.get(pid, [])
        if names.get(pid, "").startswith("ray::_Worker"):
            found.append(pid)
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_killed_actors_and_a_killed_driver_leave_what_no_kill_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run, cohort = make_run(tmp_path), tiny_cohort.make_cohort(tmp_path)
    label(run, cohort, tmp_path / "undisturbed")
    output = tmp_path / "o"

    def masks() -> dict[str, int]:
        return {f.name: f.stat().st_ino for f in (output / "masks").glob("[!.]*")}

    driver = subprocess.Popen([sys.executable, "-c", DRIVE, run, cohort, str(output)])
    committed: dict[str, int] = {}
    for wanted, kill_driver in ((1, False), (4, True)):
        while driver.poll() is None and len(masks()) < wanted:
            time.sleep(0.01)
        committed = masks()
        if kill_driver:
            driver.kill()
            driver.wait()
        else:
            os.kill(actors_of(driver.pid)[0], signal.SIGKILL)
    again = subprocess.run([sys.executable, "-c", DRIVE, run, cohort, str(output)], check=False)
    assert again.returncode == 0
    assert committed.items() <= masks().items()
    assert contents(output) == contents(tmp_path / "undisturbed")
    lines = [line for line in read_ledger(output) if "done" in line]
    assert sorted(line["done"] for line in lines) == ALL
    assert not [line for line in read_ledger(output) if "failed" in line]
    assert all(len(list((output / kind).iterdir())) == len(ALL) for kind in KINDS)
