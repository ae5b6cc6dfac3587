"""Labelled patches: the lattice by brute force, lists that are nested, and that no label outside them is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distseg.config.compose import train_config
from distseg.data.cohort import Cohort
from distseg.data.intensity import Intensity
from distseg.data.lattice import LabelledPatches, choose_patches, inside, patch_lattice
from distseg.data.patches import PatchReader
from distseg.errors import ConfigError, DataError
from distseg.training.plan import Plan, make_plan
from tests.unit.test_training import TINY, config, train

SIZE = (8, 8, 8)


def reader_of(cohort: str) -> PatchReader:
    return PatchReader(
        Cohort.open(cohort), spacing_mm=(3, 2, 2), intensity=Intensity("per_scan"), memory_nbytes=1 << 20
    )


@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(*[st.integers(2, 9)] * 3),
    extent=st.tuples(*[st.integers(1, 30)] * 3),
    count=st.integers(1, 60),
)
def test_the_lattice_is_disjoint_and_covers_the_body(
    seed: int, size: tuple[int, ...], extent: tuple[int, ...], count: int
) -> None:
    body = np.random.default_rng(seed).integers(0, extent, (count, 3)).astype(np.int32) + 5
    starts = patch_lattice(body, size)
    boxes = [np.stack([np.asarray(start), np.asarray(start) + size]) for start in starts]
    for number, (low, high) in enumerate(boxes):
        assert ((body >= low) & (body < high)).all(1).any()  # something of the body in each
        for other_low, other_high in boxes[:number]:
            assert (np.maximum(low, other_low) >= np.minimum(high, other_high)).any()  # apart along some axis
    assert inside(body, starts, size).all()
    assert starts == sorted(set(starts))
    # As few along each axis as the body's box needs, and its middle in theirs.
    low, high = body.min(0), body.max(0) + 1
    first, last = np.min(starts, 0), np.max(starts, 0) + size
    needed = -(-(high - low) // np.asarray(size)) * size
    assert ((last - first) <= needed).all()
    assert (low - first < size).all()


def test_a_lattice_by_hand() -> None:
    """Ten voxels along X in boxes of 4: three boxes, twelve voxels, one beyond each end."""
    body = np.array([[5, 7, x] for x in range(20, 30)], np.int32)
    assert patch_lattice(body, (4, 4, 4)) == [(4, 6, 19), (4, 6, 23), (4, 6, 27)]


def test_lists_are_nested_and_scans_take_turns(cohort_path: str) -> None:
    reader = reader_of(cohort_path)

    def chosen(count: int, scans: str = "abc", seed: int = 0) -> list[tuple[str, tuple[int, int, int]]]:
        return list(choose_patches(reader, list(scans), size=SIZE, count=count, seed=seed))

    long = chosen(30)
    assert len(set(long)) == 30
    for count in (1, 7, 29):
        assert chosen(count) == long[:count]
    assert {scan for scan, _ in long[:3]} == set("abc")  # one of each before a second of any
    assert chosen(30) != chosen(30, seed=1)
    # Another scan beside them changes nothing about their own order.
    more = [place for place in chosen(40, "abcd") if place[0] != "d"]
    assert more == long[: len(more)]


def test_more_patches_than_exist_is_one_line(cohort_path: str, tmp_path: Path) -> None:
    reader = reader_of(cohort_path)
    exist = sum(len(patch_lattice(reader.placement(scan).body, SIZE)) for scan in "ab")
    message = rf"more labelled patches.*\(got {exist + 1}\); 2 labelled scans hold {exist} patches of 8x8x8 voxels"
    with pytest.raises(ConfigError, match=message):
        choose_patches(reader, ["a", "b"], size=SIZE, count=exist + 1, seed=0)
    assert len(choose_patches(reader, ["a", "b"], size=SIZE, count=exist, seed=0)) == exist
    with pytest.raises(ConfigError, match=r"hold \d+ patches"):
        train(config(cohort_path, tmp_path / "run", data__labeled_patches=10_000))
    assert not (tmp_path / "run").exists()


def test_draws_for_foreground_and_evenly(cohort_path: str) -> None:
    reader = reader_of(cohort_path)
    places = choose_patches(reader, ["a", "b"], size=SIZE, count=20, seed=0)
    patches, rng = LabelledPatches(reader, places, SIZE), np.random.default_rng(0)

    def holds(place: tuple[str, tuple[int, int, int]], name: str) -> bool:
        voxels = reader.placement(place[0]).foreground.get(name)
        return voxels is not None and bool(inside(voxels, [place[1]], SIZE).any())

    drawn = [patches.draw(rng, foreground_share=1.0) for _ in range(200)]
    assert all(holds(place, "hip") or holds(place, "femur") for place in drawn)
    drawn = [patches.draw(rng, foreground_share=0.0) for _ in range(400)]
    assert set(drawn) == set(places)
    for scan in "ab":
        place = patches.with_foreground(scan, rng)
        assert place is not None
        assert place[0] == scan
        assert holds(place, "hip") or holds(place, "femur")
    empty = [place for place in places if not holds(place, "hip") and not holds(place, "femur")]
    assert LabelledPatches(reader, empty, SIZE).with_foreground("a", rng) is None
    assert LabelledPatches(reader, empty, SIZE).draw(rng, foreground_share=1.0) in empty


def test_the_plan_of_labelled_patches(cohort_path: str) -> None:
    """Stored with the run; intensities of listed patches alone; the rest of the scans is unlabelled."""
    keys = {**TINY, "data.labeled_ids": ["a", "b"], "data.spacing_mm": [3, 2, 2]}
    cohort = Cohort.open(cohort_path)

    def plan_of(count: int | None, **more: Any) -> Plan:
        overrides = {**keys, "data.labeled_patches": count, **more}
        return make_plan(train_config(cohort="c", run="r", method="supervised", overrides=overrides), cohort)

    whole, plan = plan_of(None), plan_of(14)
    assert whole.patches == ()
    assert len(plan.patches) == 14
    assert Plan.from_plain(plan.to_plain()) == plan
    assert Plan.from_plain({k: v for k, v in whole.to_plain().items() if k != "patches"}) == whole  # of older runs
    assert plan.unlabelled == ("a", "b", "c", "d", "e", "f", "u", "w")
    assert whole.unlabelled == ("c", "d", "e", "f", "u", "w")
    assert "labelled are 14 patches" in plan.notes[0]
    reader, values = reader_of(cohort_path), []
    for scan_id in ("a", "b"):
        starts = [start for scan, start in plan.patches if scan == scan_id]
        for name, found in cohort.scan(scan_id).foreground.items():
            kept = [
                value
                for voxel, value in zip(reader.placement(scan_id).foreground[name], found.values, strict=True)
                if any(all(s <= v < s + 8 for s, v in zip(start, voxel, strict=True)) for start in starts)
            ]
            values.append(np.asarray(kept, np.float32))
    assert plan.intensity == Intensity.of_training_foreground("CT", values)
    assert plan.intensity != whole.intensity
    with pytest.raises(DataError, match=r"class femur has no voxel in any of the 12 labelled patches"):
        plan_of(12)


@pytest.mark.parametrize("method", ["dtc", "embedding_matching"])
def test_no_label_outside_the_patches_is_opened(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Neither by slots nor by what makes references; and interrupted runs keep their list."""
    opened: set[tuple[str, tuple[int, ...]]] = set()
    label = PatchReader.label

    def spy(self: PatchReader, scan_id: str, start: Any, size: Any) -> Any:
        opened.add((scan_id, tuple(start)))
        return label(self, scan_id, start, size)

    monkeypatch.setattr(PatchReader, "label", spy)
    settings = config(
        cohort_path, tmp_path / "run", method=method, data__labeled_ids=["a", "b"], data__labeled_patches=14
    )
    train(settings)
    listed = {(line.split()[0], tuple(map(int, line.split()[1:]))) for line in _stored(tmp_path / "run")["patches"]}
    assert len(listed) == 14
    assert {place for place in opened if place[0] != "v"} <= listed
    assert {scan for scan, _ in opened} == {"a", "b", "v"}


def _stored(run: Path) -> dict[str, Any]:
    plan: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())["plan"]
    return plan
