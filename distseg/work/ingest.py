"""Ingest: every case of a source into the cohort store, in parallel, resumable, one bad file at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distseg.data.cohort import (
    FORMAT_VERSION,
    ScanRecord,
    check_version,
    index_path,
    read_attrs,
    sources_path,
)
from distseg.data.convert import Converted, Known, ScanTask, convert_scan
from distseg.data.formats import SPLIT_NAMES, Case, Source, discover
from distseg.data.place import is_url, reachable
from distseg.data.volume import Spacing, spacing3
from distseg.errors import ConfigError, DataError, FinishedWithFailures
from distseg.work.cohort_index import Writing, read_sources, reconcile, write_attrs, writing
from distseg.work.cohort_salt import cohort_salt, salt_attrs
from distseg.work.executor import Executor, Outcome
from distseg.work.line_file import LineFile
from distseg.work.owner import Owner


@dataclass
class IngestReport:
    """Ids of scans written and of scans the cohort had already; failures as (id, one line why)."""

    cohort: str
    added: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def ingest_cohort(
    *,
    source: str,
    cohort: str,
    spacing_mm: Sequence[float] | None = None,
    split: Sequence[float] | None = None,
    structures: Sequence[str] | None = None,
    executor: Executor,
    progress: bool = True,
) -> IngestReport:
    """Bring `source` into `cohort`, made if it is not there. The same call again does what is still to do.

    spacing_mm: (z, y, x) millimetres to store at, None for each scan's own. split: shares of train, val and test, used
    where the source has no splits.json: a scan's share follows from a hash of its id, so it never moves as others come.
    Raises InputError for a source or cohort unusable as a whole; what is wrong with a scan is in the report. Where no
    scan is usable, raises FinishedWithFailures with all of them and leaves no new cohort behind. structures: names of
    masks, segments or ROIs that become the classes 1, 2, ... where the source has such.
    """
    path = reachable(cohort)
    found = discover(source, structures=structures, salt=lambda: cohort_salt(path))
    spacing = None if spacing_mm is None else spacing3(spacing_mm)
    for note in found.notes:
        Console(stderr=True).print(f"note: {note}", style="yellow", highlight=False, markup=False)
    if not found.cases:
        raise FinishedWithFailures(f"{source}: no usable case", found.failures)
    with writing(path) as held:
        new = [file for file in (path / "zarr.json", index_path(path)) if not file.exists()]
        had_folder = path.exists()
        classes = _open_store(path, found, spacing)
        stored = reconcile(path, trust_index=True)
        records, left_ids = stored.records, {name for name, _ in stored.left}
        cases = [case for case in _with_split(found, split) if case.scan_id not in left_ids]  # none is replaced unread
        tasks = _tasks(path, cases, records, held, classes=classes, spacing=spacing)
        report = IngestReport(str(path), failed=[*found.failures, *stored.left])
        index, origins = (LineFile(file, may_write=held.owner.check) for file in (index_path(path), sources_path(path)))
        with _progress_bar(progress) as bar, index, origins:
            running = bar.add_task("ingest", total=len(tasks))
            by_id = {task.case.scan_id: task.case for task in tasks}
            for outcome in executor.map(convert_scan, tasks, key=_task_key):
                case = by_id[outcome.key]
                _book(path, case, outcome, records, report, owner=held.owner, index=index, origins=origins)
                bar.advance(running)
        report.added.sort()
        report.skipped.sort()
        report.failed.sort()
        held.owner.check()
        _name_channel(path, records)
        if not records and path / "zarr.json" in new:
            _take_back(path, new, had_folder=had_folder)
    if not report.added and not report.skipped:
        raise FinishedWithFailures(f"{source}: no usable case", report.failed)
    return report


def _tasks(
    path: Path,
    cases: Sequence[Case],
    records: Mapping[str, ScanRecord],
    held: Writing,
    *,
    classes: dict[str, int],
    spacing: Spacing | None,
) -> list[ScanTask]:
    sources = read_sources(sources_path(path))
    return [
        ScanTask(
            case=case,
            cohort=str(path),
            staging="" if held.staging is None else str(held.staging),
            classes=classes,
            spacing_mm=spacing,
            known=Known(records[case.scan_id], sources.get(case.scan_id)) if case.scan_id in records else None,
        )
        for case in cases
    ]


def _take_back(path: Path, new: Sequence[Path], *, had_folder: bool) -> None:
    """An empty cohort that this call made goes again, file by file: nothing else is deleted."""
    for file in new:
        file.unlink(missing_ok=True)
    if not had_folder and not is_url(path) and not any(path.iterdir()):
        path.rmdir()


def _open_store(path: Path, found: Source, spacing: Spacing | None) -> dict[str, int]:
    """Make the store or check that the source fits it; returns the cohort's classes."""
    attrs = read_attrs(path)
    if attrs is None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise DataError("not a cohort", where=path, rule="a new path or a cohort", fix="give another cohort=")
        attrs = {
            "format_version": FORMAT_VERSION,
            "classes": found.classes,
            "channel_names": found.channel_names or {"0": "unknown"},
            "spacing_mm": None if spacing is None else list(spacing),
        }
        attrs |= salt_attrs(path)
        write_attrs(path, attrs)
        return found.classes
    check_version(attrs, path)
    had = None if attrs.get("spacing_mm") is None else spacing3(attrs["spacing_mm"])
    if had != spacing:
        rule = f"the cohort is stored at {'native spacing' if had is None else list(had)}"
        got = "native spacing" if spacing is None else list(spacing)
        raise ConfigError(
            "one cohort, one spacing", where="data.spacing_mm", value=got, rule=rule, fix="as it is there"
        )
    if salt_attrs(path).keys() - attrs.keys():
        write_attrs(path, salt_attrs(path))
    classes: dict[str, int] = dict(attrs["classes"])
    if len(classes) <= 1 < len(found.classes):  # so far unlabelled scans only
        write_attrs(path, {"classes": found.classes})
        return found.classes
    if found.classes != classes and len(found.classes) > 1:
        rule = f"the cohort's classes are {classes}"
        raise DataError("source and cohort differ in classes", where=path, value=found.classes, rule=rule)
    return classes


