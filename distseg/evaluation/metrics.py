"""IoU, Dice, HD95 and average surface distance of one scan, per class, and their summary over scans.

Rules (DESIGN section 3, METHOD trap 6: a missed object must cost and be counted, never drop out of a mean):

| truth     | prediction | status        | IoU, Dice | HD95, ASD          |
|-----------|------------|---------------|-----------|--------------------|
| non-empty | non-empty  | `found`       | measured  | measured           |
| non-empty | empty      | `missed`      | 0         | the image diagonal |
| empty     | non-empty  | `false_alarm` | 0         | the image diagonal |
| empty     | empty      | `absent`      | not counted for this class     ||

A surface is the voxels of a mask with a face neighbour outside it (or on the image's border); distances run between
voxel centres in mm. HD95 is the larger of the two directed 95th percentiles; ASD is the mean over both surfaces'
distances together. These are MONAI's definitions (`compute_hausdorff_distance`, `compute_average_surface_distance`
with `symmetric`); nearest neighbours come from a k-d tree over surface voxels instead of distance maps of the volume,
which gives the same numbers at a cost that does not grow with the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

METRICS = ("iou", "dice", "hd95_mm", "asd_mm")
COMPONENTS = ("all", "largest")  # the prediction as it is; only its largest component per class


@dataclass(frozen=True)
class ClassScore:
    """One class of one scan. The four figures are None when the class is absent; volumes are in millilitres."""

    status: str  # found | missed | false_alarm | absent
    iou: float | None
    dice: float | None
    hd95_mm: float | None
    asd_mm: float | None
    truth_ml: float
    predicted_ml: float


@dataclass(frozen=True)
class ScoreRow:
    """One line of per_scan.csv."""

    scan_id: str
    network: str
    component: str  # all | largest
    class_name: str
    score: ClassScore

    def flat(self) -> dict[str, Any]:
        keys = {"scan_id": self.scan_id, "network": self.network, "component": self.component, "class": self.class_name}
        return {**keys, **asdict(self.score)}


def score_scan(
    prediction: np.ndarray, truth: np.ndarray, *, spacing_mm: Sequence[float], class_names: Sequence[str]
) -> dict[str, ClassScore]:
    """Score label masks [Z, Y, X] of one grid. `class_names[v]` names label value v; 0 is background, not scored."""
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} are on different grids")
    return {
        name: score_class(prediction == value, truth == value, spacing_mm=spacing_mm)
        for value, name in enumerate(class_names)
        if value > 0
    }


def score_class(prediction: np.ndarray, truth: np.ndarray, *, spacing_mm: Sequence[float]) -> ClassScore:
    """Score boolean masks [Z, Y, X] by the table at the top of this file."""
    voxel_ml = math.prod(spacing_mm) / 1000
    predicted, actual = int(prediction.sum()), int(truth.sum())
    volumes = {"truth_ml": actual * voxel_ml, "predicted_ml": predicted * voxel_ml}
    if not predicted and not actual:
        return ClassScore("absent", None, None, None, None, **volumes)
    if not predicted or not actual:
        diagonal = image_diagonal_mm(truth.shape, spacing_mm)
        return ClassScore("missed" if actual else "false_alarm", 0.0, 0.0, diagonal, diagonal, **volumes)
    common = int(np.logical_and(prediction, truth).sum())
    hd95_mm, asd_mm = surface_distances_mm(prediction, truth, spacing_mm=spacing_mm)
    iou, dice = common / (predicted + actual - common), 2 * common / (predicted + actual)
    return ClassScore("found", iou, dice, hd95_mm, asd_mm, **volumes)


def surface_distances_mm(
    prediction: np.ndarray, truth: np.ndarray, *, spacing_mm: Sequence[float]
) -> tuple[float, float]:
    """(HD95, ASD) of two non-empty boolean masks [Z, Y, X]."""
    ours, theirs = (surface_points_mm(mask, spacing_mm=spacing_mm) for mask in (prediction, truth))
    to_truth, _ = cKDTree(theirs).query(ours)
    to_prediction, _ = cKDTree(ours).query(theirs)
    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))
    return float(hd95), float(np.concatenate([to_truth, to_prediction]).mean())


def surface_points_mm(mask: np.ndarray, *, spacing_mm: Sequence[float]) -> np.ndarray:
    """float64 [n, 3] positions of the surface voxels of a non-empty boolean mask."""
    (box,) = ndimage.find_objects(mask.astype(np.uint8), max_label=1)
    part = mask[box]  # nothing of the mask lies outside its box, so the erosion sees the same neighbours
    surface = part & ~ndimage.binary_erosion(part)
    corner = np.array([side.start for side in box])
    points: np.ndarray = (np.argwhere(surface) + corner) * np.asarray(spacing_mm, np.float64)
    return points


def image_diagonal_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Length of the image's diagonal, edge to edge: what a missed object costs."""
    return math.sqrt(sum((n * spacing) ** 2 for n, spacing in zip(shape, spacing_mm, strict=True)))


