"""Files and folders carried to a place behind a URL and back, with patience where the store is away for a while.

An object store cannot rename. A folder there has a marker, one file that says what it holds: it goes before the folder
changes and comes after all else, so that a folder without its marker is not there. Here a folder is fetched under a
temporary name, then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from distseg.data.place import is_url, os_errors
from distseg.errors import DataError, InputError

OWNER = "owner.json"  # in a run behind a URL, while it trains: see work/url_owner.py
RETRY_S = 120.0  # that a store may be away; well below train.worker_timeout_s, for which other ranks wait
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no store gets better by waiting for it
Result = TypeVar("Result")


def patiently(request: Callable[[], Result], *, where: object) -> Result:
    """What `request` returns, asked again while the store does not answer.

    Raises InputError, naming `where`, once that has lasted `RETRY_S`, or at once where access is refused;
    FileNotFoundError where there is no such object, OSError for a full disk of this machine.
    """
    until, pause_s = time.monotonic() + RETRY_S, _FIRST_PAUSE_S
    while True:
        try:
            with os_errors():
                return request()
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in _THIS_MACHINE:
                raise
            if isinstance(error, PermissionError) or time.monotonic() + pause_s > until:
                why = f"{type(error).__name__}: {error.strerror or error}"[:300]
                fix = "the same command goes on from what is there, once the storage answers"
                raise InputError("storage does not answer", where=where, value=why, fix=fix) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def read_file(place: Path) -> bytes | None:
    """None where there is no such file."""
    try:
        return patiently(place.read_bytes, where=place)
    except FileNotFoundError:
        return None


def write_file(place: Path, content: bytes) -> None:
    """Whole, or not at all."""
    store: Any = place
    patiently(lambda: store.fs.pipe_file(store.path, content), where=place)


def files_below(place: Path) -> list[str]:
    """Names of all files of a folder, relative to it, in one request; [] where there is none. Raises DataError for a
    name that would lead out of it."""
    store: Any = place

    def find() -> list[str]:
        store.fs.invalidate_cache()
        return list(store.fs.find(store.path))

    try:
        found = patiently(find, where=place)
    except FileNotFoundError:
        return []
    root = f"{store.path.strip('/')}/"
    names = [name.lstrip("/").removeprefix(root) for name in found]
    names = [name for name in names if name and not name.endswith("/")]  # an empty object stands for a folder
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError("a name that leads out of its folder", where=place, value=name)
    return sorted(names)


def marked(names: Iterable[str], marker: str) -> list[str]:
    """Of the names below a place, the folders directly in it that hold their marker."""
    paths = (PurePosixPath(name) for name in names)
    return sorted(path.parts[0] for path in paths if len(path.parts) == 2 and path.name == marker)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time in a local folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def put_files(folder: Path, to: Path, names: Sequence[str]) -> None:
    """Files of a local folder; each whole, or not at all."""
    store: Any = to
    here, there = [str(folder / name) for name in names], [f"{store.path}/{name}" for name in names]
    if names:
        patiently(lambda: store.fs.put(here, there), where=to)


@contextlib.contextmanager
def local_copy(place: Path) -> Iterator[Path]:
    """A file to read here: itself, or of one behind a URL a copy that goes away again. Raises FileNotFoundError where
    that is gone."""
    if not is_url(place):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="distseg-") as folder:
        get_files(place.parent, Path(folder), [place.name])
        yield Path(folder) / place.name


def get_files(place: Path, folder: Path, names: Sequence[str]) -> None:
    """Into a local folder, made where it is not there. Raises FileNotFoundError where one is gone."""
    store: Any = place
    here, there = [str(folder / name) for name in names], [f"{store.path}/{name}" for name in names]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if names:
        patiently(lambda: store.fs.get(there, here), where=place)


def put_folder(folder: Path, to: Path, *, marker: str) -> None:
    """A local folder in place of what is there; there again once its `marker` is."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    take_out(to, marker=marker)
    put_files(folder, to, [name for name in names if name != marker])
    put_files(folder, to, [marker])


def get_folder(place: Path, folder: Path) -> None:
    """The folder in place of what is here, if anything. Raises FileNotFoundError where it goes meanwhile."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    get_files(place, partial, files_below(place))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def take_out(place: Path, *, marker: str) -> None:
    """The folder goes, its marker first, if it is there."""
    _remove(place, [marker])
    _remove(place, files_below(place))


def _remove(place: Path, names: Sequence[str]) -> None:
    store: Any = place
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            patiently(functools.partial(store.fs.rm_file, f"{store.path}/{name}"), where=place)
