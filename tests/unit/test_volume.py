"""Orientation against the affine itself; resampling against scipy and against its own whole-volume result."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from distseg.data.nifti import read_nifti, write_nifti
from distseg.data.volume import SAME_GRID_VOXELS, Geometry, NativeGrid, Volume, resample_box, target_geometry
from distseg.errors import InputError
from distseg.evaluation.metrics import score_class

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def axis_aligned(permutation: tuple[int, ...], signs: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """Native axis i runs along world axis permutation[i], with signs[i], spacing[i] millimetres a voxel."""
    affine = np.eye(4)
    affine[:3, :3] = 0.0
    for native, (world, sign) in enumerate(zip(permutation, signs, strict=True)):
        affine[world, native] = sign * spacing[native]
    affine[:3, 3] = (-17.0, 5.5, 230.25)
    return affine


def check_round_trip_and_positions(shape: tuple[int, int, int], affine: np.ndarray) -> NativeGrid:
    native = NativeGrid(shape, affine)
    # Each voxel's value is its own native index, so that canonical voxels can be traced back.
    array = np.arange(np.prod(shape)).reshape(shape)
    canonical = native.to_canonical(array)
    assert canonical.shape == native.geometry.shape
    assert np.array_equal(native.from_canonical(canonical), array)
    zyx = np.argwhere(canonical >= 0)  # every voxel
    ijk = np.stack(np.unravel_index(canonical[tuple(zyx.T)], shape), axis=1)
    ones = np.ones((len(zyx), 1))
    from_file = RAS_TO_LPS @ affine @ np.hstack([ijk, ones]).T
    from_canonical = native.geometry.affine @ np.hstack([zyx, ones]).T
    assert np.allclose(from_file, from_canonical, rtol=0, atol=1e-9)
    return native


@pytest.mark.parametrize(("permutation", "signs"), ORIENTATIONS)
def test_every_axis_code_round_trips_and_points_to_left_posterior_superior(
    permutation: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    native = check_round_trip_and_positions((3, 4, 5), axis_aligned(permutation, signs, (0.7, 1.5, 3.0)))
    spacing_of_world = {world: (0.7, 1.5, 3.0)[axis] for axis, world in enumerate(permutation)}
    expected = np.zeros((3, 3))
    expected[2, 0], expected[1, 1], expected[0, 2] = (spacing_of_world[w] for w in (2, 1, 0))  # all positive: LPS+
    assert np.allclose(native.geometry.affine[:3, :3], expected)
    assert np.allclose(native.geometry.spacing_mm, np.diag(expected[::-1]))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    rotation=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    mirrored=st.booleans(),
)
def test_every_oblique_affine_round_trips_and_keeps_positions(
    shape: tuple[int, int, int], rotation: tuple[float, ...], spacing: tuple[float, ...], mirrored: bool
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix() * np.array(spacing)
    if mirrored:
        affine[:3, 0] *= -1
    affine[:3, 3] = (12.0, -3.0, 100.0)
    native = check_round_trip_and_positions(shape, affine)
    assert sorted(native.geometry.spacing_mm) == pytest.approx(sorted(spacing))
    assert np.array_equal(NativeGrid.from_json(native.to_json()).affine, affine)


@st.composite
def native_grids(draw: st.DrawFn) -> NativeGrid:
    """Any of the 48 axis codes, turned by up to 30 degrees or sheared, any voxel size and origin."""
    permutation, signs = draw(st.sampled_from(ORIENTATIONS))
    spacing = draw(st.tuples(*[st.floats(0.4, 5.0)] * 3))
    affine = axis_aligned(permutation, signs, spacing)
    turn = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-30, 30)] * 3)), degrees=True).as_matrix()
    shear = np.eye(3)
    shear[1, 2] = draw(st.floats(-0.3, 0.3))
    affine[:3, :3] = turn @ shear @ affine[:3, :3]
    affine[:3, 3] = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return NativeGrid(draw(st.tuples(*[st.integers(3, 7)] * 3)), affine)


def resampled(volume: Volume, spacing_mm: tuple[float, ...], order: int) -> tuple[np.ndarray, Geometry]:
    target = target_geometry(volume.geometry, spacing_mm)
    array = resample_box(
        volume.array,
        source_spacing_mm=volume.geometry.spacing_mm,
        target_spacing_mm=spacing_mm,
        start_zyx=(0, 0, 0),
        size_zyx=target.shape,
        order=order,
        fill=0,
    )
    return array, target


@settings(max_examples=100)
@given(
    native=native_grids(), spacing=st.tuples(*[st.floats(0.5, 6.0)] * 3), suffix=st.sampled_from([".nii", ".nii.gz"])
)
def test_a_place_in_mm_survives_file_orientation_and_resampling(
    tmp_path_factory: pytest.TempPathFactory, native: NativeGrid, spacing: tuple[float, ...], suffix: str
) -> None:
    """Each voxel holds a linear function of its own place, so linear interpolation has no error: written to a file,
    read, brought to canonical axes and resampled, a voxel still holds the function of where it says it is."""
    for n, new, old in zip(native.geometry.shape, spacing, native.geometry.spacing_mm, strict=True):
        assume(not 0 < abs(new / old - 1) * n < 2 * SAME_GRID_VOXELS)  # nearly equal spacings are taken as equal
    slope = np.array([0.7, -1.3, 0.4])
    index = np.indices(native.shape).reshape(3, -1)
    ras = native.affine[:3, :3] @ index + native.affine[:3, 3:]
    path = tmp_path_factory.mktemp("grid") / f"x{suffix}"
    write_nifti(path, (slope @ ras).reshape(native.shape).astype(np.float64), native)
    volume = read_nifti(path)
    check_values_are_of_their_place(volume.array, volume.geometry, slope)
    array, geometry = resampled(volume, spacing, order=1)
    inside = []  # of the outer voxels' centres: beyond them the edge voxel is held
    for n_new, n_old, new, old in zip(
        array.shape, volume.array.shape, spacing, volume.geometry.spacing_mm, strict=True
    ):
        position = (np.arange(n_new) + 0.5) * new / old - 0.5
        inside.append((position >= 0) & (position <= n_old - 1))
    check_values_are_of_their_place(array, geometry, slope, np.ix_(*inside))


def check_values_are_of_their_place(
    array: np.ndarray, geometry: Geometry, slope: np.ndarray, where: tuple[np.ndarray, ...] | None = None
) -> None:
    lps = geometry.affine[:3, :3] @ np.indices(array.shape).reshape(3, -1) + geometry.affine[:3, 3:]
    expected = (slope * [-1, -1, 1] @ lps).reshape(array.shape)
    # float32 holds values up to 1000 to 6e-5, and the file's affine is float32 too.
    assert np.allclose(array[where or ...], expected[where or ...], rtol=0, atol=2e-3)


@settings(max_examples=50)
@given(native=native_grids(), seed=st.integers(0, 99), spacing=st.tuples(*[st.sampled_from([1.0, 2.0, 3.7])] * 3))
def test_a_scan_stored_in_another_orientation_is_the_same_volume(
    native: NativeGrid, seed: int, spacing: tuple[float, ...]
) -> None:
    """The array with its axes permuted and reversed, the affine to match: image, resampled image and scores are the
    same to the last bit but for the affine's rounding."""
    rng = np.random.default_rng(seed)
    axes, flips = rng.permutation(3), rng.random(3) < 0.5
    arrays = [rng.integers(-1000, 1000, native.shape).astype(np.int16)]
    arrays += [(rng.random(native.shape) < share).astype(np.int16) for share in (0.3, 0.4)]
    turn = np.zeros((4, 4))  # index of the other storage (and 1) -> native index
    turn[3, 3] = 1
    for new, old in enumerate(axes):
        turn[old, new] = -1 if flips[new] else 1
        turn[old, 3] = native.shape[old] - 1 if flips[new] else 0
    other = NativeGrid(tuple(native.shape[old] for old in axes), native.affine @ turn)
    turned = [np.flip(array.transpose(axes), np.flatnonzero(flips)) for array in arrays]
    one = [Volume(native.to_canonical(array), native.geometry, native, "CT") for array in arrays]
    two = [Volume(other.to_canonical(array), other.geometry, other, "CT") for array in turned]
    assert np.allclose(one[0].geometry.affine, two[0].geometry.affine, rtol=0, atol=1e-9)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.array, b.array)
    assert np.allclose(resampled(one[0], spacing, 1)[0], resampled(two[0], spacing, 1)[0], rtol=0, atol=1e-3)
    if one[1].array.any() and one[2].array.any():
        scores = [score_class(v[1].array > 0, v[2].array > 0, spacing_mm=v[0].geometry.spacing_mm) for v in (one, two)]
        assert (scores[0].iou, scores[0].dice) == (scores[1].iou, scores[1].dice)
        assert (scores[0].hd95_mm, scores[0].asd_mm) == pytest.approx((scores[1].hd95_mm, scores[1].asd_mm), abs=1e-9)


