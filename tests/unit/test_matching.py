"""Matching: surface bands against scipy, draws inside them, prototypes against the average they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from distseg.config.schema import MatchingConfig, MethodConfig
from distseg.data.keys import Purpose, generator
from distseg.losses.similarity_entropy import similarity_entropy
from distseg.matching.prototypes import NO_REFERENCES, class_prototypes, prototype_similarity
from distseg.matching.surface import draw_references, has_surface, surface_bands
from distseg.methods.base import Targets
from distseg.methods.embedding_matching import EmbeddingMatching
from distseg.networks.unet import NetworkOutput

CUBE = (2, 2, 2)
F64 = torch.float64
SIX_NEIGHBOURS = ndimage.generate_binary_structure(3, 1)


def random_label(seed: int, num_classes: int, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    """Blobs rather than noise, so that some voxels are deep inside."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.0)
    edges = np.quantile(noise, np.linspace(0.4, 1, num_classes)[:-1])
    return np.digitize(noise, edges).astype(np.uint8)


# Surface bands


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 4))
def test_bands_are_scipys(seed: int, num_classes: int) -> None:
    """Inside: the mask minus its 6-neighbour erosion; outside: the dilation minus the mask. Beyond the patch nothing
    is known, so its border is no surface."""
    label = random_label(seed, num_classes)
    bands = surface_bands(label, num_classes)
    foreground = label > 0
    assert np.array_equal(bands[0], ndimage.binary_dilation(foreground, SIX_NEIGHBOURS) & ~foreground)
    for value in range(1, num_classes):
        mask = label == value
        eroded = ndimage.binary_erosion(mask, SIX_NEIGHBOURS, border_value=1)
        assert np.array_equal(bands[value], mask & ~eroded)


def test_bands_of_a_plane_by_hand() -> None:
    """Planes 0 and 1 of four are bone: just inside is plane 1, just outside plane 2."""
    label = np.zeros((4, 3, 3), np.uint8)
    label[:2] = 1
    outside, inside = surface_bands(label, 2)
    assert np.flatnonzero(outside.any((1, 2))).tolist() == [2]
    assert np.flatnonzero(inside.any((1, 2))).tolist() == [1]
    assert outside[2].all()
    assert inside[1].all()


@pytest.mark.parametrize("value", [0, 1])
def test_uniform_patches_have_no_surface(value: int) -> None:
    bands = surface_bands(np.full((4, 4, 4), value, np.uint8), 2)
    index, present = draw_references(bands, k=3, draws=2, generator=np.random.default_rng(0))
    assert not any(band.any() for band in bands)
    assert index.tolist() == [[0] * 6] * 2
    assert present.tolist() == [False, False]
    assert not has_surface(present)


@given(seed=st.integers(0, 10_000), inside=st.floats(0.5, 9), outside=st.floats(0.5, 9))
def test_bands_in_mm_are_brute_force(seed: int, inside: float, outside: float) -> None:
    """Voxels at most so far, centre to centre, from the other side; and the 6-neighbours in any case."""
    spacing = (3.0, 1.0, 2.0)
    label = random_label(seed, 2, (4, 5, 4))
    points = np.argwhere(np.ones_like(label)) * spacing
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    mask = label.ravel() > 0
    bands = surface_bands(label, 2, spacing_mm=spacing, inside_mm=inside, outside_mm=outside)
    for band, one_voxel, side, width in zip(
        bands, surface_bands(label, 2), (~mask, mask), (outside, inside), strict=True
    ):
        near = side & (distance[:, ~side].min(1, initial=np.inf) <= width)
        assert np.array_equal(band.ravel(), near | one_voxel.ravel())


def test_touching_classes_have_an_inner_band_towards_each_other() -> None:
    label = np.repeat(np.array([1, 1, 2, 2], np.uint8), 9).reshape(4, 3, 3)
    outside, one, two = surface_bands(label, 3)
    assert not outside.any()
    assert np.flatnonzero(one.any((1, 2))).tolist() == [1]
    assert np.flatnonzero(two.any((1, 2))).tolist() == [2]
    assert not has_surface(np.array([False, True, True]))  # nothing just outside


# References


@given(seed=st.integers(0, 10_000), k=st.integers(1, 40), draws=st.integers(1, 4))
def test_references_lie_in_their_bands(seed: int, k: int, draws: int) -> None:
    label = random_label(seed, 3)
    bands = surface_bands(label, 3)
    key = (seed, Purpose.REFERENCES, 3, 1)
    index, present = draw_references(bands, k=k, draws=draws, generator=generator(*key))
    assert index.shape == (3, draws * k)
    for row, band in enumerate(bands):
        assert present[row] == band.any()
        if not band.any():
            continue
        assert band.flat[index[row]].all()
        for draw in index[row].reshape(draws, k):  # without replacement where there are enough
            assert len(set(draw.tolist())) == k if band.sum() >= k else len(set(draw.tolist())) <= band.sum()
    again, _ = draw_references(bands, k=k, draws=draws, generator=generator(*key))
    assert np.array_equal(index, again)


