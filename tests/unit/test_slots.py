"""From a key to a patch: keys, placement, reading with and without memory, flips, normalisation."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distseg.config.compose import train_config
from distseg.config.schema import ReferencesConfig
from distseg.data.arrays import StoredArray
from distseg.data.augment import LEFT_RIGHT, Augmentation, lateral_classes
from distseg.data.batch import collate
from distseg.data.cohort import Cohort
from distseg.data.intensity import Intensity
from distseg.data.keys import Purpose, generator, torch_generators, torch_seed
from distseg.data.patches import PatchReader, Placement, crop
from distseg.data.slots import Patch, SlotSampler
from distseg.errors import ConfigError
from distseg.matching.surface import has_surface, surface_bands
from distseg.training.feed import Feed
from distseg.training.plan import _flips
from tests.unit.tiny_cohort import LABELLED, SHAPE, UNLABELLED, scan_arrays

NATIVE = (3.0, 2.0, 2.0)
PLAIN = Augmentation(flip_axes=(), intensity_scale=0.0, intensity_shift=0.0)
EVERY = Augmentation(flip_axes=(0, 1, 2), intensity_scale=0.1, intensity_shift=0.1)
UNTOUCHED = Intensity("ct", low=-1e6, high=1e6, mean=0.0, sd=1.0)


def canonical(number: int) -> tuple[np.ndarray, np.ndarray]:
    """RAS arrays in LPS+ [Z, Y, X]: i and j reversed, axes transposed."""
    return tuple(np.ascontiguousarray(array[::-1, ::-1].transpose(2, 1, 0)) for array in scan_arrays(number))


def reader(cohort_path: str, *, spacing: tuple[float, ...] = NATIVE, memory_nbytes: int = 2**30) -> PatchReader:
    return PatchReader(Cohort.open(cohort_path), spacing_mm=spacing, intensity=UNTOUCHED, memory_nbytes=memory_nbytes)


def sampler(source: Any, *, augmentation: Augmentation = EVERY, **more: Any) -> SlotSampler:
    arguments = {"labelled": LABELLED, "unlabelled": UNLABELLED, "patch_zyx": (8, 8, 8), "foreground_share": 0.5}
    return SlotSampler(source, augmentation=augmentation, **{"seed": 7, **arguments, **more})


# Keys


def test_keys_are_counter_based() -> None:
    first = generator(0, Purpose.LABELLED_PATCH, 5, 1).random(4)
    generator(0, Purpose.LABELLED_PATCH, 5, 2).random(100)  # whatever others draw
    assert np.array_equal(first, generator(0, Purpose.LABELLED_PATCH, 5, 1).random(4))
    keys = list(itertools.product((0, 1), (Purpose.TEACHER, Purpose.STUDENT_LABELLED), (1, 2), (0, 1), (0, 1)))
    assert len({torch_seed(*key) for key in keys}) == len(keys)


def test_torch_generators_are_pass_by_pass() -> None:
    draws = [g.initial_seed() for g in torch_generators(0, Purpose.TEACHER, 3, (4, 6), passes=2)]
    expected = [torch_seed(0, Purpose.TEACHER, 3, slot, number) for number in (0, 1) for slot in (4, 6)]
    assert draws == expected


# Reading


def test_patches_are_the_scan(cohort_path: str) -> None:
    image, label = canonical(0)
    source = reader(cohort_path)
    assert source.shape("a") == image.shape == SHAPE[::-1]
    box = (slice(3, 11), slice(5, 13), slice(2, 10))
    assert np.array_equal(source.image("a", (3, 5, 2), (8, 8, 8)), image[box].astype(np.float32))
    assert np.array_equal(source.label("a", (3, 5, 2), (8, 8, 8)), label[box])


def test_beyond_the_scan_lies_its_minimum(cohort_path: str) -> None:
    """A patch larger than the scan holds all of it, padded on every side."""
    image, label = canonical(0)
    for memory_nbytes in (0, 2**30):
        source = reader(cohort_path, memory_nbytes=memory_nbytes)
        padded = source.image("a", (-2, -3, -4), (24, 28, 30))
        expected = np.pad(image, [(2, 4), (3, 3), (4, 6)], constant_values=image.min()).astype(np.float32)
        assert np.array_equal(padded, expected)
        padded = source.label("a", (-2, -3, -4), (24, 28, 30))
        assert np.array_equal(padded, np.pad(label, [(2, 4), (3, 3), (4, 6)]))
        assert np.unique(source.image("a", (100, 0, 0), (8, 8, 8))).tolist() == [float(image.min())]


@given(
    start=st.tuples(*[st.integers(-12, 30)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    spacing=st.sampled_from([NATIVE, (2.0, 3.0, 2.5)]),
    scan=st.sampled_from(["a", "v"]),
)
def test_with_memory_and_without_are_the_same_numbers(
    cohort_path: str, start: tuple[int, ...], size: tuple[int, ...], spacing: tuple[float, ...], scan: str
) -> None:
    kept, read = READERS.setdefault(
        (cohort_path, spacing), tuple(reader(cohort_path, spacing=spacing, memory_nbytes=n) for n in (2**30, 0))
    )
    assert np.array_equal(kept.image(scan, start, size), read.image(scan, start, size))
    assert np.array_equal(kept.label(scan, start, size), read.label(scan, start, size))


READERS: dict[Any, tuple[PatchReader, ...]] = {}  # hypothesis calls the test many times: keep what was read


def test_memory_is_bounded(cohort_path: str) -> None:
    """Room for one scan's image: the second is read box by box."""
    nbytes = int(np.prod(SHAPE))
    source = reader(cohort_path, memory_nbytes=4 * nbytes)
    for scan in ("a", "b"):
        source.image(scan, (0, 0, 0), (4, 4, 4))
    assert list(source._images) == ["a"]
    assert sum(volume.nbytes for volume in source._images.values()) <= 4 * nbytes


