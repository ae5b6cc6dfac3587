"""Which classes are one piece in the labels, so that their masks keep the largest component alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distseg.config.schema import TrainRunConfig
from distseg.data.cohort import Cohort
from distseg.evaluation.metrics import largest_component

WHOLE_SHARE = 0.95  # of a class's voxels in its largest component: what the filter may cost where a label is right
MAX_SCANS = 32  # labels that are read to decide


def whole_classes(
    config: TrainRunConfig, cohort: Cohort, labelled: Sequence[str]
) -> tuple[tuple[str, ...], str | None]:
    """Names of the classes to filter, and what to tell the user.

    With `postprocess.components=auto`, those with at least WHOLE_SHARE of their voxels in one component in each of the
    labelled scans that have them. Where patches alone are labelled nobody knows, and nothing is filtered.
    """
    foreground = tuple(cohort.class_names[1:])
    rule = config.postprocess.components
    if rule != "auto":
        return (foreground if rule == "largest" else ()), None
    if config.data.labeled_patches is not None:
        return (), None
    scans = _spread(labelled, MAX_SCANS)
    in_pieces: set[str] = set()
    for scan_id in scans:
        scan = cohort.scan(scan_id)
        stored = scan.annotation
        for name, found in scan.foreground.items():
            if stored is None or name in in_pieces or not found.count:
                continue
            box = tuple(slice(a, b) for a, b in zip(*found.box, strict=True))
            mask = np.asarray(stored[box]) == foreground.index(name) + 1
            if largest_component(mask).sum() < WHOLE_SHARE * mask.sum():
                in_pieces.add(name)
    whole = tuple(name for name in foreground if name not in in_pieces)
    note = f"masks keep the largest component of {', '.join(whole)}, each in one piece in {len(scans)} labelled scans"
    return whole, f"{note} (postprocess.components=all turns it off)" if whole else None


def _spread(ids: Sequence[str], count: int) -> list[str]:
    """`count` of `ids`, evenly spaced."""
    if len(ids) <= count:
        return list(ids)
    return [ids[i * len(ids) // count] for i in range(count)]
