"""Components of masks that come in slabs against scipy's of the whole volume."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from distseg.evaluation.metrics import largest_component
from distseg.inference.components import TOUCHING, Components, LargestAgain
from distseg.inference.islands import remove_islands

# From single voxels to one piece with holes; near .1 components of all sizes meet late.
DENSITIES = st.sampled_from([0.02, 0.06, 0.1, 0.15, 0.3, 0.8])


def worm(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """A thin random walk: what is far apart in one plane is one piece by way of another."""
    rng, mask = np.random.default_rng(seed), np.zeros(shape, bool)
    at = np.asarray([rng.integers(n) for n in shape])
    for _ in range(60):
        mask[tuple(at)] = True
        at = np.clip(at + rng.integers(-1, 2, 3), 0, np.asarray(shape) - 1)
    return mask


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)),
    density=DENSITIES,
    worms=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 11), max_size=11),
)
def test_slabs_are_the_volume(seed: int, shape: tuple[int, int, int], density: float, worms: int, cuts: list) -> None:
    """Count, size and the very voxels of the largest, ties included, however the volume is cut."""
    mask = np.random.default_rng(seed).random(shape) < density
    for number in range(worms):
        mask |= worm(seed + number, shape)
    bounds = sorted({0, shape[0], *(cut for cut in cuts if cut < shape[0])})
    components = Components()
    for a, b in itertools.pairwise(bounds):
        components.add(mask[a:b])
    expected, (_, count) = largest_component(mask), ndimage.label(mask, structure=TOUCHING)
    assert components.count == count
    assert components.largest_share == expected.sum() / max(1, mask.sum())
    again = LargestAgain(components)
    np.testing.assert_array_equal(
        np.concatenate([again.take(mask[a:b]) for a, b in itertools.pairwise(bounds)]), expected
    )


@pytest.mark.parametrize("density", [0.05, 0.12])
def test_memory_is_a_slabs_whatever_the_pieces(density: float) -> None:
    """Single voxels mostly, or one piece with many ends: of none of them a number is kept. A list entry a piece, as it
    was, took 1.2 bytes a voxel."""

    def peak(depth: int) -> int:
        """Beside the mask itself."""
        rng = np.random.default_rng(0)
        mask = np.stack([rng.random((96, 96)) < density for _ in range(depth)]).astype(np.uint8)
        tracemalloc.start()
        for _ in remove_islands(mask, values=(1,)):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(16)
    assert peak(160) - peak(48) < 0.03 * (160 - 48) * 96 * 96
