"""What a user should be told about the size of patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distseg.config.schema import TrainRunConfig
from distseg.data.cohort import Cohort

SEEN_LEAST = 1 / 8  # of the labelled object's box: a patch that holds less sees hardly where it is
MAX_SCANS = 64  # labelled scans whose boxes are looked at


def patch_notes(
    config: TrainRunConfig,
    cohort: Cohort,
    *,
    labelled: Sequence[str],
    unlabelled: Sequence[str],
    spacing_mm: Sequence[float],
) -> list[str]:
    """A patch larger than a scan is padded with its minimum; one much smaller than the object sees little of it."""
    ids = {*labelled, *unlabelled}
    patch_mm = np.asarray(config.sampling.patch_zyx) * np.asarray(spacing_mm)
    small = [
        r for r in cohort.records
        if r.scan_id in ids and np.any(np.asarray(r.shape) * np.asarray(r.spacing_mm) < patch_mm)
    ]  # fmt: skip
    notes = [f"{len(small)} of {len(ids)} scans are smaller than a patch and are padded"] if small else []
    if config.data.labeled_patches is not None or config.train.init_from is not None:
        return notes  # nobody has said how large the object is; or the spacing is the parent's
    object_mm = _object_mm(cohort, labelled[:MAX_SCANS])
    if np.prod(np.minimum(patch_mm / object_mm, 1)) < SEEN_LEAST:
        wanted = np.maximum(spacing_mm, np.ceil(object_mm / config.sampling.patch_zyx * 5) / 10)  # half of each side
        notes.append(
            f"a patch covers {_mm(patch_mm)}, the labelled object {_mm(object_mm)} (Z Y X): it may see too little; "
            f"coarser voxels show more, as data.spacing_mm=[{','.join(f'{one:g}' for one in wanted)}]"
        )
    return notes


def _object_mm(cohort: Cohort, labelled: Sequence[str]) -> np.ndarray:
    """Median sides [3] in mm of the box around all classes of a labelled scan; zeros where no scan has any."""
    sides = []
    for scan in map(cohort.scan, labelled):
        boxes = [found.box for found in scan.foreground.values() if found.count]
        if boxes:
            start, stop = (np.asarray([box[end] for box in boxes]) for end in (0, 1))
            sides.append((stop.max(0) - start.min(0)) * np.asarray(scan.geometry.spacing_mm))
    middle: np.ndarray = np.maximum(np.median(sides, axis=0), 1e-6) if sides else np.full(3, 1e-6)
    return middle


def _mm(sides: np.ndarray) -> str:
    return " x ".join(f"{side:.0f}" for side in sides) + " mm"
