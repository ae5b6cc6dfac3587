"""Masks for files: each in its input's own grid, uint8, whole or not at all.

    OUT/CASE.nii.gz      one per input
    OUT/.distseg.json    which model made them

The same call again does what is still to do. A mask of another model, or a file of someone else's, is never replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distseg.data.nifti import read_nifti, write_nifti
from distseg.errors import DataError, InputError
from distseg.inference.whole_scan import ScanIntensity, cached_model, model_fingerprint, segment_scan, use_threads
from distseg.work.executor import Executor, available_cores

SUFFIXES = (".nii.gz", ".nii")
CHANNEL = "_0000"  # nnU-Net's first channel; the mask is named without it
RECORD = ".distseg.json"


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
    image: str
    mask: str
    network: str
    overlap: float
    threads: int


def predict_files(
    *, run: str, input: str, output: str, network: str, overlap: float, executor: Executor, progress: bool = True
) -> PredictReport:
    """Segment a NIfTI file or every one of a folder; `output` is a folder, or a file where the input is one.

    A file that cannot be segmented is in the report and the others go on; a single one raises its DataError. Raises
    InputError where there is nothing to read, or where `output` holds files that this model did not make.
    """
    fingerprint = model_fingerprint(run)
    pairs = _pairs(Path(input), Path(output))
    made_by = {"model": fingerprint, "network": network, "overlap": overlap}
    single_file = _is_nifti(Path(output))
    existing = [mask for _, mask in pairs if mask.exists()]
    _refuse_others_masks(Path(output), existing, made_by, single_file=single_file)
    if not single_file:
        _write_record(Path(output), made_by)
    threads = max(1, available_cores() // executor.workers)
    tasks = [
        _Task(run, fingerprint, str(image), str(mask), network, overlap, threads)
        for image, mask in pairs
        if not mask.exists()
    ]
    report = PredictReport(skipped=[str(mask) for mask in existing])
    with progress_bar(progress) as bar:
        if existing:
            bar.console.print(f"{len(existing)} masks of this model are there already and are kept")
        running = bar.add_task("predict", total=len(tasks))
        for outcome in executor.map(_predict_file, tasks, key=_image_name):
            if outcome.error is not None:
                report.failed.append((outcome.key, outcome.error))
            elif outcome.value is not None:
                report.written.append(outcome.value)
            bar.advance(running)
    report.written.sort()
    report.failed.sort()
    if len(pairs) == 1 and Path(input).is_file() and report.failed:
        raise DataError(report.failed[0][1])
    return report


def _predict_file(task: _Task) -> str:
    """Runs in a worker. Returns the mask's path."""
    use_threads(task.threads)
    volume = read_nifti(task.image)
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
    write_nifti(task.mask, volume.native.from_canonical(masks[task.network]), volume.native)
    return task.mask


def _image_name(task: _Task) -> str:
    return Path(task.image).name


def _pairs(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """(image, mask) per input, in the order of names."""
    if source.is_file():
        if not _is_nifti(source):
            raise InputError("not a NIfTI file", where="input", value=source, rule="a name in .nii.gz or .nii")
        return [(source, output if _is_nifti(output) else output / _mask_name(source))]
    if not source.is_dir():
        raise InputError("no such file or folder", where="input", value=source)
    if _is_nifti(output):
        rule = "a folder, where the input is one"
        raise InputError("a folder of images cannot go into one file", where="output", value=output, rule=rule)
    images = sorted(path for path in source.iterdir() if _is_nifti(path) and path.is_file() and path.name[0] != ".")
    if not images:
        raise InputError("no NIfTI file in the folder", where="input", value=source, rule="names in .nii.gz or .nii")
    further = [path.name for path in images if _channel(path) not in (None, "0000")]
    if further:
        rule = "one channel an image (_0000)"
        raise InputError("images have more than one channel", where="input", value=further[0], rule=rule)
    pairs: dict[Path, Path] = {}
    for image in images:
        mask = output / _mask_name(image)
        if mask in pairs:
            where = f"{pairs[mask].name} and {image.name}"
            raise InputError("two images would give one mask", where=where, value=mask.name, fix="rename one of them")
        pairs[mask] = image
    return [(image, mask) for mask, image in pairs.items()]


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _stem(path: Path) -> str:
    suffix = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    return path.name[: -len(suffix)]


def _channel(path: Path) -> str | None:
    """nnU-Net's channel number, None where the folder does not name its files so (or for a plain four-digit name)."""
    head, _, tail = _stem(path).rpartition("_")
    siblings = (path.with_name(f"{head}{CHANNEL}{suffix}") for suffix in SUFFIXES)
    is_channel = bool(head) and len(tail) == 4 and tail.isdigit() and any(sibling.exists() for sibling in siblings)
    return tail if is_channel else None


def _mask_name(image: Path) -> str:
    return _stem(image).removesuffix(CHANNEL) + ".nii.gz"


def _refuse_others_masks(
    output: Path, existing: Sequence[Path], made_by: dict[str, object], *, single_file: bool
) -> None:
    """Raises InputError where a mask to write exists and is not known to be what this call would write."""
    if not existing:
        return
    fix = "choose another output= or remove it"
    if single_file:
        raise InputError("the output exists already", where="output", value=existing[0], fix=fix)
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if record != made_by:
        what = f"{len(existing)} of the masks exist already and are not this model's"
        raise InputError(what, where="output", value=existing[0], fix=fix)


def _write_record(output: Path, made_by: dict[str, object]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        partial = output / f"{RECORD}.partial"
        partial.write_text(json.dumps(made_by), encoding="utf-8")
        os.replace(partial, output / RECORD)
    except OSError as error:
        raise InputError(f"cannot write there: {error.strerror}", where="output", value=output) from error


def progress_bar(shown: bool) -> Progress:
    """On stderr, so that what a verb prints stays clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)
