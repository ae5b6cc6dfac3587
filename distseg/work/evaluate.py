"""Measure a run on the annotated scans of a split: every scan in its native grid against its native annotation.

What it leaves in RUN/evaluation/NAME/ is in `work.evaluation_folder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from distseg.data.cohort import Cohort, Scan
from distseg.data.place import as_place
from distseg.errors import FinishedWithFailures, InputError
from distseg.evaluation.metrics import ScoreRow, largest_components, score_scan, summarise
from distseg.evaluation.report import ReportContent
from distseg.inference.model import ModelInfo
from distseg.inference.whole_scan import ScanIntensity, cached_model, model_fingerprint, segment_scan, use_threads
from distseg.work.evaluation_folder import ScanResult, fill_folder, filling, store_planes
from distseg.work.executor import Executor, available_cores
from distseg.work.native_planes import native_planes
from distseg.work.predict import progress_bar

NETWORKS = ("student", "teacher")
ALL_SPLITS = "all"


@dataclass(frozen=True)
class _Task:
    run: str
    fingerprint: str
    scan: Scan
    network: str  # whose prediction is drawn
    overlap: float
    components: str
    threads: int


def evaluate_run(
    *,
    run: str,
    cohort: str,
    split: str,
    name: str,
    network: str,
    overlap: float,
    components: str,
    executor: Executor,
    progress: bool = True,
) -> dict[str, Any]:
    """Returns the content of metrics.json. `split="all"` takes every annotated scan; others are skipped and counted.

    Raises InputError where there is nothing to measure or the classes differ; FinishedWithFailures, after everything
    else is written, naming the scans that could not be measured.
    """
    fingerprint = model_fingerprint(run)
    model, _ = cached_model(run, fingerprint)
    opened = Cohort.open(cohort)
    folder = _target(as_place(run, key="run"), name)
    _check_classes(model.class_names, opened.class_names)
    chosen, skipped = _choose_scans(opened, split)
    wanted = set(chosen)
    others = model.info.of_others(record.modality for record in opened.records if record.scan_id in wanted)
    if others:
        Console(stderr=True).print(f"note: {others}", highlight=False)
    threads = max(1, available_cores() // executor.workers)
    tasks = [_Task(run, fingerprint, opened.scan(scan_id), network, overlap, components, threads) for scan_id in chosen]
    with filling(folder) as partial:
        rows, failed = _measure(tasks, executor, partial, progress=progress)
        if not rows:
            raise FinishedWithFailures(f"{run}: no scan could be measured, nothing was written", failed)
        filtered = [model.class_names[value] for value in model.info.whole_values(components)]
        counts = {"scans_without_annotation": skipped, "scans_failed": len(failed)}
        metrics = _metrics(
            rows, model.info, split=split, cohort=opened, network=network, filtered=filtered, counts=counts
        )
        content = ReportContent(Path(run).resolve().name, model.info.method, metrics, rows, (), None, failed)
        fill_folder(partial, run, content)
    if failed:
        raise FinishedWithFailures(f"{folder}: {metrics['scans']} scans measured", failed)
    return metrics


def _target(run: Path, name: str) -> Path:
    if not name or name in (".", "..") or "/" in name or "\\" in name or name.startswith("."):
        raise InputError("not a folder's name", where="name", value=name or "''", rule="a plain name, such as val")
    return run / "evaluation" / name


def _check_classes(ours: Sequence[str], theirs: Sequence[str]) -> None:
    if list(ours) != list(theirs):
        raise InputError(
            "run and cohort differ in their classes",
            where="cohort",
            value=", ".join(theirs),
            rule=f"the run predicts {', '.join(ours)}, in this order",
        )


def _choose_scans(cohort: Cohort, split: str) -> tuple[list[str], int]:
    """Ids of the annotated scans of the split, and how many of its scans have no annotation."""
    records = cohort.select(None if split == ALL_SPLITS else split)
    chosen = [record.scan_id for record in records if record.labelled]
    if chosen:
        return chosen, len(records) - len(chosen)
    there = sorted({record.split for record in cohort.records if record.split is not None and record.labelled})
    loose = any(record.labelled for record in cohort.records)
    have = f"splits with annotated scans: {', '.join(there) or 'none'}"
    if not loose:
        raise InputError("the cohort has no annotated scan to measure on", where="cohort", value=cohort.path)
    raise InputError(
        "no annotated scan in this split",
        where="split",
        value=split,
        rule=have,
        fix=f"set split={there[0] if there else ALL_SPLITS}, or ingest with a splits.json or data.split=[.8,.1,.1]",
    )


def _measure(
    tasks: Sequence[_Task], executor: Executor, partial: Path, *, progress: bool
) -> tuple[list[ScoreRow], list[tuple[str, str]]]:
    """Scores of all scans and the failures; each scan's planes go to a file, so that memory stays flat."""
    rows: list[ScoreRow] = []
    failed: list[tuple[str, str]] = []
    with progress_bar(progress) as bar:
        running = bar.add_task("evaluate", total=len(tasks))
        for outcome in executor.map(_measure_scan, tasks, key=_scan_id):
            if outcome.error is not None:
                failed.append((outcome.key, outcome.error))
            elif outcome.value is not None:
                rows += outcome.value.rows
                store_planes(partial / f"{outcome.key}.npz", outcome.value)
            bar.advance(running)
    rows.sort(key=lambda row: (row.scan_id, row.network, row.component))
    return rows, sorted(failed)