def test_draws_are_fresh_and_even() -> None:
    band = np.zeros((4, 4, 4), bool)
    band[1, :2] = True  # 8 voxels
    index, _ = draw_references([band], k=4, draws=2000, generator=np.random.default_rng(0))
    draws = index.reshape(2000, 4)
    assert len({tuple(sorted(draw)) for draw in draws.tolist()}) == math.comb(8, 4)  # every subset is seen
    # Each voxel is in half the draws: 1000 +- 5 sd of sqrt(2000 / 4) = 22.
    assert np.abs(np.bincount(draws.ravel(), minlength=64)[np.flatnonzero(band)] - 1000).max() < 112


# Prototypes and Eq 3


def hand_case() -> tuple[Tensor, Tensor, Tensor]:
    """References: two just outside, (0, 2) and (0, 5); two just inside, (3, 4) and (3, -4). Unit: (0, 1), (0, 1) and
    (.6, .8), (.6, -.8). Prototypes: (0, 1) and (.6, 0). Queries: eight voxels.

    Returns teacher embeddings [1, 2, 2, 2, 2], reference index [1, 2, 2], queries [1, 2, 2, 2, 2].
    """
    teacher = torch.zeros(1, 2, 8, dtype=F64)
    teacher[0, :, :4] = torch.tensor([[0.0, 0, 3, 3], [2, 5, 4, -4]], dtype=F64)
    queries = [(3, 4), (4, 3), (1, 0), (0, -1), (5, 12), (12, 5), (-1, 0), (0, 1)]
    q = torch.tensor(queries, dtype=F64).T.reshape(1, 2, *CUBE)
    return teacher.reshape(1, 2, *CUBE), torch.tensor([[[0, 1], [2, 3]]]), q