@given(start=st.tuples(*[st.integers(-6, 8)] * 3), size=st.tuples(*[st.integers(1, 9)] * 3))
def test_crop_is_a_crop_of_the_padded(start: tuple[int, ...], size: tuple[int, ...]) -> None:
    volume = np.arange(5 * 4 * 6).reshape(5, 4, 6)
    padded = np.pad(volume, 20, constant_values=-1)
    expected = padded[tuple(slice(s + 20, s + 20 + n) for s, n in zip(start, size, strict=True))]
    assert np.array_equal(crop(volume, start, size, fill=-1), expected)


def test_placement_follows_the_grid(cohort_path: str) -> None:
    """Body and foreground samples lie in body and foreground, on the scan's own grid and on another."""
    image, label = canonical(0)
    placement = reader(cohort_path).placement("a")
    assert (image[tuple(placement.body.T)] > -500).all()
    assert (label[tuple(placement.foreground["hip"].T)] == 1).all()
    assert (label[tuple(placement.foreground["femur"].T)] == 2).all()
    coarse = reader(cohort_path, spacing=(6.0, 4.0, 4.0))
    resampled = coarse.label("a", (0, 0, 0), coarse.shape("a"))
    moved = coarse.placement("a").foreground["hip"]
    assert (moved.max(axis=0) < coarse.shape("a")).all()
    near = [resampled[tuple(slice(max(0, c - 1), c + 2) for c in voxel)] for voxel in moved]
    assert all((patch == 1).any() for patch in near)
    assert reader(cohort_path).placement("u").foreground == {}


# Slots


def test_a_slot_is_the_same_whoever_asks_and_when(cohort_path: str) -> None:
    keys = [(step, slot) for step in (1, 2) for slot in range(4)]

    def look(source: SlotSampler, key: tuple[int, int]) -> tuple[Patch, ...]:
        labelled = source.labelled_patch(*key)
        return labelled, source.unlabelled_patch(*key), source.reference_patch(labelled, *key)

    first = sampler(reader(cohort_path))
    there = {key: look(first, key) for key in keys}
    second = sampler(reader(cohort_path, memory_nbytes=0))
    back = {key: look(second, key) for key in reversed(keys)}
    for key in keys:
        for ours, theirs in zip(there[key], back[key], strict=True):
            assert (ours.scan_id, ours.start) == (theirs.scan_id, theirs.start)
            assert np.array_equal(ours.image, theirs.image)
            assert (ours.label is None) == (theirs.label is None)
            assert ours.label is None or np.array_equal(ours.label, theirs.label)
    images = {patch.image.tobytes() for patches in there.values() for patch in patches}
    assert len(images) == 3 * len(keys)  # and no two are alike
    assert all(patches[1].label is None for patches in there.values())
    other = look(sampler(reader(cohort_path), seed=8), keys[0])
    assert not np.array_equal(other[0].image, there[keys[0]][0].image)