def _scan_id(task: _Task) -> str:
    return task.scan.scan_id


def _measure_scan(task: _Task) -> ScanResult:
    """Runs in a worker: segment with both networks in one reading, score both, cut three planes."""
    use_threads(task.threads)
    model, device = cached_model(task.run, task.fingerprint)
    scan, native = task.scan, task.scan.native.geometry
    truth = scan.native_annotation()
    if truth is None:
        raise InputError("the scan lost its annotation", where=scan.scan_id)
    masks = segment_scan(
        model,
        scan.image,
        networks=NETWORKS,
        spacing_mm=scan.geometry.spacing_mm,
        intensity=ScanIntensity(scan.minimum, scan.nonzero_mean, scan.nonzero_sd),
        overlap=task.overlap,
        device=device,
        output_shape=native.shape,
        output_spacing_mm=native.spacing_mm,
    )
    rows = []
    filtered = model.info.whole_values(task.components)
    masks = {network: largest_components(mask, values=filtered) for network, mask in masks.items()}
    for network, mask in masks.items():
        variants = {"all": mask, "largest": largest_components(mask, values=range(1, len(model.class_names)))}
        for component, variant in variants.items():
            scores = score_scan(variant, truth, spacing_mm=native.spacing_mm, class_names=model.class_names)
            rows += [ScoreRow(scan.scan_id, network, component, name, score) for name, score in scores.items()]
    planes = native_planes(
        scan.image,
        stored_spacing_mm=scan.geometry.spacing_mm,
        native_spacing_mm=native.spacing_mm,
        fill=scan.minimum,
        first=truth,
        second=masks[task.network],
    )
    return ScanResult(tuple(rows), tuple(planes), scan.modality)


def _metrics(
    rows: Sequence[ScoreRow],
    info: ModelInfo,
    *,
    split: str,
    cohort: Cohort,
    network: str,
    filtered: Sequence[str],
    counts: dict[str, int],
) -> dict[str, Any]:
    """The content of metrics.json."""
    summaries = {
        name: summarise([row for row in rows if row.network == name], class_names=info.class_names) for name in NETWORKS
    }
    others = {name: summary for name, summary in summaries.items() if name != network}
    head = {
        "split": split,
        "cohort": Path(cohort.path).name,  # not its path: folder names are names of patients
        "scans": len({row.scan_id for row in rows}),
        **counts,
        "checkpoint": f"step_{info.step:07d}",
        "selected_by": info.checkpoint,
        "method": info.method,
        "network": network,
        "keeps_largest_component": list(filtered),
    }
    return {**head, **summaries[network], **others}
