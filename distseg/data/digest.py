"""A source file's size and SHA-256, by which a changed file is noticed."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

from distseg.errors import DataError


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the file's bytes. Raises DataError where it cannot be read."""
    path = Path(path)
    file_size(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("not readable", where=path.name, value=error.strerror) from error


def file_size(path: Path) -> int:
    """In bytes. Raises DataError for what is no regular file: opening a pipe waits for ever."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError("not readable", where=path.name, value=error.strerror, fix="check the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not a file", where=path.name, rule="a regular file", fix="check the path")
    return status.st_size


def combined_sha256(parts: Iterable[str]) -> str:
    """Of several digests or names, in their order."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