def test_ranks_cut_what_one_would(cohort_path: str) -> None:
    """Slots 0 to 3 on one rank, on two and on four; with the next batch cut in a thread."""

    def feed(slots: tuple[int, ...]) -> Feed:
        return Feed(
            sampler(reader(cohort_path)),
            slots=slots,
            num_classes=3,
            references=ReferencesConfig(k=4, draws=2),
            needs_unlabelled=True,
        )

    alone = list(feed((0, 1, 2, 3)).ahead(1, 2))
    for world_size in (2, 4):
        ranks = [feed(tuple(range(rank, 4, world_size))) for rank in range(world_size)]
        with ThreadPoolExecutor(world_size) as pool:
            shares = list(pool.map(lambda rank: list(rank.ahead(1, 2)), ranks))
        for number, whole in enumerate(alone):
            pieces = [piece for share in shares for piece in share[number].micro_batches(1)]
            joined = collate(sorted(pieces, key=lambda piece: piece.slots))
            assert (joined.slots, joined.scan_ids, joined.step) == (whole.slots, whole.scan_ids, number + 1)
            for (name, ours), (_, theirs) in zip(joined._tensors(), whole._tensors(), strict=True):
                assert torch.equal(ours, theirs), name


def test_batches_round_trip_and_move() -> None:
    from tests.unit.test_methods import batch_of

    whole = batch_of(3, 5)
    pieces = list(whole.micro_batches(2))
    assert [piece.slots for piece in pieces] == [(0, 1), (2, 3), (4,)]
    again = collate(pieces)
    assert again.slots == whole.slots
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again._tensors(), whole._tensors(), strict=True))
    moved = whole.to(torch.device("cpu"), torch.float32)
    assert moved.labelled_image.dtype == torch.float32
    assert (moved.labelled_target.dtype, moved.reference_present.dtype) == (torch.int64, torch.bool)


class Places:
    """A reader whose body, class a and class b lie far apart, so that a patch's start says where it came from."""

    def placement(self, scan_id: str) -> Placement:
        body = np.full((50, 3), 100, np.int32)
        if scan_id == "bare":
            return Placement(body, {})
        return Placement(body, {"a": np.full((900, 3), 1000, np.int32), "b": np.full((1, 3), 2000, np.int32)})

    def image(self, scan_id: str, start: Any, size: Any) -> np.ndarray:
        return np.zeros(size, np.float32)

    def label(self, scan_id: str, start: Any, size: Any) -> np.ndarray:
        return np.zeros(size, np.uint8)


def within(count: int, n: int, p: float) -> bool:
    return abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_shares_of_labelled_patches() -> None:
    """30 % hold foreground, of a class drawn evenly however rare it is; the rest lie in the body; scans evenly."""
    n = 1000
    source = sampler(Places(), labelled=("s", "t"), foreground_share=0.3, augmentation=PLAIN)
    patches = [source.labelled_patch(step, 0) for step in range(n)]
    starts = np.array([patch.start[0] for patch in patches])
    assert within(int((starts > 500).sum()), n, 0.3)
    assert within(int((starts > 1500).sum()), int((starts > 500).sum()), 0.5)
    assert within(sum(patch.scan_id == "s" for patch in patches), n, 0.5)
    # A patch of 8 around voxel c starts at c - 4, give or take a quarter of its size.
    assert set(starts[starts < 500]) == {96}
    assert set(starts[starts > 1500]) == set(range(2000 - 4 - 2, 2000 - 4 + 3))
    bare = sampler(Places(), labelled=("bare",), foreground_share=1.0, augmentation=PLAIN)
    assert bare.labelled_patch(1, 0).start == (96, 96, 96)
    assert bare.reference_patch(bare.labelled_patch(1, 0), 1, 0) is None


