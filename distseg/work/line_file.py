"""Files of one JSON object a line, which grow as work gets done.

On a file system they are appended to. An object cannot be: behind a URL lines gather, and the whole is put anew now and
then; what a killed writer had not put yet is found in the store by the next one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distseg.data.place import is_url, write_text

PUT_EVERY_S = 30.0


class LineFile:
    """A context manager: leaving it puts what is left. `may_write` is called before lines are put behind a URL, and
    raises where they are another process's to write by now."""

    def __init__(self, path: Path, *, may_write: Callable[[], None]) -> None:
        self._path, self._may_write = path, may_write
        self._lines, self._put_at = list[str](), time.monotonic()

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._put()

    def append(self, data: Mapping[str, Any]) -> None:
        if is_url(self._path):
            self._lines.append(_line(data))
            if time.monotonic() - self._put_at > PUT_EVERY_S:
                self._put()
        else:
            _append(self._path, _line(data))

    def _put(self) -> None:
        if self._lines:
            self._may_write()
            before = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            write_text(self._path, before + "".join(self._lines))
            self._lines.clear()
        self._put_at = time.monotonic()


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """The whole file anew, atomically."""
    write_text(path, "".join(_line(line) for line in lines))


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":")) + "\n"


def _append(path: Path, line: str) -> None:
    """A cut-off line that a killed writer left is taken away first."""
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size > 0:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
        file.write(line.encode())
