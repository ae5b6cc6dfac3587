"""One writer at a time for a cohort behind a URL, where no kernel's lock reaches.

The lock is an object that is made only where there is none; its owner counts in it every few seconds. Who finds one
watches it: a count that grows is a living owner, one that stands still for `LAPSE_S` is nobody's. No clock is compared.
A killed owner on this host is known by its process. Between the last look and the taking over lies a moment that only a
store with conditional deletes could close.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distseg.data.place import create_text, write_text
from distseg.errors import InputError

HEARTBEAT_S = 5.0
LAPSE_S = 60.0


@contextlib.contextmanager
def owning_url(lock: Path, *, what: str, name: object) -> Iterator[None]:
    """Hold `lock` while the context lasts. Raises InputError while another process holds it."""
    me = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex, "count": 0}
    _take(lock, me, what, name)
    done = threading.Event()
    life = threading.Thread(target=_show_life, args=(lock, me, done), name="owner", daemon=True)
    life.start()
    try:
        yield
    finally:
        done.set()
        life.join()
        if _read(lock).get("token") == me["token"]:
            lock.unlink()


def _take(lock: Path, me: dict[str, Any], what: str, name: object) -> None:
    while True:
        try:
            create_text(lock, json.dumps(me))
            return
        except FileExistsError:
            holder = _read(lock)
            if holder and _is_alive(lock, holder):
                shown = f"process {holder.get('pid')} on {holder.get('host')}"
                fix = "wait for it, or stop it"
                raise InputError(f"another process writes this {what}", where=name, value=shown, fix=fix) from None
            if _read(lock) == holder:
                lock.unlink(missing_ok=True)


def _is_alive(lock: Path, holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(int(holder.get("pid", 0)), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # alive, another user's
    begun = time.monotonic()
    while time.monotonic() - begun < LAPSE_S:
        time.sleep(HEARTBEAT_S / 5)
        now = _read(lock)
        if now != holder:
            return bool(now)
    return False


def _show_life(lock: Path, me: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # a store that is away for a moment
            if _read(lock).get("token") != me["token"]:
                return
            me["count"] += 1
            write_text(lock, json.dumps(me))


def _read(lock: Path) -> dict[str, Any]:
    """{} for a lock that is gone or damaged."""
    try:
        found = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
