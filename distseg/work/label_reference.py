"""What annotated scans look like, to compare pseudo-labels with: volumes and pieces per class.

The run's own labelled scans where they are at hand, since the truth of others may be hidden from this run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distseg.data.arrays import StoredArray
from distseg.data.cohort import Cohort, Scan, ScanRecord
from distseg.data.place import join
from distseg.errors import InputError
from distseg.inference.components import Components
from distseg.training.remote_run import readable_run

MOST_SCANS = 50  # whose annotation is opened to count pieces
SLAB = 64  # planes, of which the store's chunks are


@dataclass(frozen=True)
class Reference:
    """Per class name: volumes in ml, and the most pieces that one annotated scan has."""

    volumes_ml: dict[str, list[float]] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)


def reference_of(run: str, cohort: Cohort | None, class_names: Sequence[str]) -> tuple[Reference, str | None]:
    """And a note on what was missing, where it was."""
    found = _of_run(run) or ((cohort, [r for r in cohort.records if r.labelled]) if cohort else None)
    if found is None or not found[1] or list(found[0].class_names) != list(class_names):
        return Reference(), "No annotated scans were at hand: volumes and pieces are not compared with theirs."
    home, records = found
    volumes = {
        name: [r.voxels.get(name, 0) * float(np.prod(r.spacing_mm)) / 1000 for r in records] for name in class_names[1:]
    }
    most = dict.fromkeys(class_names[1:], 1)
    for record in records[:MOST_SCANS]:
        annotation = Scan(join(home.path, record.scan_id), record.scan_id).annotation
        if annotation is None:
            continue
        for name, pieces in _pieces(annotation, class_names[1:]).items():
            most[name] = max(most[name], pieces)
    return Reference(volumes, most), None


def _pieces(annotation: StoredArray, names: Sequence[str]) -> dict[str, int]:
    """Of the classes 1, 2, ..., slab by slab: an annotation may be as large as a scan."""
    found = {name: Components() for name in names}
    for z in range(0, annotation.shape[0], SLAB):
        slab = np.asarray(annotation[z : min(z + SLAB, annotation.shape[0])])
        for value, components in enumerate(found.values(), start=1):
            components.add(slab == value)
    return {name: components.count for name, components in found.items()}


def _of_run(run: str) -> tuple[Cohort, list[ScanRecord]] | None:
    """The scans that the run trained on with labels; None where run or cohort is not here any more."""
    try:
        with readable_run(run) as directory:
            stored = directory.stored()
        if stored is None:
            return None
        cohort = Cohort.open(stored.config.cohort)
    except InputError:
        return None
    labelled = set(stored.plan.labelled)
    return cohort, [record for record in cohort.records if record.scan_id in labelled]
