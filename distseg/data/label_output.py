"""The output of distseg label as it is read: who made it, which scans are done, where their files are.

    OUT/ledger.jsonl          {"format", "identity", "cohort"}, then a line an event; {"done": id, "version", ...facts}
    OUT/ledger/0000000.jsonl  behind a URL the same lines in pieces, as no object can be appended to
    OUT/masks/ID.nii.gz       classes; OUT/trust/ID.nii.gz: 64 x code + confidence 0..63

An output may be copied to a URL and back: both forms are read, that in which its place is written to last.
`work/ledger.py` and `work/url_ledger.py` write it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distseg.data.carry import files_below, read_file
from distseg.data.place import is_url
from distseg.errors import DataError

FORMAT = 1
SUFFIX = ".nii.gz"
KINDS = ("masks", "trust")
CODE_STEP = 64  # of a trust map: 64 x code + confidence
CONFIDENCE_STEPS = 63  # the largest confidence
NO_LABEL = 2 * CODE_STEP  # of a voxel that lost its label: rejected, at confidence 0
PIECES = "ledger"
REVIEW = ("scans.csv", "next_to_label.csv", "review.html")
_TEXTS = {"format": (), "done": ("done", "version"), "failed": ("failed",)}  # of each kind of line, by its key
_PIECE = re.compile(r"\d{7,}\.jsonl")


def ledger_path(output: Path) -> Path:
    """On this file system."""
    return output / "ledger.jsonl"


def committed_path(output: Path, kind: str, scan_id: str) -> Path:
    return output / kind / (scan_id + SUFFIX)


def committed(output: Path) -> set[str]:
    """Ids of the scans that have both their files; a line of the ledger says that they are done."""
    names = [_names(output / kind) for kind in KINDS]
    return {name.removesuffix(SUFFIX) for name in set.intersection(*names) if name.endswith(SUFFIX)}


def pieces(output: Path) -> list[str]:
    """Names in OUT/ledger, in their order."""
    return sorted(filter(_PIECE.fullmatch, _names(output / PIECES)), key=lambda name: (len(name), name))


def is_begun(output: Path) -> bool:
    """Whether there is a ledger with something in it."""
    return next(_lines(output), None) is not None


def others_files(output: Path) -> list[str]:
    """What lies where a labelling writes; of an output that is not begun, somebody else's."""
    reviews = [name for name in REVIEW if (output / name).exists()]
    files = [f"{kind}/{name}" for kind in KINDS for name in sorted(_names(output / kind)) if name[0] != "."]
    return [*files, *reviews]


def read_identity(output: Path) -> dict[str, Any]:
    """Of the labelling in OUT. Raises DataError where there is none."""
    identity: dict[str, Any] = _head(output)["identity"]
    return identity


def read_cohort(output: Path) -> str | None:
    """What was labelled, as a hash of its path, where the ledger says so. Raises DataError where there is no ledger."""
    cohort = _head(output).get("cohort")
    return cohort if isinstance(cohort, str) else None


def _head(output: Path) -> dict[str, Any]:
    line = next((line for line in _lines(output) if "format" in line), {})
    if line.get("format") == FORMAT and isinstance(line.get("identity"), dict):
        return line
    raise DataError("no output of distseg label", where=output, rule="it holds a ledger, masks/ and trust/")


def read_ledger(output: Path) -> Iterator[dict[str, Any]]:
    """The events of OUT's ledger, streamed; a line that is still being written is left out."""
    return (line for line in _lines(output) if "format" not in line)


def _names(folder: Path) -> set[str]:
    """Of the files in a folder, none where there is no folder."""
    if is_url(folder):
        return set(files_below(folder))
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return set()


def _lines(output: Path) -> Iterator[dict[str, Any]]:
    whole, parts = ledger_path(output), [output / PIECES / name for name in pieces(output)]
    if is_url(output):
        for part in (whole, *parts):
            yield from _parsed(part, (read_file(part) or b"").splitlines(keepends=True))
        return
    for part in (*parts, whole):
        if part.is_file():
            with open(part, "rb") as content:
                yield from _parsed(part, content)


def _texts_of(line: dict[str, Any]) -> tuple[str, ...]:
    return next((texts for kind, texts in _TEXTS.items() if kind in line), ("done",))


def _parsed(file: Path, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            found = json.loads(line)
            if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in _texts_of(found)):
                raise ValueError(f"no such event, {line[:80]!r}")
        except ValueError as error:
            fix = "take another output=, or delete the line; its scan is labelled again"
            raise DataError("damaged line of the ledger", where=f"{file}:{number}", value=error, fix=fix) from error
        yield found
