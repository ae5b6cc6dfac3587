"""What only the driver writes: the index and the sources beside the store, and the lock that keeps out a second one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distseg.data.cohort import ScanRecord, beside, index_path, read_attrs, read_index, read_lines
from distseg.data.convert import record_of
from distseg.errors import InputError


def append_line(path: Path, data: Mapping[str, Any]) -> None:
    """One line at the end; a cut-off line that a killed writer left is taken away first."""
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size > 0:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
        file.write(json.dumps(data, separators=(",", ":")).encode() + b"\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """The whole file anew, atomically."""
    write_text(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reconcile(cohort: Path, *, trust_index: bool) -> tuple[dict[str, ScanRecord], list[str]]:
    """Make the index say what the store holds; returns the records and the ids of incomplete scans taken out.

    `trust_index`: a scan the index knows is not opened again (a resumed ingest); otherwise every scan is read (repair).
    """
    before = read_index(cohort) if trust_index else {}
    records: dict[str, ScanRecord] = {}
    dropped = []
    for folder in sorted(path for path in cohort.iterdir() if path.is_dir()):
        if folder.name in before and (folder / "zarr.json").is_file():
            records[folder.name] = before[folder.name]
            continue
        attrs = read_attrs(folder)
        if attrs is not None and attrs.get("complete") is True:
            records[folder.name] = record_of(folder.name, attrs)
        else:
            shutil.rmtree(folder)
            dropped.append(folder.name)
    if not trust_index or records != before or not index_path(cohort).is_file():
        write_lines(index_path(cohort), (record.to_json() for _, record in sorted(records.items())))
    return records, dropped


def read_sources(path: Path) -> dict[str, str]:
    """Scan id -> path of the image it came from."""
    return {str(line["id"]): str(line["image"]) for line in read_lines(path)}


@contextlib.contextmanager
def writing(cohort: Path) -> Iterator[Path]:
    """Hold the cohort for writing; gives the empty staging folder beside it. Raises InputError while another does.

    The file COHORT.lock names the owner (host, pid). On one host the kernel frees a dead owner's lock; an owner on
    another host cannot be seen from here and is believed until its file is deleted.
    """
    cohort.parent.mkdir(parents=True, exist_ok=True)
    lock, staging = beside(cohort, "lock"), beside(cohort, "staging")
    with open(lock, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = lock.read_text(encoding="utf-8").strip()
            raise InputError(
                "another process writes this cohort", where=cohort, value=owner, fix="wait for it"
            ) from error
        file.seek(0)
        owner = file.read().strip()
        here = socket.gethostname()
        if owner and json.loads(owner)["host"] != here:
            fix = f"if that process is gone, delete {lock}"
            raise InputError("another machine writes this cohort", where=cohort, value=owner, fix=fix)
        file.truncate(0)
        file.write(json.dumps({"host": here, "pid": os.getpid()}))
        file.flush()
        shutil.rmtree(staging, ignore_errors=True)  # what a killed owner left
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            file.truncate(0)
