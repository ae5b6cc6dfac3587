"""One process at a time in a store or a directory, on one machine or several that share a file system.

The lock is a file that names its owner: {"host", "pid", "token"}. On one host the kernel's file lock tells the living
from the dead, so a killed owner's place is free at once. An owner on another host may be invisible to that lock; it
shows that it lives by touching the file every few seconds, and its place is free once it has not for `LAPSE_S`. Times
are the file system's, not the hosts' clocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distseg.errors import InputError

HEARTBEAT_S = 5.0
LAPSE_S = 60.0
POLL_S = 0.2
_RECORD_NBYTES = 512
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class Owner:
    """The right to write, while it lasts."""

    def __init__(self, lock: Path, token: str, what: str, name: object) -> None:
        self._lock, self.token, self._what, self._name = lock, token, what, name

    def check(self) -> None:
        """Raises InputError where another process took over, as this one had stopped showing that it lives."""
        if not self.is_mine():
            raise InputError(
                f"another process took this {self._what} over while this one did not respond",
                where=self._name,
                value=_described(self.on_record()),
                fix="let it go on",
            )

    def is_mine(self) -> bool:
        return self.on_record().get("token") == self.token

    def on_record(self) -> dict[str, Any]:
        """Who the lock names, {} for nobody. Raises OSError where that cannot be known."""
        return _read(self._lock)

    def show_life(self, done: threading.Event) -> None:
        while not done.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a file system that is away for a moment; `check` says what matters
                if self.is_mine():
                    os.utime(self._lock)


@contextlib.contextmanager
def owning(lock: Path, *, what: str, name: object, wait_s: float = 0.0) -> Iterator[Owner]:
    """Hold `lock`, in a folder that is made for it, for as long as the context lasts. Raises InputError where it cannot
    be written, or where another process still holds it after `wait_s`.

    `what` and `name` are for messages: "cohort" and its path. An owner elsewhere is watched until it moves or lapses.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(f"cannot write there: {error.strerror}", where=name) from error
    try:
        _wait_for_place(descriptor, lock, what=what, name=name, until=time.monotonic() + wait_s)
        owner = Owner(lock, uuid.uuid4().hex, what, name)
        _write(descriptor, {"host": socket.gethostname(), "pid": os.getpid(), "token": owner.token})
        done = threading.Event()
        beating = threading.Thread(target=owner.show_life, args=(done,), name="heartbeat", daemon=True)
        beating.start()
        try:
            yield owner
        finally:
            done.set()
            beating.join()
            if owner.is_mine():
                _write(descriptor, {})
    finally:
        os.close(descriptor)


def _wait_for_place(descriptor: int, lock: Path, *, what: str, name: object, until: float) -> None:
    while True:
        try:
            return _refuse_living(descriptor, lock, what=what, name=name)
        except InputError:
            if time.monotonic() >= until:
                raise
        time.sleep(POLL_S)


def _refuse_living(descriptor: int, lock: Path, *, what: str, name: object) -> None:
    """Return once the owner of record is known to be dead, with the kernel's lock taken where there is one."""
    kernel = _kernel_lock(descriptor)
    owner = _read(lock)
    here = owner.get("host") == socket.gethostname()
    if kernel == "held" or (here and kernel == "none" and _lives(owner.get("pid"))):
        raise InputError(f"another process writes this {what}", where=name, value=_described(owner), fix="wait for it")
    if not owner or here:
        return
    seen = lock.stat().st_mtime
    while _now(lock) - seen < LAPSE_S:
        time.sleep(min(1.0, HEARTBEAT_S))
        if lock.stat().st_mtime != seen:
            fix = f"wait for it; where it dies, its place is free {LAPSE_S:.0f} s later"
            raise InputError(f"another machine writes this {what}", where=name, value=_described(owner), fix=fix)


def _kernel_lock(descriptor: int) -> str:
    """ours, held (by another process), or none (this file system has no locks: heartbeats alone)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "held" if error.errno in _HELD else "none"
    return "ours"


def _lives(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _read(lock: Path) -> dict[str, Any]:
    """{} where nobody is on record."""
    try:
        owner = json.loads(lock.read_text(encoding="utf-8") or "{}")
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(descriptor: int, owner: dict[str, Any]) -> None:
    """In place, as the kernel's lock is on this very file, and in one piece of fixed length: never half a record."""
    os.pwrite(descriptor, json.dumps(owner).ljust(_RECORD_NBYTES - 1).encode() + b"\n", 0)
    os.ftruncate(descriptor, _RECORD_NBYTES)


def _now(lock: Path) -> float:
    """The file system's time: that of a file just made beside the lock."""
    probe = lock.with_name(f".{lock.name}.{uuid.uuid4().hex[:8]}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _described(owner: dict[str, Any]) -> str:
    return f"host {owner.get('host', 'unknown')}, process {owner.get('pid', 'unknown')}"
