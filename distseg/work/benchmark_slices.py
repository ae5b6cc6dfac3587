"""The masks of the paper's Figure 2: one axial slice of a few scans, predicted by every row of a benchmark.

Evaluation keeps figures, not masks, so these scans are predicted once more; cells/CELL/slices.npz keeps the slices.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distseg.data.cohort import Cohort, Scan
from distseg.data.volume import resample_box
from distseg.evaluation.figures import central_index
from distseg.inference.whole_scan import ScanIntensity, cached_model, model_fingerprint, segment_scan, use_threads
from distseg.work.benchmark_cells import Cell
from distseg.work.executor import Executor, available_cores


@dataclass(frozen=True)
class Slice:
    """A native axial slice: `image` and `truth` [Y, X]; `spacing_mm` is Z Y X."""

    scan_id: str
    index: int
    image: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, float, float]
    modality: str


@dataclass(frozen=True)
class _Task:
    name: str
    run: str
    fingerprint: str
    scans: tuple[tuple[Scan, int], ...]  # and the slice wanted of each
    network: str
    overlap: float
    threads: int


def pick_scans(dice: Mapping[str, float]) -> dict[str, str]:
    """{"best": scan, "median": ..., "worst": ...} by Dice; of fewer than three scans, each once."""
    ranked = sorted(dice, key=lambda scan: (dice[scan], scan))
    if not ranked:
        return {}
    places = {"worst": ranked[0], "best": ranked[-1], "median": ranked[(len(ranked) - 1) // 2]}
    first = {scan: place for place, scan in reversed(places.items())}
    return {place: scan for place in ("best", "median", "worst") for scan, taken in first.items() if taken == place}


def read_slice(cohort: Cohort, scan_id: str) -> Slice:
    """The central axial slice of the annotation and the image under it."""
    scan = cohort.scan(scan_id)
    native, truth = scan.native.geometry, scan.native_annotation()
    if truth is None:
        raise ValueError(f"{scan_id} was evaluated, so it has an annotation")
    index = central_index(truth, 0)
    image = resample_box(
        scan.image,
        source_spacing_mm=scan.geometry.spacing_mm,
        target_spacing_mm=native.spacing_mm,
        start_zyx=(index, 0, 0),
        size_zyx=(1, *native.shape[1:]),
        order=1,
        fill=scan.minimum,
    )
    return Slice(scan_id, index, image[0], truth[index], native.spacing_mm, scan.modality)


def predict_slices(
    cells: Sequence[Cell], slices: Sequence[Slice], cohort: Cohort, *, network: str, overlap: float, executor: Executor
) -> tuple[dict[str, dict[str, np.ndarray]], list[tuple[str, str]]]:
    """{cell name: {scan id: mask [Y, X]}} and the cells that could not, with the reason."""
    threads = max(1, available_cores() // executor.workers)
    scans = tuple((cohort.scan(s.scan_id), s.index) for s in slices)
    tasks = [
        _Task(cell.name, str(cell.run), model_fingerprint(cell.run), scans, network, overlap, threads) for cell in cells
    ]
    masks: dict[str, dict[str, np.ndarray]] = {}
    todo, trouble = [], []
    for task in tasks:
        kept, wanted = _kept(task), _wanted(task)
        if wanted.keys() <= kept.keys():
            masks[task.name] = {scan.scan_id: kept[key] for key, (scan, _) in wanted.items()}
        else:
            todo.append(task)
    for outcome in executor.map(_predict, todo, key=_name):
        if outcome.value is None:
            trouble.append((f"figure of {outcome.key}", outcome.error or "no masks"))
        else:
            masks[outcome.key] = outcome.value
    return masks, trouble


def _name(task: _Task) -> str:
    return task.name


def _wanted(task: _Task) -> dict[str, tuple[Scan, int]]:
    """Name in slices.npz -> scan and slice."""
    return {f"{scan.scan_id}/{index}/{task.network}/{task.overlap}": (scan, index) for scan, index in task.scans}


def _kept(task: _Task) -> dict[str, np.ndarray]:
    """Slices of this very model from an earlier call."""
    file = _file(task)
    if not file.is_file():
        return {}
    with np.load(file) as stored:
        if str(stored["fingerprint"]) != task.fingerprint:
            return {}
        return {key: stored[key] for key in stored.files if key != "fingerprint"}


def _file(task: _Task) -> Path:
    return Path(task.run) / "slices.npz"


def _predict(task: _Task) -> dict[str, np.ndarray]:
    """Runs in a worker."""
    kept, wanted, file = _kept(task), _wanted(task), _file(task)
    use_threads(task.threads)
    model, device = cached_model(task.run, task.fingerprint)
    for key, (scan, index) in wanted.items():
        if key in kept:
            continue
        mask = segment_scan(
            model,
            scan.image,
            networks=(task.network,),
            spacing_mm=scan.geometry.spacing_mm,
            intensity=ScanIntensity(scan.minimum, scan.nonzero_mean, scan.nonzero_sd),
            overlap=task.overlap,
            device=device,
            output_shape=scan.native.geometry.shape,
            output_spacing_mm=scan.native.geometry.spacing_mm,
        )[task.network]
        kept[key] = mask[index].copy()  # not a view: the volume is let go
    partial = file.with_name(f".{uuid.uuid4().hex[:8]}.npz")
    np.savez_compressed(partial, fingerprint=np.array(task.fingerprint), **kept)  # type: ignore[arg-type]  # stubs
    partial.replace(file)
    return {scan.scan_id: kept[key] for key, (scan, _) in wanted.items()}
