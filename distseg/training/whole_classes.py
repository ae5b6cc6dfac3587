"""Which classes are one piece in the labels, so that their masks keep the largest component alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distseg.config.schema import TrainRunConfig
from distseg.data.cohort import Cohort, Scan
from distseg.evaluation.metrics import largest_component

WHOLE_SHARE = 0.95  # of a class's voxels in its largest component: what the filter may cost where a label is right
MAX_SCANS = 32  # of a class, labels that are read to decide


def whole_classes(
    config: TrainRunConfig, cohort: Cohort, labelled: Sequence[str]
) -> tuple[tuple[str, ...], str | None]:
    """Names of the classes to filter, and what to tell the user.

    With `postprocess.components=auto`, those with at least WHOLE_SHARE of their voxels in one component in each of the
    labelled scans that have them, of which MAX_SCANS are read. Where patches alone are labelled nobody knows, and
    nothing is filtered.
    """
    foreground = tuple(cohort.class_names[1:])
    rule = config.postprocess.components
    if rule != "auto":
        return (foreground if rule == "largest" else ()), None
    if config.data.labeled_patches is not None:
        return (), None
    chosen = set(labelled)
    records = [record for record in cohort.records if record.scan_id in chosen]
    whole = {}
    for value, name in enumerate(foreground, start=1):
        having = _spread([record.scan_id for record in records if record.voxels.get(name, 0)], MAX_SCANS)
        if having and all(_is_whole(cohort.scan(scan_id), name, value) for scan_id in having):
            whole[name] = len(having)
    told = ", ".join(f"{name} (one piece in {count} labelled scans)" for name, count in whole.items())
    note = f"masks keep the largest component alone of {told}; postprocess.components=all turns it off"
    return tuple(whole), note if whole else None


def _is_whole(scan: Scan, name: str, value: int) -> bool:
    stored = scan.annotation
    assert stored is not None, "labelled"
    box = tuple(slice(a, b) for a, b in zip(*scan.foreground[name].box, strict=True))
    mask = np.asarray(stored[box]) == value
    return bool(largest_component(mask).sum() >= WHOLE_SHARE * mask.sum())


def _spread(ids: Sequence[str], count: int) -> list[str]:
    """`count` of `ids`, evenly spaced."""
    if len(ids) <= count:
        return list(ids)
    return [ids[i * len(ids) // count] for i in range(count)]
