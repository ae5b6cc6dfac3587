"""One scan labelled in a worker: read, the network's turn, two files staged for the driver to commit.

In one process one scan at a time uses the network; the next is read and the one before is packed meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distseg.config.verbs import LabelRuleConfig
from distseg.data.carry import put_files
from distseg.data.label_output import KINDS, NO_LABEL, SUFFIX
from distseg.data.nifti import write_nifti
from distseg.data.place import as_place, is_url
from distseg.data.plane_spool import PlaneSpool
from distseg.data.volume import NativeGrid
from distseg.inference.islands import remove_islands
from distseg.inference.label_scan import Grids, LabelRule, Plane, label_scan
from distseg.inference.model import Model, ModelInfo
from distseg.inference.scan_facts import ScanFacts
from distseg.inference.teacher_passes import PassSettings
from distseg.inference.whole_scan import WINDOWS_A_BATCH, cached_model, use_threads
from distseg.work.executor import STOPPING
from distseg.work.label_sources import OpenScan, ScanSource, open_scan
from distseg.work.ledger import staged_path

_NETWORK = threading.Lock()


@dataclass(frozen=True)
class LabelTask:
    """All that a worker needs; small, as it travels."""

    run: str
    fingerprint: str
    source: ScanSource
    staging: str
    rule: LabelRule
    overlap: float
    threads: int

    @property
    def scan_id(self) -> str:
        return self.source.scan_id


@dataclass(frozen=True)
class Labelled:
    """A scan whose files wait in staging; `facts` become its line of the ledger."""

    scan_id: str
    version: str
    facts: dict[str, Any]


Labeller = Callable[[LabelTask], Labelled]


def rule_of(config: LabelRuleConfig, info: ModelInfo) -> LabelRule:
    """What the config leaves open is the run's."""
    passes = PassSettings(
        config.passes or info.passes, info.teacher_noise_sigma, info.teacher_noise_clip, info.uncertainty
    )
    threshold = info.threshold_nats if config.threshold is None else config.threshold
    whole = info.whole_values(config.components)
    return LabelRule(passes, threshold, config.quantile, config.min_similarity, config.seed, whole)


@contextlib.contextmanager
def _staging_folder(staging: str) -> Iterator[Path]:
    """Where a worker leaves a scan's files for the driver to commit; behind a URL they go there once both are whole,
    and wait for their line."""
    if not is_url(staging):
        yield Path(staging)
        return
    with tempfile.TemporaryDirectory(prefix="distseg-label-") as folder:
        yield Path(folder)
        files = [str(file.relative_to(folder)) for file in Path(folder).rglob(f"*{SUFFIX}")]
        put_files(Path(folder), as_place(staging, key="output"), sorted(files))


def label_one(task: LabelTask) -> Labelled:
    """Runs in a worker."""
    begun = time.perf_counter()
    use_threads(task.threads)
    scan = open_scan(task.source)
    model, device = cached_model(task.run, task.fingerprint)
    with ExitStack() as stack:
        staging = stack.enter_context(_staging_folder(task.staging))
        spools = {kind: stack.enter_context(PlaneSpool(staging)) for kind in KINDS}
        with _NETWORK:
            waited = time.perf_counter()
            facts = label_open_scan(
                model, scan, scan_id=task.scan_id, rule=task.rule, overlap=task.overlap, device=device, spools=spools
            )
            network_s = time.perf_counter() - waited
        written = _write(spools, staging, task, scan.native, num_classes=len(model.class_names))
    more = {
        **written,
        "native_voxels": math.prod(scan.native.shape),
        "native_voxel_ml": math.prod(scan.native.geometry.spacing_mm) / 1000,
        "network_s": round(network_s, 3),
        "seconds": round(time.perf_counter() - begun, 3),
    }
    return Labelled(task.scan_id, task.source.version, {**dataclasses.asdict(facts), **more})


