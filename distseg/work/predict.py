"""Masks for files: each in its input's own grid, uint8, whole or not at all.

    OUT/CASE.nii.gz      one per input; CASE.dcm with format=dicom_seg
    OUT/.distseg.json    of each mask: digest of the model, network, overlap, label's rule, SHA-256 of the input

The same call again does what is still to do. A mask is kept only if the record says that all of it is this call's; any
other file where a mask is to go stops the call before it works, and is never replaced.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distseg.config.verbs import LabelRuleConfig
from distseg.data.dicom.series import DicomSeries
from distseg.data.dicom.write_segmentation import check_class_names, require_highdicom, write_segmentation
from distseg.data.formats import ImageSource
from distseg.data.label_output import KINDS
from distseg.data.nifti import write_nifti
from distseg.data.plane_spool import PlaneSpool
from distseg.data.volume import NativeGrid
from distseg.errors import DataError
from distseg.evaluation.metrics import largest_components
from distseg.inference.label_scan import LabelRule
from distseg.inference.whole_scan import ScanIntensity, cached_model, model_fingerprint, segment_scan, use_threads
from distseg.work.executor import Executor, available_cores
from distseg.work.label_sources import OpenScan
from distseg.work.label_task import label_open_scan, rule_of, without_islands
from distseg.work.predict_inputs import find_inputs, is_mask
from distseg.work.predict_record import RECORD, add_to_record, refuse_others_masks


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
    made_by: dict[str, Any]  # of the record
    rule: LabelRule | None  # None: the network's argmax
    threads: int
    format: str = "nifti"


@dataclass(frozen=True)
class _Made:
    """A mask that waits under its staged name, and its entry of the record."""

    mask: str
    staged: str
    entry: dict[str, Any]


def predict_files(
    *,
    run: str,
    input: str,
    output: str,
    network: str,
    overlap: float,
    components: str,
    executor: Executor,
    label: LabelRuleConfig | None = None,
    format: str = "nifti",
    progress: bool = True,
) -> PredictReport:
    """Segment a NIfTI file or every one of a folder, or every DICOM series below one; `output` is a folder, or a file
    where the input is one image. With `label` each mask is what `distseg label` makes of the scan, in place of the
    network's argmax; `network` and `overlap` are then label's own. `format` is "nifti" or "dicom_seg".

    A file that cannot be segmented is in the report and the others go on; a single one raises its DataError. Raises
    InputError where there is nothing to read, or where `output` holds files that this model did not make.
    """
    fingerprint = model_fingerprint(run)
    if format == "dicom_seg":
        require_highdicom()
        check_class_names(cached_model(run, fingerprint)[0].class_names)
    inputs, failures, notes = find_inputs(Path(input), Path(output), format)
    made_by: dict[str, Any] = {"model": fingerprint}
    rule = None
    if label is None:
        made_by |= {"network": network, "overlap": overlap, "components": components, "label": None}
    else:
        rule = rule_of(label, cached_model(run, fingerprint)[0].info)
        by_rule = {**dataclasses.asdict(rule), "keep_largest": list(rule.keep_largest)}
        made_by |= {"network": "teacher", "overlap": label.overlap, "components": label.components, "label": by_rule}
    record = None if is_mask(Path(output), format) else Path(output) / RECORD
    existing = {one.mask: one for one in inputs if one.mask.exists()}
    refuse_others_masks(existing, made_by, record)
    if record is not None:
        add_to_record(record, {})  # a folder that cannot be written shows before the work
    threads = max(1, available_cores() // executor.workers)
    call = uuid.uuid4().hex[:8]
    common: dict[str, Any] = {"made_by": made_by, "rule": rule, "threads": threads, "format": format}
    tasks = [
        _Task(run, fingerprint, one.name, one.image, str(one.mask), str(_staged(one.mask, call)), **common)
        for one in inputs
        if one.mask not in existing
    ]
    report = PredictReport(skipped=[str(mask) for mask in existing], failed=failures)
    if existing:
        notes = [*notes, f"{len(existing)} masks of this model and these inputs are there already and are kept"]
    with progress_bar(progress) as bar:
        for note in notes:
            bar.console.print(f"note: {note}", highlight=False, markup=False)
        _predict_all(tasks, report, record, executor, bar)
    if len(inputs) == 1 and Path(input).is_file() and report.failed:
        raise DataError(report.failed[0][1])
    return report


def _predict_all(
    tasks: Sequence[_Task], report: PredictReport, record: Path | None, executor: Executor, bar: Progress
) -> None:
    """Fill `report`; what was staged and not shown goes again."""
    running = bar.add_task("predict", total=len(tasks))
    try:
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


def _predict_file(task: _Task) -> _Made:
    """Runs in a worker."""
    use_threads(task.threads)
    input_sha256 = task.image.sha256()
    volume = task.image.read()
    intensity = ScanIntensity.of(volume.array)
    if task.rule is not None:
        _label_file(task, OpenScan(volume.array, volume.geometry, volume.native, intensity, volume.modality))
    else:
        model, device = cached_model(task.run, task.fingerprint)
        network = task.made_by["network"]
        masks = segment_scan(
            model,
            volume.array,
            networks=[network],
            spacing_mm=volume.geometry.spacing_mm,
            intensity=intensity,
            overlap=task.made_by["overlap"],
            device=device,
        )
        mask = largest_components(masks[network], values=model.info.whole_values(task.made_by["components"]))
        _write(task, volume.native.from_canonical(mask), volume.native)
    return _Made(task.mask, task.staged, {**task.made_by, "input_sha256": input_sha256})


def _label_file(task: _Task, scan: OpenScan) -> None:
    """The mask that `distseg label` would give a scan whose id is the mask's name."""
    assert task.rule is not None, "asked for by label"
    model, device = cached_model(task.run, task.fingerprint)
    mask = Path(task.mask)
    mask.parent.mkdir(parents=True, exist_ok=True)
    with PlaneSpool(mask.parent) as masks, PlaneSpool(mask.parent) as trusts:
        label_open_scan(
            model,
            scan,
            scan_id=mask.name.removesuffix(".gz").removesuffix(".nii").removesuffix(".dcm"),
            rule=task.rule,
            overlap=task.made_by["overlap"],
            device=device,
            spools=dict(zip(KINDS, (masks, trusts), strict=True)),
        )
        labelled = masks.read(scan.native)
    without_islands(labelled, scan.native, task.rule)
    _write(task, labelled, scan.native)


def _write(task: _Task, mask: npt.NDArray[np.uint8], native: NativeGrid) -> None:
    """`mask` in native axis order, under the staged name."""
    if task.format == "nifti":
        write_nifti(task.staged, mask, native)
        return
    assert isinstance(task.image, DicomSeries), "find_inputs lets nothing else through"
    class_names = cached_model(task.run, task.fingerprint)[0].class_names
    write_segmentation(task.staged, mask, series=task.image, class_names=class_names, made_by=task.fingerprint)


def _staged(mask: Path, call: str) -> Path:
    return mask.with_name(f".{call}.{mask.name}")


def _book(made: _Made, record: Path | None) -> str:
    """Record first, then show the mask: killed between the two, there is no mask yet and the next call makes it; the
    other way round, there would be a mask of unknown origin. Returns the mask's path."""
    if record is not None:
        add_to_record(record, {Path(made.mask).name: made.entry})
    os.replace(made.staged, made.mask)
    return made.mask


def _input_name(task: _Task) -> str:
    return task.name


def progress_bar(shown: bool) -> Progress:
    """On stderr, so that what a verb prints stays clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)
