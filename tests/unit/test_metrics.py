"""Metrics against hand-computed cubes, a brute-force surface distance, and MONAI."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.evaluation import metrics

SPACING_MM = (3.0, 1.0, 0.5)


def cube(shape: tuple[int, int, int], start: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return mask


def brute_force_distances(ours: np.ndarray, theirs: np.ndarray, spacing_mm: tuple[float, ...]) -> tuple[float, float]:
    """(HD95, ASD) by the definition: loops over voxels, six neighbours, all pairs."""

    def surface(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        points = []
        for index in np.argwhere(mask):
            steps = [*np.eye(3, dtype=int), *-np.eye(3, dtype=int)]
            if not all(padded[tuple(index + 1 + step)] for step in steps):
                points.append(index * np.array(spacing_mm))
        return np.array(points)

    a, b = surface(ours), surface(theirs)
    pairs = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    there, back = pairs.min(1), pairs.min(0)
    return max(np.percentile(there, 95), np.percentile(back, 95)), float(np.concatenate([there, back]).mean())


def random_blobs(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth, prediction = rng.random(shape) < 0.25, rng.random(shape) < 0.2
    truth.flat[rng.integers(truth.size)] = True
    prediction.flat[rng.integers(truth.size)] = True
    return prediction, truth


def test_shifted_cube_by_hand() -> None:
    # 2x2x2 against the same cube one voxel further in x (0.5 mm): 4 common voxels of 8 + 8, union 12. All eight voxels
    # of each are surface; half lie on the other's surface (0), half are 0.5 mm away: HD95 = 0.5, ASD = 0.25.
    truth = cube((6, 6, 6), (2, 2, 2), (2, 2, 2))
    prediction = cube((6, 6, 6), (2, 2, 3), (2, 2, 2))
    score = metrics.score_class(prediction, truth, spacing_mm=SPACING_MM)
    assert (score.status, score.iou, score.dice) == ("found", 4 / 12, 0.5)
    assert (score.hd95_mm, score.asd_mm) == (0.5, 0.25)
    assert score.truth_ml == pytest.approx(8 * 1.5 / 1000)


@given(seed=st.integers(0, 10_000), shape=st.tuples(*[st.integers(1, 6)] * 3))
@settings(max_examples=60, deadline=None)
def test_surface_distances_equal_brute_force(seed: int, shape: tuple[int, int, int]) -> None:
    prediction, truth = random_blobs(seed, shape)
    ours = metrics.surface_distances_mm(prediction, truth, spacing_mm=SPACING_MM)
    assert ours == pytest.approx(brute_force_distances(prediction, truth, SPACING_MM), abs=1e-9)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")  # MONAI 1.6 warns of itself
@pytest.mark.parametrize("seed", range(4))
def test_surface_distances_equal_monai(seed: int) -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_distance import compute_average_surface_distance

    prediction, truth = random_blobs(seed, (9, 11, 8))
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
    options = {"include_background": True, "spacing": list(SPACING_MM)}
    hd95 = compute_hausdorff_distance(*pair, percentile=95, **options).item()
    asd = compute_average_surface_distance(*pair, symmetric=True, **options).item()
    ours = metrics.surface_distances_mm(prediction, truth, spacing_mm=SPACING_MM)
    assert ours == pytest.approx((hd95, asd), rel=1e-5)


def test_empty_masks_follow_the_table() -> None:
    full, empty = cube((4, 5, 6), (1, 1, 1), (2, 2, 2)), np.zeros((4, 5, 6), bool)
    diagonal = math.sqrt((4 * 3) ** 2 + 5**2 + (6 * 0.5) ** 2)
    missed = metrics.score_class(empty, full, spacing_mm=SPACING_MM)
    alarm = metrics.score_class(full, empty, spacing_mm=SPACING_MM)
    absent = metrics.score_class(empty, empty, spacing_mm=SPACING_MM)
    for score, status in ((missed, "missed"), (alarm, "false_alarm")):
        assert score.status == status
        assert (score.iou, score.dice, score.hd95_mm, score.asd_mm) == (0, 0, pytest.approx(diagonal), score.hd95_mm)
    assert absent.status == "absent"
    assert absent.iou is None
    assert absent.hd95_mm is None


@given(seed=st.integers(0, 1000), pad=st.tuples(*[st.integers(1, 4)] * 3))
@settings(max_examples=20, deadline=None)
def test_room_around_the_objects_changes_nothing(seed: int, pad: tuple[int, int, int]) -> None:
    prediction, truth = random_blobs(seed, (5, 6, 4))
    snug = metrics.score_class(prediction, truth, spacing_mm=SPACING_MM)
    wide = [np.pad(mask, [(n, n) for n in pad]) for mask in (prediction, truth)]
    roomy = metrics.score_class(wide[0], wide[1], spacing_mm=SPACING_MM)
    # Not the very same sum: positions are larger numbers.
    assert (roomy.iou, roomy.dice) == (snug.iou, snug.dice)
    assert (roomy.hd95_mm, roomy.asd_mm) == pytest.approx((snug.hd95_mm, snug.asd_mm), abs=1e-9)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(), (0,), (0, 2)])
def test_storing_orientation_does_not_matter(axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
    prediction, truth = random_blobs(7, (5, 7, 6))
    turned = [np.flip(mask.transpose(axes), flips) for mask in (prediction, truth)]
    score = metrics.score_class(prediction, truth, spacing_mm=SPACING_MM)
    other = metrics.score_class(turned[0], turned[1], spacing_mm=[SPACING_MM[axis] for axis in axes])
    assert (other.iou, other.dice) == (score.iou, score.dice)
    assert (other.hd95_mm, other.asd_mm) == pytest.approx((score.hd95_mm, score.asd_mm), abs=1e-9)


def test_different_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="different grids"):
        metrics.score_scan(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), spacing_mm=(1, 1, 1), class_names=["bg", "a"])


def test_largest_component_per_class() -> None:
    mask = np.zeros((4, 6, 9), np.uint8)
    mask[0:2, 0:2, 0:2] = 1  # 8 voxels, joined by a corner to one more
    mask[2, 2, 2] = 1
    mask[3, 5, 8] = 1  # an island
    mask[0, 5, 0:3] = 2  # class 2: three voxels
    mask[0, 5, 5:7] = 2  # and an island of two
    kept = metrics.largest_components(mask, values=(1, 2, 3))
    expected = mask.copy()
    expected[3, 5, 8] = 0
    expected[0, 5, 5:7] = 0
    np.testing.assert_array_equal(kept, expected)
    assert not metrics.largest_components(np.zeros_like(mask), values=(1, 2, 3)).any()


def row(scan_id: str, class_name: str, component: str, dice: float | None, status: str = "found") -> metrics.ScoreRow:
    hd = None if dice is None else 10 * (1 - dice)
    return metrics.ScoreRow(
        scan_id, "student", component, class_name, metrics.ClassScore(status, dice, dice, hd, hd, 1.0, 1.0)
    )


def test_summary_by_hand() -> None:
    rows = [
        row("s1", "left", "all", 0.5),
        row("s2", "left", "all", 0.9),
        row("s3", "left", "all", 0.0, "missed"),
        row("s1", "right", "all", 0.8),
        row("s2", "right", "all", None, "absent"),
        row("s3", "right", "all", 0.0, "false_alarm"),
        row("s1", "left", "largest", 1.0),
    ]
    summary = metrics.summarise(rows, class_names=["background", "left", "right"])
    left, right = summary["classes"]["left"], summary["classes"]["right"]
    assert left["dice"]["mean"] == pytest.approx(1.4 / 3)
    assert left["dice"]["median"] == 0.5
    # Sample sd of 0.5, 0.9, 0: deviations .0333, .4333, -.4667 from the mean; squares sum to .40667; halved, rooted.
    assert left["dice"]["sd"] == pytest.approx(math.sqrt(0.40666667 / 2))
    assert (left["missed"], left["false_alarms"], left["scans"]) == (1, 0, 3)
    assert (right["missed"], right["false_alarms"], right["scans"]) == (0, 1, 2)
    assert right["dice"]["mean"] == pytest.approx(0.4)
    assert summary["mean"]["dice"]["mean"] == pytest.approx((1.4 / 3 + 0.4) / 2)
    assert (summary["mean"]["missed"], summary["mean"]["false_alarms"]) == (1, 1)
    largest = summary["largest_component"]
    assert largest["classes"]["left"]["dice"] == {"mean": 1.0, "median": 1.0, "sd": None}
    assert largest["classes"]["right"]["dice"]["mean"] is None
    assert largest["mean"]["dice"]["mean"] == 1.0


def test_a_row_is_flat_for_csv() -> None:
    flat = row("s1", "left", "all", 0.5).flat()
    assert flat["class"] == "left"
    assert flat["status"] == "found"
    assert flat["hd95_mm"] == 5.0
