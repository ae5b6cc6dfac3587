"""The ledger of a labelling: what is done, appended by the driver alone, and the step that makes a scan done.

    OUT/ledger.jsonl       {"format", "identity", "cohort"}, then a line an event:
                           {"done": id, "version": of the image, "staged": folder, ...facts}
                           {"failed": id, "attempt": n, "why": one line}
    OUT/.staging/TOKEN/    finished files of one driver's workers, before they are committed
    OUT/masks  OUT/trust   committed files

A worker leaves both files of a scan, whole, under the staging folder. The driver appends the scan's line, then renames
the files into place. The line is the commit: a driver killed after it is rolled forward by the next one, which renames
what still waits; a scan without a line is labelled again. So no committed scan is done twice, and a mask in OUT/masks
is whole and has its line. Losing power may cost the lines of the last second; their scans are labelled again.

url_ledger.py keeps one behind a URL.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.data.label_output import (
    FORMAT,
    KINDS,
    SUFFIX,
    committed,
    committed_path,
    is_begun,
    ledger_path,
    others_files,
    read_identity,
    read_ledger,
)
from distseg.errors import InputError, RunMismatchError

FSYNC_EVERY_S = 1.0
_CHUNK_NBYTES = 1 << 16


class Ledger:
    """Opened for writing by the one driver that owns OUT. `staging` is where its workers leave a scan's files.

    `versions`: id -> version of the image, of every scan that is done and whose files are there.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], cohort: str) -> None:
        """Raises RunMismatchError, with the difference, where OUT holds what another identity made, InputError where it
        holds what no labelling did."""
        self._output, self._file_name = output, ledger_path(output)
        cut_torn_line(self._file_name)
        new = not is_begun(output)
        check_output(output, identity, new=new)
        for kind in KINDS:
            (output / kind).mkdir(parents=True, exist_ok=True)
        self.versions = self._recovered()
        self._staging = output / ".staging" / uuid.uuid4().hex[:12]
        self._staging.mkdir(parents=True)
        self._committing = False
        self.staging = str(self._staging)
        self._file = open(self._file_name, "ab")  # noqa: SIM115  # closed by close()
        self._synced = time.monotonic()
        if new:
            try:
                self._append({"format": FORMAT, "identity": dict(identity), "cohort": cohort})
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.close()
                raise

    def commit(self, scan_id: str, version: str, facts: Mapping[str, Any]) -> None:
        """Make a scan done whose files wait in `staging`."""
        line = {"done": scan_id, "version": version, "staged": self._staging.name, **facts}
        self._committing = True
        self._append(line)
        for kind in KINDS:
            os.replace(staged_path(self._staging, kind, scan_id), committed_path(self._output, kind, scan_id))
        self._committing = False

    def fail(self, scan_id: str, *, attempt: int, why: str) -> None:
        self._append({"failed": scan_id, "attempt": attempt, "why": why})

    def close(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            with contextlib.suppress(OSError):  # on a full disk, what the flush has told already
                self._file.close()
            if not self._committing:  # else a commit was cut off, and the next driver rolls it forward
                shutil.rmtree(self._staging.parent, ignore_errors=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        """Out of this process at once, so that killing it loses nothing; on the disk within a second."""
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > FSYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _recovered(self) -> dict[str, str]:
        """Roll committed scans forward, delete what else was staged, and say what is done."""
        done: dict[str, str] = {}
        staged_by: dict[str, str] = {}
        waiting = self._waiting()
        for line in read_ledger(self._output):
            if "done" in line:
                done[line["done"]] = line["version"]
                if line["done"] in waiting:
                    staged_by[line["done"]] = line["staged"]
        for scan_id, folder in staged_by.items():
            for kind in KINDS:
                staged = staged_path(self._output / ".staging" / folder, kind, scan_id)
                if staged.exists():
                    os.replace(staged, committed_path(self._output, kind, scan_id))
        shutil.rmtree(self._output / ".staging", ignore_errors=True)
        there = committed(self._output)
        return {scan_id: version for scan_id, version in done.items() if scan_id in there}

    def _waiting(self) -> set[str]:
        """Ids of scans of which a killed driver left a finished file."""
        files = (self._output / ".staging").glob(f"*/*/*{SUFFIX}")
        return {file.name.removesuffix(SUFFIX) for file in files if not file.name.startswith(".")}


def staged_path(staging: Path, kind: str, scan_id: str) -> Path:
    return staging / kind / (scan_id + SUFFIX)


def check_output(output: Path, identity: Mapping[str, Any], *, new: bool) -> None:
    """Raises as Ledger does. `new`: OUT has no ledger yet."""
    strangers = others_files(output) if new else []
    if strangers:
        rule = "files that no distseg label made would be overwritten"
        fix = "take another output=, or move them away"
        raise InputError("not an output of distseg label", where=output, value=strangers[0], rule=rule, fix=fix)
    if new:
        return
    there = read_identity(output)
    changed = sorted(key for key in {**there, **identity} if there.get(key) != identity.get(key))
    differences = [f"{key}: {there.get(key)} there, {identity.get(key)} asked" for key in changed]
    if differences:
        raise RunMismatchError(
            "this output was labelled otherwise",
            where=output,
            value="; ".join(differences[:3]),
            fix="take another output= directory, or repeat the command it was made with",
        )


def cut_torn_line(file: Path) -> None:
    """Take away a last line without its end, which a killed writer left; only the tail is read."""
    if not file.is_file():
        return
    with open(file, "rb+") as content:
        end = size = content.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _CHUNK_NBYTES)
            content.seek(start)
            newline = content.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            content.truncate(end)