def largest_components(mask: np.ndarray, *, values: Iterable[int]) -> np.ndarray:
    """The label mask [Z, Y, X] with only the largest component of each class in `values`; other classes stay. It is
    `mask` itself where there is nothing to filter."""
    values = tuple(values)
    if not values:
        return mask
    kept = mask.copy()
    boxes = ndimage.find_objects(mask)
    for value in values:
        box = boxes[value - 1] if value <= len(boxes) else None
        if box is not None:
            found = mask[box] == value
            kept[box][found & ~largest_component(found)] = 0
    return kept


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest component of a boolean mask [Z, Y, X], voxels touching by face, edge or corner.

    Of equally large components the one met first in array order stays.
    """
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if not count:
        return np.zeros_like(mask)
    largest: np.ndarray = components == np.bincount(components.ravel())[1:].argmax() + 1
    return largest


def summarise(rows: Iterable[ScoreRow], *, class_names: Sequence[str]) -> dict[str, Any]:
    """{"classes": {name: {metric: {mean, median, sd}, missed, ...}}, "mean": ..., "largest_component": the same}.

    `rows` are one network's. "mean" is the plain average over classes of each figure (counts are summed); a class that
    no scan counts is left out of it. A figure without data is None (a sample sd needs two scans).
    """
    rows = list(rows)
    names = class_names[1:]
    parts = [_summarise_component([row for row in rows if row.component == part], names) for part in COMPONENTS]
    return {**parts[0], "largest_component": parts[1]}


def _summarise_component(rows: Sequence[ScoreRow], names: Sequence[str]) -> dict[str, Any]:
    classes = {name: _summarise_class([row.score for row in rows if row.class_name == name]) for name in names}
    return {"classes": classes, "mean": _mean_over_classes(classes)}


def _summarise_class(scores: Sequence[ClassScore]) -> dict[str, Any]:
    counted = [score for score in scores if score.status != "absent"]
    figures: dict[str, Any] = {name: spread([getattr(score, name) for score in counted]) for name in METRICS}
    counts = {
        "scans": len(counted),
        "missed": sum(score.status == "missed" for score in counted),
        "false_alarms": sum(score.status == "false_alarm" for score in counted),
    }
    return {**figures, **counts}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, median and sample standard deviation; None where there are too few values."""
    if not values:
        return {"mean": None, "median": None, "sd": None}
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "median": float(np.median(values)), "sd": sd}


def _mean_over_classes(classes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {}
    for metric in METRICS:
        mean[metric] = {}
        for figure in ("mean", "median", "sd"):
            known = [entry[metric][figure] for entry in classes.values() if entry[metric][figure] is not None]
            mean[metric][figure] = float(np.mean(known)) if known else None
    for count in ("missed", "false_alarms"):
        mean[count] = sum(entry[count] for entry in classes.values())
    return mean
