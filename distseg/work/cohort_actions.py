"""What `distseg cohort` does: list, remove, repair."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

from distseg.data.cohort import (
    Cohort,
    ScanRecord,
    check_version,
    index_path,
    read_attrs,
    read_index,
    read_lines,
    sources_path,
)
from distseg.data.place import reachable
from distseg.data.publish import take_out
from distseg.errors import InputError
from distseg.work.cohort_index import reconcile, writing
from distseg.work.line_file import write_lines

_COLUMNS = ["scan", "shape Z Y X", "spacing mm Z Y X", "labelled", "split", "foreground voxels"]
_NUMBERS = (1, 2)  # columns that are set to the right


@dataclass(frozen=True)
class CohortReport:
    """What the cohort holds after the action, and the ids of incomplete scans that repair deleted."""

    records: list[ScanRecord]
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RepairReport:
    """How many scans the index now names, the ids of incomplete ones deleted, and what else lies in the store and was
    left alone, as (folder's name, one line why)."""

    scans: int
    dropped: list[str]
    left: list[tuple[str, str]] = field(default_factory=list)


def holds(cohort: str, scans: int, dropped: Sequence[str]) -> str:
    """The line that an action ends with."""
    gone = f"; incomplete scans deleted: {', '.join(dropped)}" if dropped else ""
    return f"{cohort}: {scans} scans{gone}"


def list_cohort(cohort: str) -> str:
    """A table of the scans and a line of totals, as text. Plain columns: ones that wrap take minutes for 100 000."""
    opened = Cohort.open(cohort)
    rows = [_COLUMNS, *(_row(record) for record in opened.records)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_COLUMNS))]
    lines = [
        "  ".join(row[n].rjust(widths[n]) if n in _NUMBERS else row[n].ljust(widths[n]) for n in range(len(widths)))
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), _summary(opened)]) + "\n"


def remove_scan(cohort: str, *, scan: str) -> None:
    """Take one scan out of store, index and sources. Raises InputError if there is no such scan."""
    root = reachable(cohort)
    Cohort.open(root).scan(scan)  # both raise for what is not there
    with writing(root) as held:
        records = read_index(root)
        records.pop(scan, None)
        folder = root / scan
        if held.staging is None:
            take_out(folder)
        elif folder.is_dir():
            os.rename(folder, held.staging / scan)
            shutil.rmtree(held.staging / scan)
        write_lines(index_path(root), (record.to_json() for record in records.values()))
        write_lines(sources_path(root), [line for line in read_lines(sources_path(root)) if line["id"] != scan])


def repair_cohort(cohort: str) -> RepairReport:
    """Rebuild the index from the store; a scan that says it is incomplete is deleted, what cannot be read is left alone
    and in the report. Raises InputError without a cohort."""
    root = reachable(cohort)
    attrs = read_attrs(root)
    if attrs is None:
        raise InputError("no cohort there", where=root, fix="make one with distseg ingest source=... cohort=...")
    check_version(attrs, root)
    with writing(root):
        found = reconcile(root, trust_index=False)
    return RepairReport(len(found.records), found.dropped, found.left)


def _row(record: ScanRecord) -> list[str]:
    return [
        record.scan_id,
        " ".join(str(n) for n in record.shape),
        " ".join(f"{mm:.3g}" for mm in record.spacing_mm),
        "yes" if record.labelled else "no",
        record.split or "-",
        ", ".join(f"{name} {count}" for name, count in record.voxels.items()) or "-",
    ]


def _summary(cohort: Cohort) -> str:
    labelled = len(cohort.select(labelled=True))
    splits = {name: len(cohort.select(split=name)) for name in ("train", "val", "test")}
    held = ", ".join(f"{count} {name}" for name, count in splits.items() if count) or "no splits"
    classes = ", ".join(cohort.class_names[1:]) or "none"
    return f"{len(cohort.records)} scans, {labelled} labelled; {held}; {cohort.modality}; classes: {classes}"