def test_unlabelled_patches_lie_in_the_body_or_in_doubt() -> None:
    n = 1000
    source = sampler(Places(), unlabelled=("s",), augmentation=PLAIN)
    assert {source.unlabelled_patch(step, 0).start for step in range(20)} == {(96, 96, 96)}
    centres = {2: [("t", (500, 500, 500)), ("s", (700, 700, 700))], 3: []}
    doubtful = sampler(Places(), unlabelled=("s",), augmentation=PLAIN, doubt_share=0.25, doubt=lambda _: centres[2])
    patches = [doubtful.unlabelled_patch(step, 0) for step in range(n)]
    starts = np.array([patch.start[0] for patch in patches])
    assert set(starts) == {96, *range(494, 499), *range(694, 699)}  # around the centre, give or take a quarter
    assert within(int((starts > 96).sum()), n, 0.25)
    assert within(int((starts > 600).sum()), int((starts > 96).sum()), 0.5)
    assert {patch.scan_id for patch in patches if 96 < patch.start[0] < 600} == {"t"}
    of_step = sampler(Places(), unlabelled=("s",), augmentation=PLAIN, doubt_share=1.0, doubt=centres.__getitem__)
    assert of_step.unlabelled_patch(3, 0).start == (96, 96, 96)  # an empty list: uniform in the body
    assert of_step.unlabelled_patch(2, 0).start[0] > 400


def test_foreground_patches_hold_foreground(cohort_path: str) -> None:
    source = sampler(reader(cohort_path), foreground_share=1.0)
    assert all(source.labelled_patch(step, 0).label.any() for step in range(40))


def test_every_slot_gets_a_surface(cohort_path: str) -> None:
    """With matching on, a labelled patch without a surface is helped out by one of its own scan that has one."""
    feed = Feed(
        sampler(reader(cohort_path), foreground_share=0.0),
        slots=(0, 1, 2, 3),
        num_classes=3,
        references=ReferencesConfig(k=4, draws=2),
        needs_unlabelled=True,
    )
    helped = 0
    for step in range(1, 6):
        batch = feed.batch(step)
        for slot in range(4):
            own = surface_bands(batch.labelled_target[slot].numpy(), 3)
            assert has_surface(batch.reference_present[slot].numpy())
            same = torch.equal(batch.reference_image[slot], batch.labelled_image[slot])
            assert same == bool(own[0].any())
            helped += not same
            if same:
                for value in range(3):
                    index = batch.reference_index[slot, value].numpy()
                    assert not batch.reference_present[slot, value] or own[value].flat[index].all()
    assert helped > 0


def test_without_surface_none_leaves_the_slot_without_references(cohort_path: str) -> None:
    """xie2024, to the letter: the labelled patch alone serves its partner."""
    settings = train_config(cohort="c", run="r", preset="xie2024").references
    assert settings.without_surface == "none"
    feed = Feed(
        sampler(reader(cohort_path), foreground_share=0.0),
        slots=tuple(range(8)),
        num_classes=3,
        references=settings,
        needs_unlabelled=True,
    )
    batches = [feed.batch(step) for step in range(1, 4)]
    assert all(torch.equal(batch.reference_image, batch.labelled_image) for batch in batches)
    shown = [has_surface(present.numpy()) for batch in batches for present in batch.reference_present]
    assert 0 < sum(shown) < len(shown)


def test_hidden_truth_is_open_to_diagnostics_alone(cohort_path: str) -> None:
    arguments = {"slots": (0, 1), "num_classes": 3, "references": None, "needs_unlabelled": True}
    source = sampler(reader(cohort_path), unlabelled=("f", "u"))
    closed = Feed(source, **arguments)
    opened = Feed(source, **arguments, truth_of=frozenset(LABELLED))
    known = 0
    for step in range(1, 9):
        batch, with_truth = closed.batch(step), opened.batch(step)
        assert batch.hidden_target is None
        assert torch.equal(batch.unlabelled_image, with_truth.unlabelled_image)
        for slot, ids in enumerate(batch.scan_ids):
            truth = with_truth.hidden_target[slot].numpy()
            if ids.endswith("+u"):
                assert (truth == -1).all()  # there is none
            else:
                patch = source.unlabelled_patch(step, slot, with_label=True)
                assert np.array_equal(truth, patch.label)
                known += 1
    assert 0 < known < 16


