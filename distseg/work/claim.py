"""One process at a time in a directory. The kernel frees a dead owner's lock."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from distseg.errors import InputError

_POLL_S = 0.2


@contextlib.contextmanager
def claim(folder: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Make `folder` and hold it. Raises InputError where another `what` still holds it after `wait_s`."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait_s
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= until:
                    raise InputError(f"another {what} is at work here", where=folder, fix="wait for it") from None
            time.sleep(_POLL_S)
        yield