def _with_split(found: Source, shares: Sequence[float] | None) -> list[Case]:
    if found.has_splits or shares is None:
        return found.cases
    return [
        case if case.split is not None else replace(case, split=split_by_hash(case.scan_id, shares))
        for case in found.cases
    ]


def split_by_hash(scan_id: str, shares: Sequence[float]) -> str:
    """train, val or test, from the scan's id alone."""
    position = int.from_bytes(hashlib.sha256(f"split:{scan_id}".encode()).digest()[:8], "big") / 2**64  # in [0, 1)
    upper = 0.0
    for name, share in zip(SPLIT_NAMES, shares, strict=True):
        upper += share
        if position < upper:
            return name
    return max(zip(shares, SPLIT_NAMES, strict=True))[1]  # shares may sum to a hair below 1


def _book(
    path: Path,
    case: Case,
    outcome: Outcome[Converted],
    records: dict[str, ScanRecord],
    report: IngestReport,
    *,
    owner: Owner,
    index: LineFile,
    origins: LineFile,
) -> None:
    """Write down what became of one scan, as soon as it is known. Raises InputError where another process has the
    cohort by now."""
    if outcome.value is None:
        report.failed.append((case.shown, outcome.error or "failed without a reason"))
        return
    record = outcome.value.record
    moved = not outcome.value.written and case.split is not None and case.split != record.split
    if not outcome.value.written and not moved and records.get(record.scan_id) == record:
        report.skipped.append(record.scan_id)
        return
    owner.check()
    if outcome.value.written:
        report.added.append(record.scan_id)
    else:
        report.skipped.append(record.scan_id)
        if moved:
            record = replace(record, split=case.split)
            write_attrs(path / record.scan_id, {"split": record.split})
    records[record.scan_id] = record
    index.append(record.to_json())
    if outcome.value.written:
        label = None if case.label is None else str(case.label.path.absolute())
        line: dict[str, Any] = {"id": record.scan_id, "image": str(case.image.path.absolute()), "label": label}
        origins.append(line)


def _name_channel(path: Path, records: dict[str, ScanRecord]) -> None:
    """A plain folder does not say what its channel is: the scans' common modality names it."""
    attrs = read_attrs(path)
    found = {record.modality for record in records.values()}
    if attrs is not None and attrs["channel_names"] == {"0": "unknown"} and found not in ({"unknown"}, set()):
        name = found.pop() if len(found) == 1 else "mixed"
        write_attrs(path, {"channel_names": {"0": name}})


def _task_key(task: ScanTask) -> str:
    return task.case.scan_id


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), disable=not shown)