# Augmentation


def test_flips_by_hand() -> None:
    """Image and label flip together, each axis in half of the draws; contrast and brightness touch the image alone."""
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    label = image.astype(np.uint8)
    seen = set()
    for seed in range(100):
        augmented, moved = Augmentation((0, 1, 2), 0.0, 0.0)(image, label, np.random.default_rng(seed))
        assert np.array_equal(augmented, moved)
        seen.add(augmented.tobytes())
    assert len(seen) == 8
    scaled, same = Augmentation((), 0.1, 0.2)(image, label, np.random.default_rng(0))
    slope, offset = np.polyfit(image.ravel(), scaled.ravel(), 1)
    assert 0.9 <= slope <= 1.1
    assert -0.2 <= offset <= 0.2
    assert (slope, offset) != (1.0, 0.0)
    assert np.array_equal(same, label)


def test_draws_are_the_same_with_and_without_a_label() -> None:
    image = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    for seed in range(8):
        with_label, _ = EVERY(image, np.zeros((4, 4, 4), np.uint8), np.random.default_rng(seed))
        without, nothing = EVERY(image, None, np.random.default_rng(seed))
        assert nothing is None
        assert np.array_equal(with_label, without)


def test_a_left_right_flip_swaps_sides() -> None:
    """METHOD trap 8. Left hip 1 and right hip 2 change names when X flips, and only then."""
    label = np.zeros((1, 1, 4), np.uint8)
    label[..., 0], label[..., 3] = 1, 2
    image = label.astype(np.float32)
    flipping = Augmentation((LEFT_RIGHT,), 0.0, 0.0, swap=((1, 2),))
    results = [flipping(image, label, np.random.default_rng(seed)) for seed in range(20)]
    flipped = [augmented[0, 0, 0] == 2 for augmented, _ in results]
    assert 0 < sum(flipped) < 20
    assert all(np.array_equal(moved, label) for _, moved in results)  # the left hip is on the left either way
    upside_down = Augmentation((0, 1), 0.0, 0.0, swap=((1, 2),))
    assert all(np.array_equal(upside_down(image, label, np.random.default_rng(s))[1], label) for s in range(20))


@pytest.mark.parametrize(
    ("name", "lateral"),
    [
        ("hip_left", True),
        ("Right femur", True),
        ("kidney_l", True),
        ("parotid-R", True),
        ("mandible", False),
        ("bright_spot", False),
        ("cleft", False),
        ("liver", False),
    ],
)
def test_lateral_names(name: str, lateral: bool) -> None:
    assert lateral_classes(["background", name]) == ([name] if lateral else [])


def flips(names: list[str], **overrides: Any) -> tuple[Any, ...]:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return _flips(train_config(cohort="c", run="r", overrides=keys), ["background", *names])


def test_which_axes_flip() -> None:
    assert flips(["hip"]) == ((), (), None)
    assert flips(["hip"], augment__flip="left_right") == ((2,), (), None)
    assert flips(["hip"], augment__flip="all") == ((0, 1, 2), (), None)
    assert flips(["hip"], augment__flip="none") == ((), (), None)
    assert flips(["hip_left", "hip_right"], augment__flip="left_right")[0] == ()
    axes, swap, note = flips(["hip_left", "hip_right"], augment__flip="all")
    assert (axes, swap) == ((0, 1), ())
    assert note.startswith("left-right flips are off: hip_left, hip_right have a side")
    pairs = [["hip_left", "hip_right"]]
    swapped = flips(["hip_left", "hip_right"], augment__flip="left_right", data__mirror_pairs=pairs)
    assert swapped == ((2,), ((1, 2),), None)
    with pytest.raises(ConfigError, match=r"data\.mirror_pairs: classes swap under a flip, and flips are off"):
        flips(["hip_left", "hip_right"], data__mirror_pairs=pairs)
    with pytest.raises(ConfigError, match=r"data\.mirror_pairs: not a pair of classes \(got \['hip_left', 'hipp'\]\)"):
        flips(["a", "b"], augment__flip="all", data__mirror_pairs=[["hip_left", "hipp"]])


