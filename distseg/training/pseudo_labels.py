"""Which pseudo-labels train (`data.pseudo_labels`): found when a run begins, the same for its life."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.config.schema import TrainRunConfig
from distseg.data.cohort import Cohort
from distseg.data.label_output import committed, read_identity, read_ledger
from distseg.data.patches import PatchReader
from distseg.data.place import as_place, reachable
from distseg.data.pseudo_labels import PseudoLabels
from distseg.errors import ConfigError, DataError, RunMismatchError


@dataclass(frozen=True)
class FoundPseudoLabels:
    """Ids in order, the fingerprint of the model that made them, and what a user should be told."""

    scans: tuple[str, ...] = ()
    model: str = ""
    notes: tuple[str, ...] = ()


def find_pseudo_labels(config: TrainRunConfig, cohort: Cohort, unlabelled: Sequence[str]) -> FoundPseudoLabels:
    """Those of the run's own unlabelled training scans: validation and test scans never train, labelled ones have
    better. Raises ConfigError or DataError where there are none, or of other classes."""
    if config.data.pseudo_labels is None:
        return FoundPseudoLabels()
    key = "data.pseudo_labels"
    output = reachable(config.data.pseudo_labels, key=key)
    if config.method.name == "dtc":
        rule = "a method whose labelled patches are known everywhere: distance maps have no unknown voxels"
        raise ConfigError("no pseudo-labels with this method", where="method", value="dtc", rule=rule)
    identity = read_identity(output)
    if list(identity.get("classes", ())) != list(cohort.class_names):
        rule = f"the cohort's classes {', '.join(cohort.class_names)}"
        raise ConfigError("pseudo-labels of other classes", where=key, value=identity.get("classes"), rule=rule)
    wanted, versions = set(unlabelled), {record.scan_id: record.sha256[:16] for record in cohort.records}
    done = {line["done"]: line["version"] for line in read_ledger(output) if line.get("done") in wanted}
    there = committed(output) & done.keys()
    # A folder labelled directly knows sizes and dates in place of digests; then the grids alone are compared.
    changed = {scan for scan in there if len(done[scan]) == 16 and done[scan] != versions[scan]}
    scans = tuple(sorted(there - changed))
    if not scans:
        rule = "masks of this run's unlabelled training scans"
        fix = "label this cohort: distseg label cohort=... output=..."
        raise DataError("no pseudo-label that this run can use", where=output, rule=rule, fix=fix)
    notes = [f"{len(scans)} of {len(wanted)} unlabelled training scans have pseudo-labels, which train too"]
    if changed:
        notes.append(f"{len(changed)} pseudo-labels are of images that have changed since, and are left out")
    return FoundPseudoLabels(scans, str(identity["model"]), tuple(notes))


def open_pseudo_labels(
    config: TrainRunConfig,
    *,
    scans: Sequence[str],
    model: str,
    spacing_mm: Sequence[float],
    cohort: Cohort,
    reader: PatchReader,
    folder: Path,
) -> PseudoLabels | None:
    """Those of a plan's `scans`, which keep their voxels in `folder`; None for a run without.

    Raises RunMismatchError where another model than the plan's has made them.
    """
    if not scans or config.data.pseudo_labels is None:
        return None
    output = as_place(config.data.pseudo_labels, key="data.pseudo_labels")
    made_by = read_identity(output)["model"]
    if made_by != model:
        rule = "the model whose labels this run began with"
        raise RunMismatchError("pseudo-labels of another model", where=output, value=made_by[:16], rule=rule)
    folder.mkdir(exist_ok=True)
    return PseudoLabels(
        output,
        scans=scans,
        cohort=cohort,
        reader=reader,
        spacing_mm=spacing_mm,
        folder=folder,
        confidence=config.data.pseudo_confidence,
    )