def test_eq_3_by_hand() -> None:
    """K(f-, q) = q_y / |q|, K(f+, q) = .6 q_x / |q|:

    q         (3,4)  (4,3)  (1,0)  (0,-1)  (5,12)  (12,5)  (-1,0)  (0,1)
    K(f-, q)  .8     .6     0      -1      12/13   5/13    0       1
    K(f+, q)  .36    .48    .6     0       3/13    36/65   -.6     0
    label     0      0      1      1       0       1       0       0

    The last four are unreliable: labels 0 1 0 0. The student's foreground probabilities there, .5 .5 .2 .75, cost ln 2,
    ln 2, -ln .8, ln 4: L_NN = (.693147 + .693147 + .223144 + 1.386294)/4 = .748933. L_EN, over all eight, is Eq 4's
    hand case: .643961. The first four are reliable with teacher label 1 and cost the student ln 2 each: L_UA = ln 2.
    """
    teacher, index, queries = hand_case()
    prototypes = class_prototypes(teacher, index)
    assert prototypes.flatten().tolist() == pytest.approx([0, 1, 0.6, 0], abs=1e-12)
    present = torch.ones(1, 2, dtype=torch.bool)
    similarity = prototype_similarity(queries, prototypes, present)
    outside = [0.8, 0.6, 0, -1, 12 / 13, 5 / 13, 0, 1]
    inside = [0.36, 0.48, 0.6, 0, 3 / 13, 36 / 65, -0.6, 0]
    assert similarity.flatten().tolist() == pytest.approx(outside + inside, abs=1e-12)
    assert similarity.argmax(1).flatten().tolist() == [0, 0, 1, 1, 0, 1, 0, 0]

    p = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.2, 0.75], dtype=F64)
    logits = torch.stack([1 - p, p]).log().reshape(1, 2, *CUBE)
    targets = Targets(
        label=torch.ones(1, *CUBE, dtype=torch.long),
        reliable=torch.tensor([True] * 4 + [False] * 4).reshape(1, *CUBE),
        references=prototypes,
        present=present,
        hidden=torch.tensor([0, 0, 0, 0, 0, 1, 1, -1]).reshape(1, *CUBE),
    )
    method = EmbeddingMatching(MethodConfig(entropy_over="all"), num_classes=2, matching=MatchingConfig(), draws=1)
    terms = method.terms(NetworkOutput(logits, queries), targets)
    losses = {name: value.item() for name, value in terms.losses.items()}
    assert losses == pytest.approx({"ua": 0.693147, "nn": 0.748933, "en": 0.643961}, abs=1e-6)
    shares = {name: (s.part.item(), s.whole.item()) for name, s in terms.shares.items()}
    assert shares == {
        "coverage_reliable": (4, 8),
        "coverage_matched": (4, 8),
        "foreground_matched": (1, 4),  # of the unreliable voxels' labels 0 1 0 0
        "foreground_pseudo": (8, 8),
        "slots_with_surface": (1, 1),
        "matched_accuracy": (2, 3),  # 0 1 0 against 0 1 1; the last voxel's truth is unknown
        "teacher_accuracy": (2, 3),
        "foreground_true": (2, 3),
    }


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 3), k=st.integers(1, 5), draws=st.integers(1, 4))
def test_a_prototype_is_the_mean_over_draws_of_the_mean_over_references(
    seed: int, num_classes: int, k: int, draws: int
) -> None:
    """(1/l) sum_draws (1/k) sum_references cos(q, r), term by term (METHOD trap 1)."""
    random = torch.Generator().manual_seed(seed)
    teacher = torch.randn(2, 3, 2, 2, 3, generator=random, dtype=F64)
    queries = torch.randn(2, 3, 2, 1, 2, generator=random, dtype=F64)
    index = torch.randint(12, (2, num_classes, draws * k), generator=random)
    similarity = prototype_similarity(
        queries, class_prototypes(teacher, index), torch.ones(2, num_classes, dtype=torch.bool)
    )
    cosine = torch.nn.CosineSimilarity(dim=0)
    for b in range(2):
        for c in range(num_classes):
            for v in range(4):
                q = queries[b].flatten(1)[:, v]
                maps = [
                    sum(float(cosine(q, teacher[b].flatten(1)[:, r])) for r in draw.tolist()) / k
                    for draw in index[b, c].reshape(draws, k)
                ]
                assert similarity[b, c].flatten()[v].item() == pytest.approx(sum(maps) / draws, abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_gradient_of_l_en_by_finite_differences(num_classes: int) -> None:
    random = torch.Generator().manual_seed(num_classes)
    teacher = torch.randn(2, 3, *CUBE, generator=random, dtype=F64)
    queries = torch.randn(2, 3, *CUBE, generator=random, dtype=F64)
    prototypes = class_prototypes(teacher, torch.randint(8, (2, num_classes, 6), generator=random))
    present = torch.ones(2, num_classes, dtype=torch.bool)
    present[1, -1] = num_classes == 2  # with three classes one slot lacks the last

    def l_en(q: Tensor) -> Tensor:
        return similarity_entropy(prototype_similarity(q, prototypes, present)).sum()

    leaf = queries.clone().requires_grad_()
    l_en(leaf).backward()
    step, flat = 1e-6, queries.flatten()
    for i in range(0, flat.numel(), 5):
        moved = torch.zeros_like(flat)
        moved[i] = step
        moved = moved.view_as(queries)
        slope = (l_en(queries + moved) - l_en(queries - moved)).item() / (2 * step)
        assert leaf.grad.flatten()[i].item() == pytest.approx(slope, abs=1e-9)


def test_a_class_without_references_never_wins() -> None:
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 3, *CUBE, generator=random, dtype=F64).requires_grad_()
    prototypes = class_prototypes(torch.randn(1, 3, *CUBE, generator=random, dtype=F64), torch.zeros(1, 3, 2).long())
    present = torch.tensor([[True, True, False]])
    similarity = prototype_similarity(queries, prototypes, present)
    assert bool((similarity[:, 2] == NO_REFERENCES).all())
    assert int(similarity.argmax(1).max()) < 2
    entropy = similarity_entropy(similarity, temperature=0.01)
    entropy.sum().backward()
    assert bool(torch.isfinite(entropy).all())
    assert bool(torch.isfinite(queries.grad).all())
    # Its softmax share is exactly 0, so L_EN is that of the two classes that have references.
    two = similarity_entropy(similarity[:, :2], temperature=0.01)
    assert entropy.item() == pytest.approx(two.item(), abs=1e-12)


def test_zero_embeddings_are_finite() -> None:
    """ReLU can leave a voxel without any activation."""
    queries = torch.zeros(1, 2, *CUBE, dtype=F64, requires_grad=True)
    prototypes = class_prototypes(torch.zeros(1, 2, *CUBE, dtype=F64), torch.zeros(1, 2, 3).long())
    loss = similarity_entropy(prototype_similarity(queries, prototypes, torch.ones(1, 2, dtype=torch.bool)))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert bool(torch.isfinite(queries.grad).all())
