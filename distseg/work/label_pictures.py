"""Pictures of pseudo-labelled scans: the mask and where it was in doubt, outlined on three planes through the doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distseg.data.carry import local_copy
from distseg.data.label_output import CODE_STEP, KINDS, committed_path
from distseg.data.nifti import read_nifti
from distseg.data.place import as_place
from distseg.evaluation.figures import grey_window, png_bytes, scan_figure
from distseg.evaluation.page import Picture
from distseg.work.executor import Executor
from distseg.work.label_sources import ScanSource, open_scan
from distseg.work.native_planes import native_planes

OUTLINED = ("in doubt", "label")


@dataclass(frozen=True)
class _PictureTask:
    output: str
    source: ScanSource


def review_pictures(
    output: Path, rows: Sequence[Mapping[str, Any]], sources: Mapping[str, ScanSource], executor: Executor
) -> list[Picture]:
    """One a row, in the order of rows; a scan whose files cannot be read is left out."""
    tasks = [_PictureTask(str(output), sources[row["scan_id"]]) for row in rows]
    made = {outcome.key: outcome.value for outcome in executor.map(_draw, tasks, key=_scan_id) if outcome.value}
    return [
        Picture(f"{row['rank']}. {row['scan_id']}", _caption(row), made[row["scan_id"]])
        for row in rows
        if row["scan_id"] in made
    ]


def _scan_id(task: _PictureTask) -> str:
    return task.source.scan_id


def _caption(row: Mapping[str, Any]) -> str:
    parts = [f"expected error {row['expected_error']:.2f}"]
    if row["expected_dice"] is not None:
        parts.append(f"expected Dice {row['expected_dice']:.2f}")
    pieces = row["components"]
    parts.append(f"{row['volume_ml']:.0f} ml in {pieces} piece{'' if pieces == 1 else 's'}")
    return ", ".join(parts)


def _draw(task: _PictureTask) -> bytes:
    """Runs in a worker."""
    scan = open_scan(task.source)
    mask, trust = (_volume(task, kind) for kind in KINDS)
    planes = native_planes(
        scan.image,
        stored_spacing_mm=scan.geometry.spacing_mm,
        native_spacing_mm=scan.native.geometry.spacing_mm,
        fill=scan.intensity.minimum,
        first=(trust >= CODE_STEP).astype(np.uint8),
        second=mask,
    )
    window = grey_window(np.concatenate([plane.image.ravel() for plane in planes]), scan.modality)
    return png_bytes(scan_figure(planes, window=window, names=OUTLINED))


def _volume(task: _PictureTask, kind: str) -> npt.NDArray[Any]:
    with local_copy(committed_path(as_place(task.output), kind, task.source.scan_id)) as file:
        return read_nifti(file).array
