"""What a labelling would take, said before it starts: a few scans are labelled into a folder that goes away again."""

from __future__ import annotations

import math
import resource
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distseg.config.verbs import LabelConfig
from distseg.data.label_output import KINDS
from distseg.data.volume import Shape, Spacing
from distseg.errors import FinishedWithFailures
from distseg.inference.model import Model
from distseg.inference.sliding_window import run_grid
from distseg.inference.whole_scan import cached_model, model_fingerprint
from distseg.work.executor import attempt, available_cores
from distseg.work.label_sources import ScanSource, find_sources, grid_of
from distseg.work.label_task import LabelTask, label_one, rule_of
from distseg.work.ledger import staged_path

SAMPLE_SCANS = 3
MOST_READ = 20  # of a folder's files, for their size; the rest is taken to be like them


@dataclass(frozen=True)
class LabelEstimate:
    """`voxels` of the images as stored, `hours` with `workers`, `nbytes` of masks and trust maps, `memory_nbytes` of
    one worker at its largest scan; measured on `sampled` scans, of `looked_at` whose sizes are known."""

    scans: int
    looked_at: int
    sampled: tuple[str, ...]
    voxels: int
    windows: int
    seconds_per_window: float
    hours: float
    workers: int
    nbytes: int
    memory_nbytes: int

    def __str__(self) -> str:
        seen = "" if self.looked_at == self.scans else f" (from the sizes of {self.looked_at})"
        workers = f"{self.workers} worker{'' if self.workers == 1 else 's'}"
        return "\n".join(
            (
                f"scans:   {self.scans}",
                f"voxels:  {self.voxels / 1e6:.1f} million in {self.windows} windows{seen}",
                f"hours:   {self.hours:.2f} with {workers} like this one",
                f"output:  {self.nbytes / 1e6:.1f} MB",
                f"memory:  {self.memory_nbytes / 2**30:.1f} GiB a worker",
                f"measured on {', '.join(self.sampled)}: {self.seconds_per_window:.3f} s a window; nothing was kept",
            )
        )


def estimate_label(config: LabelConfig) -> LabelEstimate:
    """Label up to three scans near the median size, here, in this process, and scale by windows and voxels."""
    fingerprint = model_fingerprint(config.run)
    model, _ = cached_model(config.run, fingerprint)
    sources = find_sources(config.cohort, only=config.label.only)
    seen = sources.scans if sources.cohort else _evenly(sources.scans, MOST_READ)
    looked, failed = [attempt(grid_of, scan, scan.scan_id) for scan in seen], list[tuple[str, str]]()
    failed += [(outcome.key, outcome.error) for outcome in looked if outcome.error]
    seen = [scan for scan, outcome in zip(seen, looked, strict=True) if outcome.value]
    if not seen:
        raise FinishedWithFailures("no scan could be looked at", failed)
    grids = [outcome.value for outcome in looked if outcome.value]
    windows = np.asarray([_windows(model, grid, overlap=config.label.overlap) for grid in grids])
    voxels = np.asarray([math.prod(shape) for shape, _ in grids])
    scale = len(sources.scans) / len(seen)
    near_median = np.argsort(np.abs(windows - np.median(windows)), kind="stable")[:SAMPLE_SCANS]
    seconds, nbytes, sampled = 0.0, 0, []
    for i in near_median:
        measured = _measure(config, fingerprint, model, seen[i])
        if isinstance(measured, str):
            failed.append((seen[i].scan_id, measured))
            continue
        seconds, nbytes = seconds + measured[0], nbytes + measured[1]
        sampled.append(i)
    if not sampled:
        raise FinishedWithFailures("no scan of the sample could be labelled", failed)
    per_window = seconds / float(windows[sampled].sum())
    return LabelEstimate(
        scans=len(sources.scans),
        looked_at=len(seen),
        sampled=tuple(seen[i].scan_id for i in sampled),
        voxels=round(scale * float(voxels.sum())),
        windows=round(scale * float(windows.sum())),
        seconds_per_window=per_window,
        hours=scale * float(windows.sum()) * per_window / 3600 / config.resources.workers,
        workers=config.resources.workers,
        nbytes=round(scale * float(voxels.sum()) * nbytes / float(voxels[sampled].sum())),
        memory_nbytes=_memory(model, seen, grids, overlap=config.label.overlap),
    )


def _measure(config: LabelConfig, fingerprint: str, model: Model, scan: ScanSource) -> tuple[float, int] | str:
    """Seconds and bytes of one scan, or why it failed."""
    with tempfile.TemporaryDirectory(prefix="distseg-label-") as staging:
        threads = max(1, available_cores() // config.resources.workers)
        rule = rule_of(config.label, model.info)
        task = LabelTask(config.run, fingerprint, scan, staging, rule, config.label.overlap, threads)
        outcome = attempt(label_one, task, scan.scan_id)
        if outcome.value is None:
            return outcome.error or "no reason given"
        files = [staged_path(Path(staging), kind, scan.scan_id) for kind in KINDS]
        return outcome.value.facts["seconds"], sum(file.stat().st_size for file in files)


def _windows(model: Model, grid: tuple[Shape, Spacing], *, overlap: float) -> int:
    shape, spacing_mm = grid
    windows = run_grid(shape, spacing_mm, model.spacing_mm, patch_zyx=model.patch_zyx, overlap=overlap)
    return math.prod(len(starts) for starts in windows.starts)


def _memory(
    model: Model, scans: Sequence[ScanSource], grids: Sequence[tuple[Shape, Spacing]], *, overlap: float
) -> int:
    """This process' peak on the sample, and for the largest scan its planes, its mask and, of a file, its image."""
    most = 0
    for scan, (shape, spacing_mm) in zip(scans, grids, strict=True):
        grid = run_grid(shape, spacing_mm, model.spacing_mm, patch_zyx=model.patch_zyx, overlap=overlap)
        planes = 2 * model.patch_zyx[0] * (len(model.class_names) + 2) * 4 * math.prod(grid.padded_yx)
        image = 0 if scan.image is None else 4 * math.prod(shape)
        most = max(most, planes + math.prod(shape) + image)
    return most + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _evenly(scans: Sequence[ScanSource], most: int) -> list[ScanSource]:
    if len(scans) <= most:
        return list(scans)
    return [scans[int(i)] for i in np.linspace(0, len(scans) - 1, most)]
