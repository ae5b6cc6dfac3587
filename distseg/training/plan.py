"""What a run learned about its data before its first step, fixed for its life and stored in its config.yaml.

A resumed run reads its plan back, so scans that joined the cohort in between change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distseg.config.schema import TrainRunConfig
from distseg.data.augment import LEFT_RIGHT, Augmentation, lateral_classes
from distseg.data.cohort import Cohort, ScanRecord
from distseg.data.intensity import Intensity
from distseg.data.keys import Purpose, generator
from distseg.data.lattice import Place
from distseg.errors import ConfigError, DataError
from distseg.training.partial_labels import PartialLabels, partial_labels
from distseg.training.patch_notes import patch_notes
from distseg.training.pseudo_labels import find_pseudo_labels
from distseg.training.whole_classes import whole_classes


@dataclass(frozen=True)
class Plan:
    """`spacing_mm` is Z Y X. `notes`: what a user should be told about the choices made."""

    class_names: tuple[str, ...]  # index = label value
    modality: str
    spacing_mm: tuple[float, float, float]
    intensity: Intensity
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    validation: tuple[str, ...]
    flip_axes: tuple[int, ...]
    swap: tuple[tuple[int, int], ...]
    patches: tuple[Place, ...] = ()  # where the labelled scans are labelled; empty: everywhere
    pseudo: tuple[str, ...] = ()  # unlabelled scans whose pseudo-labels train too
    pseudo_model: str = ""  # fingerprint of the model that made them
    whole: tuple[str, ...] = ()  # classes whose masks keep the largest component alone
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def augmentation(self, config: TrainRunConfig) -> Augmentation:
        return Augmentation(self.flip_axes, config.augment.intensity_scale, config.augment.intensity_shift, self.swap)

    def to_plain(self) -> dict[str, Any]:
        plain = {k: _listed(v) for k, v in dataclasses.asdict(self).items()}
        return {**plain, "patches": [f"{scan_id} {z} {y} {x}" for scan_id, (z, y, x) in self.patches]}  # a line each

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Plan:
        values = {k: _tupled(v) for k, v in plain.items()}
        values["patches"] = tuple(_place(line) for line in plain.get("patches", ()))
        return cls(**{**values, "intensity": Intensity(**plain["intensity"])})


def make_plan(config: TrainRunConfig, cohort: Cohort, *, parent: Plan | None = None) -> Plan:
    """Choose scans, spacing and normalisation. A run that branches takes its parent's spacing and normalisation.

    Raises ConfigError or DataError where the cohort cannot serve the config.
    """
    training = [r for r in cohort.records if r.split in (None, "train")]
    labelled = choose_labelled(config, cohort, [r for r in training if r.labelled])
    chosen = set(labelled)
    unlabelled = tuple(sorted(r.scan_id for r in training if r.scan_id not in chosen))
    validation = tuple(sorted(r.scan_id for r in cohort.records if r.split == "val" and r.labelled))
    notes = []
    if config.data.labeled_patches is not None:
        unlabelled = tuple(sorted(r.scan_id for r in training))
        notes.append(f"labelled are {config.data.labeled_patches} patches: the rest of their scans is unlabelled")
    elif not unlabelled:
        notes.append("no unlabelled scan is left: the labelled ones serve as unlabelled too")
    if config.train.select == "val" and not validation:
        raise ConfigError(
            "no validation scans to select on",
            where="train.select",
            value="val",
            fix="set train.select=last, or give the cohort a val split",
        )
    _check_classes(cohort, labelled)
    flip_axes, swap, flip_note = _flips(config, cohort.class_names)
    spacing = parent.spacing_mm if parent else _spacing(config, cohort, labelled)
    partial = partial_labels(config, cohort, labelled, spacing)
    pseudo = find_pseudo_labels(config, cohort, unlabelled)
    whole, whole_note = whole_classes(config, cohort, labelled)
    plan = Plan(
        class_names=tuple(cohort.class_names),
        modality=cohort.modality,
        spacing_mm=spacing,
        intensity=parent.intensity if parent else _intensity(cohort, labelled, partial),
        labelled=partial.scans if partial else labelled,
        unlabelled=unlabelled or labelled,
        validation=validation,
        flip_axes=flip_axes,
        swap=swap,
        patches=partial.places if partial else (),
        pseudo=pseudo.scans,
        pseudo_model=pseudo.model,
        whole=whole,
    )
    notes += pseudo.notes
    notes += [note for note in (flip_note, whole_note) if note]
    notes += patch_notes(config, cohort, labelled=plan.labelled, unlabelled=plan.unlabelled, spacing_mm=plan.spacing_mm)
    return dataclasses.replace(plan, notes=tuple(notes))


def choose_labelled(config: TrainRunConfig, cohort: Cohort, labelled: Sequence[ScanRecord]) -> tuple[str, ...]:
    """The labelled training scans: named, or the first `labeled_scans` of one seeded order, so subsets are nested."""
    ids = sorted(r.scan_id for r in labelled)
    if not ids:
        raise DataError(
            "the cohort has no labelled training scan",
            where=cohort.path,
            rule="training needs at least one",
            fix="ingest a source with label files",
        )
    if config.data.labeled_ids is not None:
        unknown = sorted(set(config.data.labeled_ids) - set(ids))
        if unknown:
            raise ConfigError(
                "not a labelled training scan of the cohort",
                where="data.labeled_ids",
                value=", ".join(unknown),
                fix="distseg cohort cohort=... lists them",
            )
        return tuple(sorted(config.data.labeled_ids))
    wanted = config.data.labeled_scans
    if wanted is None:
        return tuple(ids)
    if wanted > len(ids):
        raise ConfigError(
            "more labelled scans asked for than there are",
            where="data.labeled_scans",
            value=wanted,
            rule=f"the cohort has {len(ids)} labelled training scans",
            fix=f"set data.labeled_scans={len(ids)} or less",
        )
    order = generator(config.data.subset_seed, Purpose.SUBSET).permutation(len(ids))
    return tuple(sorted(ids[i] for i in order[:wanted]))


def _check_classes(cohort: Cohort, labelled: Sequence[str]) -> None:
    by_id = {r.scan_id: r for r in cohort.records}
    for name in cohort.class_names[1:]:
        if not any(by_id[scan].voxels.get(name, 0) for scan in labelled):
            raise DataError(
                f"class {name} has no voxel in any of the {len(labelled)} labelled training scans",
                where=cohort.path,
                rule="every class must occur in the labels that train",
                fix="choose more or other labelled scans (data.labeled_scans, data.subset_seed, data.labeled_ids)",
            )


def _spacing(config: TrainRunConfig, cohort: Cohort, labelled: Sequence[str]) -> tuple[float, float, float]:
    if config.data.spacing_mm is not None:
        z, y, x = (float(s) for s in config.data.spacing_mm)
    else:
        chosen = set(labelled)
        spacings = np.asarray([r.spacing_mm for r in cohort.records if r.scan_id in chosen])
        z, y, x = (round(float(s), 4) for s in np.median(spacings, axis=0))
    return z, y, x


def _intensity(cohort: Cohort, labelled: Sequence[str], partial: PartialLabels | None) -> Intensity:
    if partial is not None:
        return Intensity.of_training_foreground(cohort.modality, partial.values)
    scans = [cohort.scan(scan_id) for scan_id in labelled]
    values = [f.values for scan in scans for f in scan.foreground.values()]
    return Intensity.of_training_foreground(cohort.modality, values)


def _flips(
    config: TrainRunConfig, class_names: Sequence[str]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], str | None]:
    """Axes that may flip and classes that swap with the left-right one (METHOD trap 8)."""
    if config.augment.flip == "none":
        if config.data.mirror_pairs is not None:
            raise ConfigError(
                "classes swap under a flip, and flips are off",
                where="data.mirror_pairs",
                value=config.data.mirror_pairs,
                fix="set augment.flip=left_right",
            )
        return (), (), None
    axes = (0, 1, LEFT_RIGHT) if config.augment.flip == "all" else (LEFT_RIGHT,)
    if config.data.mirror_pairs is not None:
        return axes, tuple(_pair(pair, class_names) for pair in config.data.mirror_pairs), None
    lateral = lateral_classes(class_names)
    if lateral:
        note = f"left-right flips are off: {', '.join(lateral)} have a side (data.mirror_pairs turns them on, swapped)"
        return axes[:-1], (), note
    return axes, (), None


def _pair(pair: Sequence[str], class_names: Sequence[str]) -> tuple[int, int]:
    if len(pair) != 2 or any(name not in class_names for name in pair):
        raise ConfigError(
            "not a pair of classes",
            where="data.mirror_pairs",
            value=list(pair),
            rule=f"two of {', '.join(class_names[1:])}",
            fix="set data.mirror_pairs=[[left_a,right_a]]",
        )
    return class_names.index(pair[0]), class_names.index(pair[1])


def _place(line: str) -> Place:
    scan_id, z, y, x = line.rsplit(" ", 3)
    return scan_id, (int(z), int(y), int(x))


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple | list) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value