# Intensity


def test_ct_by_hand() -> None:
    """Foreground 0, 1, ..., 1000: percentiles .5 and 99.5 are 5 and 995. Clipped, its mean is 500. Its variance is
    that of 5, 6, ..., 995 with five more at each end: (2 sum_{d=1}^{495} d^2 + 10 x 495^2) / 1001, where the sum is
    495 x 496 x 991 / 6 = 40 551 720: 83 553 690 / 1001 = 83 470.219780; sd 288.912131.
    """
    values = [np.arange(0, 500, dtype=np.float32), np.arange(500, 1001, dtype=np.float32)]
    intensity = Intensity.of_training_foreground("CT", values)
    assert (intensity.kind, intensity.low, intensity.high) == ("ct", 5.0, 995.0)
    assert intensity.mean == pytest.approx(500.0)
    assert intensity.sd == pytest.approx(288.912131, abs=1e-5)
    scan = np.array([-1000, 5, 500, 788.912131, 3000])
    normalised = intensity.normalise(scan, nonzero_mean=9e9, nonzero_sd=9e9)  # the scan's statistics have no part
    assert normalised.dtype == np.float32
    assert normalised.tolist() == pytest.approx([-1.713323, -1.713323, 0.0, 1.0, 1.713323], abs=1e-5)
    assert scan[0] == -1000  # the input is left alone


def test_other_modalities_by_hand() -> None:
    """MR: by the scan's own nonzero voxels; mean 200, sd 50: 100 -> -2, 250 -> 1."""
    intensity = Intensity.of_training_foreground("MR", [])
    assert intensity.kind == "per_scan"
    normalised = intensity.normalise(np.array([100, 250], np.int16), nonzero_mean=200, nonzero_sd=50)
    assert normalised.tolist() == [-2.0, 1.0]
    flat = intensity.normalise(np.array([7, 7], np.int16), nonzero_mean=7, nonzero_sd=0)
    assert flat.tolist() == [0.0, 0.0]


def test_constant_foreground_does_not_divide_by_zero() -> None:
    intensity = Intensity.of_training_foreground("CT", [np.full(10, 300, np.float32)])
    out = intensity.normalise(np.array([0, 300, 900]), nonzero_mean=0, nonzero_sd=1)
    assert out.tolist() == [0.0, 0.0, 0.0]


def test_references_are_drawn_by_key(cohort_path: str) -> None:
    """Slot 1's references do not depend on which other slots the rank has."""
    arguments = {"num_classes": 3, "references": ReferencesConfig(k=4, draws=2), "needs_unlabelled": True}
    together = Feed(sampler(reader(cohort_path)), slots=(0, 1), **arguments).batch(4)
    alone = Feed(sampler(reader(cohort_path)), slots=(1,), **arguments).batch(4)
    assert torch.equal(together.reference_index[1:], alone.reference_index)
    assert alone.reference_index.shape == (1, 3, 8)


def test_training_touches_patches_alone(cohort_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for volumes, no read of any step is larger than the patch, and unlabelled scans' labels are not
    opened: positions come from stored samples."""
    reads: list[tuple[str, tuple[int, ...]]] = []
    read = StoredArray.__getitem__

    def noted(self: StoredArray, selection: Any, /) -> np.ndarray:
        values = read(self, selection)
        if "/samples/" not in self.path:
            reads.append((self.path, values.shape))
        return values

    monkeypatch.setattr(StoredArray, "__getitem__", noted)
    source = sampler(reader(cohort_path, memory_nbytes=0), patch_zyx=(6, 5, 4))
    for step in range(1, 30):
        source.labelled_patch(step, 0)
        source.unlabelled_patch(step, 0)
    assert len(reads) > 60
    assert all(n <= most for _, shape in reads for n, most in zip(shape, (6, 5, 4), strict=True))
    opened = {path.split("/")[-4] for path, _ in reads if path.endswith("labels/annotation/0")}
    assert opened
    assert opened <= set(LABELLED)
