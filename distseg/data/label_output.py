"""The output of distseg label as it is read: who made it, which scans are done, where their files are.

    OUT/ledger.jsonl       {"format", "identity"}, then a line an event; {"done": id, "version": ..., ...facts}
    OUT/masks/ID.nii.gz    classes; OUT/trust/ID.nii.gz: 64 x code + confidence 0..63

`work/ledger.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distseg.errors import DataError

FORMAT = 1
SUFFIX = ".nii.gz"
KINDS = ("masks", "trust")
CODE_STEP = 64  # of a trust map: 64 x code + confidence
CONFIDENCE_STEPS = 63  # the largest confidence


def ledger_path(output: Path) -> Path:
    return output / "ledger.jsonl"


def committed_path(output: Path, kind: str, scan_id: str) -> Path:
    return output / kind / (scan_id + SUFFIX)


def read_identity(output: Path) -> dict[str, Any]:
    """Of the labelling in OUT. Raises DataError where there is none."""
    for line in _lines(ledger_path(output)):
        if line.get("format") != FORMAT or not isinstance(line.get("identity"), dict):
            break
        identity: dict[str, Any] = line["identity"]
        return identity
    raise DataError("no output of distseg label", where=output, rule="it holds ledger.jsonl, masks/ and trust/")


def read_ledger(file: Path) -> Iterator[dict[str, Any]]:
    """The events of a ledger, streamed; a line that is still being written is left out."""
    lines = _lines(file)
    next(lines, None)
    yield from lines


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with open(file, "rb") as content:
        for number, line in enumerate(content, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                fix = "take another output=, or delete the line; its scan is labelled again"
                raise DataError("line is not JSON", where=f"{file}:{number}", value=error, fix=fix) from error
