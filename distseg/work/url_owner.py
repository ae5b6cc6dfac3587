"""One writer at a time for a cohort or a run behind a URL, where no kernel's lock reaches.

The lock is an object that is made only where there is none; its owner counts in it every few seconds. Who finds one
watches it: a count that grows is a living owner, one that stands still for `LAPSE_S` is nobody's. No clock is compared,
and a store that does not answer says nothing of an owner, who cannot count in it either. A killed owner on this host is
known by its process. Between the last look and the taking over lies a moment that only a store with conditional deletes
could close.
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

from distseg.data.carry import OWNER
from distseg.data.place import create_text, is_url, os_errors, reachable, write_text
from distseg.errors import InputError
from distseg.work.owner import Owner

HEARTBEAT_S = 5.0
LAPSE_S = 60.0


class UrlOwner(Owner):
    """An Owner whose lock lies behind a URL."""

    def __init__(self, lock: Path, me: dict[str, Any], what: str, name: object) -> None:
        super().__init__(lock, me["token"], what, name)
        self._me = me

    def on_record(self) -> dict[str, Any]:
        return _read(self._lock)

    def show_life(self, done: threading.Event) -> None:
        while not done.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a store that is away for a moment; `check` says what matters
                if not self.is_mine():
                    return
                self._me["count"] += 1
                with os_errors():
                    write_text(self._lock, json.dumps(self._me))


@contextlib.contextmanager
def owning_url(lock: Path, *, what: str, name: object) -> Iterator[UrlOwner]:
    """Hold `lock` while the context lasts. Raises InputError while another process holds it, OSError where the store
    does not answer."""
    me = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex, "count": 0}
    _take(lock, me, what, name)
    owner = UrlOwner(lock, me, what, name)
    done = threading.Event()
    life = threading.Thread(target=owner.show_life, args=(done,), name="owner", daemon=True)
    life.start()
    try:
        yield owner
    finally:
        done.set()
        life.join()
        with contextlib.suppress(OSError), os_errors():  # it lapses; what was done under it is what counts
            if owner.is_mine():
                lock.unlink()


@contextlib.contextmanager
def owning_run(run: str) -> Iterator[str | None]:
    """Hold a run behind a URL while it trains: the claim that its writer shows. None for one on this file system.

    Raises InputError while another process trains it, or where its storage does not answer.
    """
    if not is_url(run):
        yield None
        return
    with owning_folder(run, what="run", key="run") as owner:
        yield owner.token


@contextlib.contextmanager
def owning_folder(url: str, *, what: str, key: str) -> Iterator[UrlOwner]:
    """Hold a folder behind a URL by the OWNER in it. Raises InputError, which names `key`, while another process does,
    or where its storage does not answer."""
    lock = reachable(url, key=key) / OWNER
    with contextlib.ExitStack() as held:
        try:
            owner = held.enter_context(owning_url(lock, what=what, name=url))
        except OSError as error:  # no such bucket, or none that we may write to
            why = f"{type(error).__name__}: {error}"[:300]
            fix = "check the URL, the keys and the endpoint in the environment"
            raise InputError("cannot write there", where=key, value=url, rule=why, fix=fix) from error
        yield owner


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
    """Raises OSError where the store has not answered for LAPSE_S of the watching."""
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(int(holder.get("pid", 0)), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # alive, another user's
    still_s = unknown_s = 0.0
    while still_s < LAPSE_S:
        begun = time.monotonic()
        time.sleep(HEARTBEAT_S / 5)
        try:
            now = _read(lock)
        except OSError:
            unknown_s += time.monotonic() - begun
            if unknown_s >= LAPSE_S:
                raise
            continue
        if now != holder:
            return bool(now)
        still_s += time.monotonic() - begun
    return False


def _read(lock: Path) -> dict[str, Any]:
    """{} for a lock that is gone or damaged. Raises OSError where the store does not say."""
    try:
        with os_errors():
            content = lock.read_bytes()
        found = json.loads(content)
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