def test_array_of_another_shape_is_refused() -> None:
    native = NativeGrid((3, 4, 5), np.eye(4))
    with pytest.raises(InputError, match=r"does not fit the grid \(got \(5, 4, 3\)\); the native shape is \(3, 4, 5\)"):
        native.to_canonical(np.zeros((5, 4, 3)))


def geometry(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Geometry:
    return NativeGrid(shape[::-1], np.diag([*spacing[::-1], 1.0])).geometry


def test_target_geometry_by_hand() -> None:
    # 10 voxels of 2 mm at 4 mm: 5 voxels; the first centre moves from 1 mm inside the edge to 2 mm inside: +1 mm.
    old = geometry((10, 10, 3), (2.0, 2.0, 2.0))
    new = target_geometry(old, (4.0, 2.0, 100.0))
    assert new.shape == (5, 10, 1)  # 3 voxels at 100 mm: never less than one
    assert new.spacing_mm == (4.0, 2.0, 100.0)
    moved = new.affine[:3, 3] - old.affine[:3, 3]
    assert moved == pytest.approx([49.0, 0.0, 1.0])  # x, y, z
    edge = np.array([-0.5, -0.5, -0.5, 1.0])
    assert new.affine @ edge == pytest.approx(old.affine @ edge)
    assert np.array_equal(Geometry.from_json(new.to_json()).affine, new.affine)


SHAPES = st.tuples(*[st.integers(1, 9)] * 3)
SPACINGS = st.tuples(*[st.sampled_from([0.5, 1.0, 1.3, 2.0, 3.906])] * 3)


@settings(deadline=None, max_examples=150)
@given(
    shape=SHAPES,
    old=SPACINGS,
    new=SPACINGS,
    start=st.tuples(*[st.integers(-5, 12)] * 3),
    size=st.tuples(*[st.integers(1, 8)] * 3),
    order=st.sampled_from([0, 1]),
)
def test_a_box_is_the_crop_of_the_whole(
    shape: tuple[int, int, int],
    old: tuple[float, float, float],
    new: tuple[float, float, float],
    start: tuple[int, int, int],
    size: tuple[int, int, int],
    order: int,
) -> None:
    source = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    common = {"source_spacing_mm": old, "target_spacing_mm": new, "order": order, "fill": -7}
    full = target_geometry(geometry(shape, old), new).shape
    whole = resample_box(source, start_zyx=(0, 0, 0), size_zyx=full, **common)
    padded = np.pad(whole, [(5, 25)] * 3, constant_values=-7)
    expected = padded[tuple(slice(s + 5, s + 5 + n) for s, n in zip(start, size, strict=True))]
    box = resample_box(source, start_zyx=start, size_zyx=size, **common)
    assert box.dtype == (np.float32 if order else np.int16)
    assert np.array_equal(box, expected)
    if old == new:
        assert np.array_equal(whole, source)


def test_linear_and_nearest_against_scipy() -> None:
    source = np.random.default_rng(1).normal(size=(7, 8, 9)).astype(np.float32)
    old, new = (2.5, 3.906, 1.0), (3.0, 2.0, 1.7)
    shape = target_geometry(geometry(source.shape, old), new).shape
    index = np.indices(shape).reshape(3, -1)
    position = (index + 0.5) * (np.array(new) / old)[:, None] - 0.5
    for order in (0, 1):
        expected = ndimage.map_coordinates(source, position, order=order, mode="nearest").reshape(shape)
        got = resample_box(
            source,
            source_spacing_mm=old,
            target_spacing_mm=new,
            start_zyx=(0, 0, 0),
            size_zyx=shape,
            order=order,
            fill=0,
        )
        assert np.allclose(got, expected, rtol=0, atol=1e-5)


def test_a_linear_ramp_in_mm_stays_one_inside_the_edges() -> None:
    ramp = np.broadcast_to(np.arange(20.0)[:, None, None] * 2.0, (20, 2, 2))  # value = mm from the first centre
    got = resample_box(
        ramp,
        source_spacing_mm=(2.0, 1, 1),
        target_spacing_mm=(3.0, 1, 1),
        start_zyx=(0, 0, 0),
        size_zyx=(13, 2, 2),
        order=1,
        fill=0,
    )
    assert got[:, 0, 0] == pytest.approx(np.arange(13) * 3.0 + 0.5)  # the first centre is 0.5 mm further in


def test_only_the_needed_region_is_read() -> None:
    class Recorder:
        shape, dtype = (100, 100, 100), np.dtype(np.int16)
        asked: tuple[slice, ...] = ()

        def __getitem__(self, selection: tuple[slice, ...]) -> np.ndarray:
            self.asked = selection
            return np.zeros([s.stop - s.start for s in selection], np.int16)

    source = Recorder()
    resample_box(
        source,
        source_spacing_mm=(1, 1, 1),
        target_spacing_mm=(2, 1, 1),
        start_zyx=(10, 20, -5),
        size_zyx=(4, 4, 8),
        order=1,
        fill=0,
    )
    # z: (10 + 0.5) * 2 - 0.5 = 20.5 .. 26.5 -> voxels 20 .. 27; y as it is; x: only the 3 voxels inside
    assert source.asked == (slice(20, 28), slice(20, 24), slice(0, 3))


def test_unknown_order_is_refused() -> None:
    with pytest.raises(InputError, match=r"order: unknown interpolation \(got 3\)"):
        resample_box(
            np.zeros((2, 2, 2)),
            source_spacing_mm=(1, 1, 1),
            target_spacing_mm=(1, 1, 1),
            start_zyx=(0, 0, 0),
            size_zyx=(2, 2, 2),
            order=3,
            fill=0,
        )
