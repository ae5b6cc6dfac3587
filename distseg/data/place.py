"""Where a cohort, a run or an output lies: a folder of this file system, or what an fsspec URL names, s3://bucket/x.

A place behind a URL is a universal_pathlib.UPath, which has the calls of pathlib.Path that are used here; it is typed
as one. What a file system does by renaming, an object store does by putting one whole object: `write_text` is atomic on
both. How to reach a store (keys, endpoint) is the backend's business: its environment, fsspec's configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from distseg.errors import ConfigError, InputError

Config = TypeVar("Config")
_MAY_BE_URLS = (
    "cohort=, run= of train, evaluate, predict, label and export, output= of label, storage= of doctor,"
    " train.init_from= and data.pseudo_labels="
)


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def absolute(config: Config, *names: str, urls: Sequence[str] = ("cohort",)) -> Config:
    """A copy of a dataclass whose paths `names` are absolute; None stays None, and a URL, where `urls` has its name.
    Raises ConfigError for another URL, and for what is no path."""
    paths: dict[str, str] = {}
    for name in names:
        path = getattr(config, name)
        if path is None:
            continue
        if is_url(path) and name in urls:
            paths[name] = path.rstrip("/")
            continue
        if is_url(path):
            rule = f"a folder or file of this file system, mounted storage included; a URL may be {_MAY_BE_URLS}"
            raise ConfigError("not a local path", where=name, value=path, rule=rule, fix=f"set {name}=PATH")
        if not path.strip():
            raise ConfigError("empty path", where=name, fix=f"set {name}=PATH")
        if "\0" in path:
            raise ConfigError("a path cannot hold a null character", where=name)
        paths[name] = os.path.abspath(path)
    return dataclasses.replace(config, **paths)  # type: ignore[type-var]  # a dataclass by contract


def as_place(path: str | Path, *, key: str = "cohort") -> Path:
    """The path, absolute where it is local. Raises InputError, which names `key`, for a URL that nothing here can
    read."""
    if not is_url(path):
        return Path(path).expanduser().absolute()
    try:
        from upath import UPath

        return cast("Path", UPath(str(path).rstrip("/"), use_listings_cache=False))  # others write too
    except (ImportError, ValueError) as error:
        fix = "pip install 'distseg[remote]', for S3, or the fsspec package of the URL's protocol; or give a local path"
        raise InputError("URL that cannot be read here", where=key, value=path, rule=str(error), fix=fix) from error


def reachable(path: str | Path, *, key: str = "cohort") -> Path:
    """`as_place`, after a look at it. Raises InputError for a store that does not answer, or not to us."""
    place = as_place(path, key=key)
    if is_url(path):
        try:
            place.exists()
        except Exception as error:  # every backend of fsspec has errors of its own, without a common base
            why = f"{type(error).__name__}: {error}"[:300]
            fix = "check the URL, the keys and the endpoint in the environment"
            raise InputError("storage cannot be reached", where=key, value=path, rule=why, fix=fix) from error
    return place


def look_at(place: str, *, key: str) -> None:
    """A store that is not there is told at once; one that goes away later is waited for."""
    if is_url(place):
        reachable(place, key=key)


def not_in_store(place: str | Path, *, key: str) -> None:
    """Raises InputError, which names `key`, for a place in a Zarr store: a cohort is for scans alone."""
    path = as_place(place, key=key)
    for folder in (path, *path.parents):
        if _is_store(folder):
            fix = f"choose another {key}="
            raise InputError("inside a Zarr store", where=key, value=place, rule=f"{folder} is one", fix=fix)


def _is_store(folder: Path) -> bool:
    with contextlib.suppress(OSError), os_errors():  # what we may not look into is no store of ours
        return (folder / "zarr.json").exists()
    return False


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Around a request: what a backend raises becomes an OSError, so that who asks can outlive it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # every backend of fsspec has errors of its own, without a common base
        raise OSError(errno.EREMOTEIO, f"{type(error).__name__}: {error}"[:300]) from error


def join(path: str, *names: str) -> str:
    return "/".join((path.rstrip("/"), *names))


def write_text(path: Path, text: str) -> None:
    """The whole file anew, atomically."""
    if is_url(path):
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def create_text(path: Path, text: str) -> None:
    """A new file that only its owner reads. Raises FileExistsError where there is one; whole, or not at all."""
    if is_url(path):
        store: Any = path
        store.fs.pipe_file(store.path, text.encode(), mode="create")
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def folders(path: Path) -> list[Path]:
    """Those directly below, by name: one listing, whatever lies behind it."""
    if not is_url(path):
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    store: Any = path
    store.fs.invalidate_cache()
    listed = store.fs.ls(store.path, detail=True)
    return [path / entry["name"].rsplit("/", 1)[-1] for entry in listed if entry["type"] == "directory"]


def remove_folder(path: Path) -> None:
    """With all that is in it, if it is there."""
    if is_url(path):
        store: Any = path
        store.fs.invalidate_cache()
        if store.fs.exists(store.path):
            store.fs.rm(store.path, recursive=True)
    else:
        shutil.rmtree(path)


def upload(folder: Path, to: Path) -> None:
    """All files of a local folder."""
    store: Any = to
    store.fs.put(f"{folder}/", f"{store.path}/", recursive=True)
    store.fs.invalidate_cache()
