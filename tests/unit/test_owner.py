"""A living owner is refused, here and elsewhere; a dead one's place is free, at once here, elsewhere when it lapses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distseg.errors import InputError
from distseg.work import owner as owner_module
from distseg.work.owner import owning

HOLD = """
import sys, time
from pathlib import Path
from distseg.work.owner import owning
with owning(Path(sys.argv[1]), what="output", name="OUT"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_living_process_here_is_refused_and_a_killed_one_is_not(tmp_path: Path) -> None:
    lock = tmp_path / "owner.json"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = rf"OUT: another process writes this output \(got host {socket.gethostname()}, process {holder.pid}\)"
        with pytest.raises(InputError, match=said), owning(lock, what="output", name="OUT"):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    begun = time.monotonic()
    with owning(lock, what="output", name="OUT") as owner:
        owner.check()
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert time.monotonic() - begun < 2  # no waiting for a heartbeat of this host
    assert json.loads(lock.read_text()) == {}


def test_a_killed_owner_elsewhere_lapses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(owner_module, "LAPSE_S", 0.4)
    lock = tmp_path / "owner.json"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "theirs"}))
    begun = time.monotonic()
    with owning(lock, what="output", name="OUT") as owner:
        assert 0.3 < time.monotonic() - begun < 5
        owner.check()
    os.utime(lock, (0, 0))
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "theirs"}))
    os.utime(lock, (time.time() - 100,) * 2)
    begun = time.monotonic()
    with owning(lock, what="output", name="OUT"):
        assert time.monotonic() - begun < 0.3  # it lapsed long ago


def test_a_living_owner_elsewhere_is_refused_as_soon_as_it_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_module, "HEARTBEAT_S", 0.05)
    lock = tmp_path / "owner.json"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "theirs"}))
    timer = threading.Timer(0.2, os.utime, (lock,))
    timer.start()
    with (
        pytest.raises(InputError, match=r"another machine writes this output \(got host elsewhere.*60 s later"),
        owning(lock, what="output", name="OUT"),
    ):
        pass
    timer.join()
    assert json.loads(lock.read_text())["token"] == "theirs"


def test_an_owner_that_was_taken_over_learns_of_it(tmp_path: Path) -> None:
    lock = tmp_path / "owner.json"
    with owning(lock, what="output", name="OUT") as owner:
        lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "theirs"}))
        with pytest.raises(InputError, match=r"took this output over.*host elsewhere, process 7"):
            owner.check()
    assert json.loads(lock.read_text())["token"] == "theirs"  # not ours to clear


def test_without_kernel_locks_the_process_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "_kernel_lock", lambda _: "none")
    lock = tmp_path / "owner.json"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "token": "theirs"}))
    with pytest.raises(InputError, match="another process writes this output"), owning(lock, what="output", name="O"):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid, "token": "theirs"}))
    with owning(lock, what="output", name="O"):
        pass


def test_it_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "HEARTBEAT_S", 0.02)
    lock = tmp_path / "owner.json"
    with owning(lock, what="output", name="OUT"):
        os.utime(lock, (0, 0))
        until = time.monotonic() + 5
        while lock.stat().st_mtime < 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert lock.stat().st_mtime > 1


def test_it_waits_as_long_as_it_is_told_to(tmp_path: Path) -> None:
    lock = tmp_path / "new/folder/.lock"
    with owning(lock, what="trial", name="T"):
        begun = time.monotonic()
        refused = pytest.raises(InputError, match="another process writes this trial")
        with refused, owning(lock, what="trial", name="T", wait_s=0.3):
            pass
        assert 0.3 <= time.monotonic() - begun < 2
    held = threading.Event()

    def hold() -> None:
        with owning(lock, what="trial", name="T"):
            held.set()
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with owning(lock, what="trial", name="T", wait_s=10):
        pass
    holder.join()


def test_where_it_cannot_write_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lock = tmp_path / "file/o/owner.json"
    with pytest.raises(InputError, match="OUT: cannot write there"), owning(lock, what="output", name="OUT"):
        pass
