"""Labels of some patches alone (`data.labeled_patches`): which, and the foreground intensities under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distseg.config.schema import TrainRunConfig
from distseg.data.cohort import Cohort
from distseg.data.intensity import Intensity
from distseg.data.lattice import Place, choose_patches, inside
from distseg.data.patches import PatchReader
from distseg.errors import DataError


@dataclass(frozen=True)
class PartialLabels:
    """The labelled patches, and the sampled foreground intensities inside them: all a run may know of labels."""

    places: tuple[Place, ...]
    values: list[npt.NDArray[np.float32]]

    @property
    def scans(self) -> tuple[str, ...]:
        """Those with a labelled patch."""
        return tuple(sorted({scan_id for scan_id, _ in self.places}))


def partial_labels(
    config: TrainRunConfig, cohort: Cohort, labelled: Sequence[str], spacing_mm: Sequence[float]
) -> PartialLabels | None:
    """The patches asked for, of the `labelled` scans; None where whole scans are labelled.

    Raises ConfigError where more are asked for than there are, DataError where a class is in none of them.
    """
    count, size = config.data.labeled_patches, config.sampling.patch_zyx
    if count is None:
        return None
    # It is asked for places alone, so intensities and room are nothing to it.
    reader = PatchReader(cohort, spacing_mm=spacing_mm, intensity=Intensity("per_scan"), memory_nbytes=0)
    places = choose_patches(reader, labelled, size=size, count=count, seed=config.data.subset_seed)
    by_class: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in cohort.class_names[1:]}
    for scan_id in sorted({scan_id for scan_id, _ in places}):
        starts = [start for scan, start in places if scan == scan_id]
        placement = reader.placement(scan_id)
        for name, voxels in placement.foreground.items():
            by_class[name].append(placement.intensities[name][inside(voxels, starts, size)])
    for name, values in by_class.items():
        if not sum(map(len, values)):
            raise DataError(
                f"class {name} has no voxel in any of the {count} labelled patches",
                where=cohort.path,
                rule="every class must occur in the labels that train",
                fix="choose more patches or others (data.labeled_patches, data.subset_seed)",
            )
    return PartialLabels(places, [array for values in by_class.values() for array in values])