def _write(
    spools: dict[str, PlaneSpool], staging: Path, task: LabelTask, native: NativeGrid, *, num_classes: int
) -> dict[str, int | list[int]]:
    """Stage both files, one volume in memory at a time. Returns the voxels of the mask's foreground classes, and how
    many were islands."""
    masks, trusts = (spools[kind] for kind in KINDS)
    with PlaneSpool(staging) as islands:
        volume = masks.read(native)
        removed = without_islands(volume, native, task.rule, into=islands)
        voxels = _count(volume, native, num_classes=num_classes)
        _stage(volume, staged_path(staging, "masks", task.scan_id), native)
        del volume
        volume = trusts.read(native)
        if removed:
            _mark(volume, native, islands)
        _stage(volume, staged_path(staging, "trust", task.scan_id), native)
    return {"mask_voxels": voxels, "removed_voxels": removed}


def _count(mask: npt.NDArray[np.uint8], native: NativeGrid, *, num_classes: int) -> list[int]:
    """Voxels of each foreground class."""
    voxels = np.zeros(num_classes, np.int64)
    for plane in native.canonical_view(mask):  # of the whole volume bincount would make an int64 copy
        voxels += np.bincount(plane.ravel(), minlength=num_classes)
    counts: list[int] = voxels[1:].tolist()
    return counts


def _mark(trust: npt.NDArray[np.uint8], native: NativeGrid, islands: PlaneSpool) -> None:
    """Removed voxels have no label, in place."""
    view = native.canonical_view(trust)
    for plane, island in zip(view, islands.planes(view.shape[1:]), strict=True):
        plane[island > 0] = NO_LABEL


def _stage(volume: npt.NDArray[np.uint8], file: Path, native: NativeGrid) -> None:
    write_nifti(file, volume, native)
    _to_disk(file)


def without_islands(
    mask: npt.NDArray[np.uint8], native: NativeGrid, rule: LabelRule, *, into: PlaneSpool | None = None
) -> int:
    """Keep the largest component of the rule's classes in `mask`, native axis order, in place; what was removed goes
    to `into` as planes of 0 and 1. Returns how many voxels."""
    removed = 0
    if rule.keep_largest:
        for slab in remove_islands(native.canonical_view(mask), values=rule.keep_largest):
            removed += int(np.count_nonzero(slab))
            if into is not None:
                for plane in slab:
                    into.add(plane.view(np.uint8))
    return removed


def label_open_scan(
    model: Model,
    scan: OpenScan,
    *,
    scan_id: str,
    rule: LabelRule,
    overlap: float,
    device: torch.device,
    spools: dict[str, PlaneSpool],
) -> ScanFacts:
    """Mask and trust of `scan`, in its native geometry, into `spools`; packed in a thread beside the network."""
    native, intensity = scan.native.geometry, scan.intensity
    masks, trusts = (spools[kind] for kind in KINDS)

    def sink(_: int, mask: Plane, trust: Plane) -> None:
        if STOPPING.is_set():
            raise InterruptedError("interrupted")
        packer.put(masks.add, mask)
        packer.put(trusts.add, trust)

    with _Packer() as packer:
        return label_scan(
            scan.image,
            scan_id=scan_id,
            teacher=model.networks["teacher"],
            matcher=model.matcher,
            rule=rule,
            grids=Grids(scan.geometry.spacing_mm, model.spacing_mm, native.spacing_mm, native.shape),
            patch_zyx=model.patch_zyx,
            overlap=overlap,
            normalise=lambda box: model.intensity.normalise(
                box, nonzero_mean=intensity.nonzero_mean, nonzero_sd=intensity.nonzero_sd
            ),
            fill=intensity.minimum,
            num_classes=len(model.class_names),
            batch_size=WINDOWS_A_BATCH,
            device=device,
            sink=sink,
        )


class _Packer:
    """Packs planes in order in one thread; `put` waits while too many are waiting. A context manager."""

    MOST_WAITING = 64  # planes: bounds memory where packing is slower than the network

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> _Packer:
        return self

    def put(self, add: Callable[[Plane], None], plane: Plane) -> None:
        while len(self._waiting) >= self.MOST_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(add, plane))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None:
            for job in self._waiting:
                job.result()


def _to_disk(file: Path) -> None:
    """Before the ledger says that it is done."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())
