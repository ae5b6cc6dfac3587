"""Slab by slab is the whole at once: narrowest types, checks, statistics, classes; against plain numpy."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distseg.data import values
from distseg.data.nifti import read_nifti
from distseg.data.regions import box_and_voxels, count_by_plane
from distseg.data.values import INT16_OR_FLOAT, Narrowest, distinct, fits_int16, is_whole, nonzero_mean_and_sd, slabs
from distseg.errors import DataError

SHAPE = (7, 6, 9)  # native


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "SLAB_VOXELS", 100)


def array_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 200, SHAPE)
    if kind in ("negative last", "wide last", "half last"):
        array[..., -1] = {"negative last": -3, "wide last": 40000, "half last": 0}[kind]
    return array + 0.5 * (np.arange(9) == 8) if kind == "half last" else array


@pytest.mark.parametrize(
    ("kind", "stored_as", "slope", "narrowest"),
    [
        ("small", np.uint8, None, np.uint8),
        ("small", np.float64, None, np.uint8),
        ("small", np.int16, (1.0, -1024.0), np.int16),  # what scanners write: whole after scaling
        ("small", np.int16, (0.5, 0.0), np.float32),
        ("negative last", np.int32, None, np.int16),  # widens on the last slab
        ("wide last", np.int32, None, np.float32),
        ("half last", np.float64, None, np.float32),
    ],
)
@pytest.mark.parametrize("codes", ["RAS", "PIL", "LSA"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_is_read_into_the_narrowest_type(
    tmp_path: Path,
    kind: str,
    stored_as: type,
    slope: tuple[float, float] | None,
    narrowest: type,
    codes: str,
    ending: str,
) -> None:
    array = array_of(kind)
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), SHAPE)
    content = bytearray(nib.Nifti1Image(array.astype(stored_as), affine).to_bytes())
    if slope:
        content[112:120] = struct.pack("<2f", *slope)  # scl_slope, scl_inter: nibabel would choose its own
    (tmp_path / f"a{ending}").write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    volume = read_nifti(tmp_path / f"a{ending}")
    truth = volume.native.to_canonical(np.asanyarray(nib.load(tmp_path / f"a{ending}").dataobj))
    assert volume.array.dtype == narrowest
    assert volume.array.flags.c_contiguous
    assert np.array_equal(volume.array, truth.astype(narrowest))


def test_bad_voxels_of_all_slabs_are_counted(tmp_path: Path) -> None:
    array = np.zeros(SHAPE, np.float32)
    array[0, 0, 0], array[1, 2, 8] = np.nan, np.inf
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=r"a\.nii\.gz: NaN or infinite voxels \(got 2\)"):
        read_nifti(tmp_path / "a.nii.gz")


@given(
    parts=st.lists(
        hnp.arrays(
            st.sampled_from([np.uint8, np.int16, np.int32, np.float32]), (2, 3),
            elements=st.sampled_from([0, 1, 200]) | st.integers(0, 255),
        ),
        min_size=1, max_size=4,
    ),
    extra=st.sampled_from([0, -1, 300, 40000, 0.5]),
)  # fmt: skip
def test_widening_keeps_every_value(parts: list[np.ndarray], extra: float) -> None:
    parts = [*parts, np.full((2, 3), extra)]
    kept = Narrowest((len(parts) * 2, 3))
    for number, part in enumerate(parts):
        kept.put((slice(2 * number, 2 * number + 2),), part)
    assert np.array_equal(kept.array, np.concatenate(parts).astype(np.float32))
    wide = Narrowest((2, 3), INT16_OR_FLOAT)
    wide.put((slice(0, 2),), parts[0])
    assert wide.array.dtype == (np.int16 if fits_int16(parts[0]) else np.float32)


@given(hnp.arrays(st.sampled_from([np.int16, np.float32, np.uint8]), (5, 11, 7), elements=st.integers(0, 4)))
def test_slabwise_checks_and_statistics(array: np.ndarray) -> None:
    for order in (array, array.transpose(2, 1, 0)[::-1]):
        assert np.array_equal(distinct(order), np.unique(array))
        assert is_whole(order)
        assert fits_int16(order)
    nonzero = array[array != 0].astype(np.float64)
    assert nonzero_mean_and_sd(array) == pytest.approx((nonzero.mean(), nonzero.std()) if nonzero.size else (0, 0))
    assert not fits_int16(array.astype(np.float32) + np.float32(0.25))
    assert not is_whole(array.astype(np.float32) + np.float32(0.25))
    assert [part.start for part in slabs((5, 11, 7))] == [0, 1, 2, 3, 4]


@given(label=hnp.arrays(np.uint8, (4, 5, 6), elements=st.integers(0, 3)), seed=st.integers(0, 100))
def test_classes_against_argwhere(label: np.ndarray, seed: int) -> None:
    counts = count_by_plane(label)
    for value in range(1, 4):
        where = np.argwhere(label == value)
        assert counts[:, value].sum() == len(where)
        if len(where):
            ranks = np.sort(np.random.default_rng(seed).choice(len(where), min(len(where), 7), replace=False))
            box, voxels = box_and_voxels(label, value, counts[:, value], ranks)
            assert box == [where.min(0).tolist(), (where.max(0) + 1).tolist()]
            assert np.array_equal(voxels, where[ranks])
