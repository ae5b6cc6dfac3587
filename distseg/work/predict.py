"""Masks for files: each in its input's own grid, uint8, whole or not at all.

    OUT/CASE.nii.gz      one per input
    OUT/.distseg.json    of each mask: digest of the model, network, overlap, SHA-256 of the input

The same call again does what is still to do. A mask is kept only if the record says that all four are this call's; any
other file where a mask is to go stops the call before it works, and is never replaced.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distseg.data.formats import ImageSource
from distseg.data.nifti import write_nifti
from distseg.errors import DataError, InputError
from distseg.inference.whole_scan import ScanIntensity, cached_model, model_fingerprint, segment_scan, use_threads
from distseg.work.executor import Executor, available_cores
from distseg.work.predict_inputs import Input, find_inputs, is_nifti

RECORD = ".distseg.json"
RECORDED = ("model", "network", "overlap", "input_sha256")


@dataclass
class PredictReport:
    """Paths of masks written, of masks that were there already, and failures as (input's name, one line why)."""

    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    run: str
    fingerprint: str
    name: str  # of the input, for a failure
    image: ImageSource
    mask: str
    staged: str
    network: str
    overlap: float
    threads: int


@dataclass(frozen=True)
class _Made:
    """A mask that waits under its staged name, and its entry of the record."""

    mask: str
    staged: str
    entry: dict[str, Any]


def predict_files(
    *, run: str, input: str, output: str, network: str, overlap: float, executor: Executor, progress: bool = True
) -> PredictReport:
    """Segment a NIfTI file or every one of a folder, or every DICOM series below one; `output` is a folder, or a file
    where the input is one image.

    A file that cannot be segmented is in the report and the others go on; a single one raises its DataError. Raises
    InputError where there is nothing to read, or where `output` holds files that this model did not make.
    """
    fingerprint = model_fingerprint(run)
    inputs, failures, notes = find_inputs(Path(input), Path(output))
    made_by = {"model": fingerprint, "network": network, "overlap": overlap}
    record = None if is_nifti(Path(output)) else Path(output) / RECORD
    existing = {one.mask: one for one in inputs if one.mask.exists()}
    _refuse_others_masks(existing, made_by, record)
    if record is not None:
        _add_to_record(record, {})  # a folder that cannot be written shows before the work
    threads = max(1, available_cores() // executor.workers)
    call = uuid.uuid4().hex[:8]
    tasks = [
        _Task(
            run,
            fingerprint,
            one.name,
            one.image,
            str(one.mask),
            str(_staged(one.mask, call)),
            network,
            overlap,
            threads,
        )
        for one in inputs
        if one.mask not in existing
    ]
    report = PredictReport(skipped=[str(mask) for mask in existing], failed=failures)
    try:
        with progress_bar(progress) as bar:
            for note in notes:
                bar.console.print(f"note: {note}", highlight=False, markup=False)
            if existing:
                bar.console.print(
                    f"{len(existing)} masks of this model and these inputs are there already and are kept"
                )
            running = bar.add_task("predict", total=len(tasks))
            for outcome in executor.map(_predict_file, tasks, key=_input_name):
                if outcome.error is not None:
                    report.failed.append((outcome.key, outcome.error))
                elif outcome.value is not None:
                    report.written.append(_book(outcome.value, record))
                bar.advance(running)
    finally:
        for task in tasks:
            Path(task.staged).unlink(missing_ok=True)
    report.written.sort()
    report.failed.sort()
    if len(inputs) == 1 and Path(input).is_file() and report.failed:
        raise DataError(report.failed[0][1])
    return report


def _predict_file(task: _Task) -> _Made:
    """Runs in a worker."""
    use_threads(task.threads)
    input_sha256 = task.image.sha256()
    volume = task.image.read()
    model, device = cached_model(task.run, task.fingerprint)
    masks = segment_scan(
        model,
        volume.array,
        networks=[task.network],
        spacing_mm=volume.geometry.spacing_mm,
        intensity=ScanIntensity.of(volume.array),
        overlap=task.overlap,
        device=device,
    )
    write_nifti(task.staged, volume.native.from_canonical(masks[task.network]), volume.native)
    entry = {
        "model": task.fingerprint,
        "network": task.network,
        "overlap": task.overlap,
        "input_sha256": input_sha256,
    }
    return _Made(task.mask, task.staged, entry)


def _staged(mask: Path, call: str) -> Path:
    return mask.with_name(f".{call}.{mask.name}")


def _book(made: _Made, record: Path | None) -> str:
    """Record first, then show the mask: killed between the two, there is no mask yet and the next call makes it; the
    other way round, there would be a mask of unknown origin. Returns the mask's path."""
    if record is not None:
        _add_to_record(record, {Path(made.mask).name: made.entry})
    os.replace(made.staged, made.mask)
    return made.mask


def _input_name(task: _Task) -> str:
    return task.name


def _refuse_others_masks(existing: Mapping[Path, Input], made_by: Mapping[str, Any], record: Path | None) -> None:
    """Raises InputError where a mask to write exists and is not on record as what this call writes."""
    if not existing:
        return
    fix = "choose another output= or remove it"
    if record is None:
        raise InputError("the output exists already", where="output", value=next(iter(existing)), fix=fix)
    masks = _read_record(record)
    for mask, one in existing.items():
        entry = masks.get(mask.name)
        if entry is None:
            rule = f"{RECORD} does not say what made it"
        else:
            wanted = {**made_by, "input_sha256": one.image.sha256()}
            other = [name for name in RECORDED if entry.get(name) != wanted[name]]
            if not other:
                continue
            rule = f"{RECORD} says that it differs in {', '.join(other)}"
        what = "a mask exists already and is not what this call would write"
        raise InputError(what, where="output", value=mask, rule=rule, fix=fix)


def _read_record(record: Path) -> dict[str, dict[str, Any]]:
    """Mask's name -> its entry; {} without a record. Raises InputError for one that cannot be read or understood."""
    fix = "choose another output="
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError("not readable", where=record, value=error.strerror, fix=fix) from error
    except ValueError as error:
        raise InputError("not readable as JSON", where=record, value=error, fix=fix) from error
    masks = content.get("masks", {}) if isinstance(content, dict) else None
    if not isinstance(masks, dict) or not all(isinstance(entry, dict) for entry in masks.values()):
        raise InputError("not a record of masks", where=record, fix=fix)
    return masks


def _add_to_record(record: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Atomic, and read again each time: other calls may write other masks into the same folder."""
    temporary = record.with_name(f"{record.name}.{uuid.uuid4().hex[:8]}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"masks": {**_read_record(record), **entries}}, indent=1)
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, record)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write there: {error.strerror}", where="output", value=record.parent) from error


def progress_bar(shown: bool) -> Progress:
    """On stderr, so that what a verb prints stays clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)
