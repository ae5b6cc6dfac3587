"""Heads that only training uses: perturbations against loops, and whose draws they take; distances by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distseg.data.signed_distance import signed_distances
from distseg.networks.heads import AuxiliaryDecoder, DistanceHead, PerturbedDecoders, ReconstructionDecoder
from distseg.networks.perturb import channel_dropout, feature_drop, feature_noise
from distseg.networks.unet import UNet3D

PERTURBATIONS = (feature_noise, feature_drop, channel_dropout)


def unet(levels: int = 2, num_classes: int = 3) -> UNet3D:
    torch.manual_seed(0)
    return UNet3D(num_classes=num_classes, base_filters=2, levels=levels, dropout_rate=0.2).double()


def keys(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


# Perturbations


def test_feature_noise_is_within_its_reach_and_uniform() -> None:
    z = positive(2, 4, 16, 16, 16)
    ratio = feature_noise(z, keys(1, 2)) / z - 1
    assert float(ratio.abs().max()) <= 0.3
    assert ratio.mean().item() == pytest.approx(0.0, abs=0.01)
    assert ratio.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.02)
    assert not torch.equal(ratio[0], ratio[1])


def test_feature_drop_is_the_loop() -> None:
    z = positive(3, 2, 4, 3, 2)
    out = feature_drop(z, keys(1, 2, 3))
    for slot, key in enumerate(keys(1, 2, 3)):
        gamma = 0.7 + 0.2 * float(torch.rand((1, 1, 1, 1), generator=key, dtype=torch.float64))
        means = z[slot].mean(0)
        for place in itertools.product(range(4), range(3), range(2)):
            kept = float(means[place]) < gamma * float(means.max())
            for channel in range(2):
                expected = float(z[slot, channel][place]) if kept else 0.0
                assert float(out[slot, channel][place]) == expected
    assert bool((out == 0).any())  # the most active place at least


def test_channel_dropout_takes_whole_channels() -> None:
    z = positive(4, 500, 2, 1, 1)
    out = channel_dropout(z, keys(1, 2, 3, 4))
    ratio = (out / z).flatten(2)
    assert torch.equal(ratio[..., 0], ratio[..., 1])
    assert set(ratio.unique().tolist()) == {0.0, 2.0}
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("perturb", PERTURBATIONS)
def test_a_perturbation_belongs_to_its_slot(perturb: object) -> None:
    z = positive(3, 4, 4, 4, 4)
    together = perturb(z, keys(5, 6, 7))
    alone = perturb(z[1:2], keys(6))
    assert torch.equal(together[1:2], alone)
    with pytest.raises(ValueError, match="1 generators for a batch of 3"):
        perturb(z, keys(5))
    torch.manual_seed(3)
    first = perturb(z, None)
    torch.manual_seed(3)
    assert torch.equal(perturb(z, None), first)


# Heads


def test_shapes_and_that_heads_leave_the_unet_alone() -> None:
    trunk = unet(3)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    x = positive(2, 1, 8, 8, 8)
    features = trunk.encode(x)
    output = trunk.decode(features)
    heads = (PerturbedDecoders(trunk), ReconstructionDecoder(trunk), DistanceHead(trunk))
    cct, mtc, dtc = (head.double() for head in heads)
    assert cct(features, keys(*range(6))).shape == (3, 2, 3, 8, 8, 8)
    assert mtc(features, keys(0, 1)).shape == (2, 3, 8, 8, 8)
    assert dtc(output.embeddings).shape == (2, 2, 8, 8, 8)
    assert all(torch.equal(trunk.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_auxiliary_decoder_with_the_main_ones_weights_is_the_main_one() -> None:
    trunk = unet(3).eval()
    decoder = AuxiliaryDecoder(trunk).double().eval()
    decoder.up.load_state_dict(trunk.up.state_dict())
    decoder.levels.load_state_dict(trunk.decoder.state_dict())
    decoder.head.load_state_dict(trunk.head.state_dict())
    features = trunk.encode(positive(1, 1, 8, 8, 8))
    assert torch.equal(decoder(features), trunk.decode(features).logits)


def test_a_reconstruction_sees_the_coarsest_map_alone() -> None:
    trunk = unet(3).eval()
    decoder = ReconstructionDecoder(trunk).double().eval()
    features = trunk.encode(positive(1, 1, 8, 8, 8))
    others = [torch.zeros_like(feature) for feature in features[:-1]]
    assert torch.equal(decoder(features, None), decoder([*others, features[-1]], None))


def test_perturbed_decoders_start_from_the_same_maps_and_draw_by_slot() -> None:
    """Nothing accumulates from one decoder to the next, and a slot alone gives what it gives among others."""
    trunk = unet(2)
    heads = PerturbedDecoders(trunk).double().train()
    features = trunk.encode(positive(2, 1, 4, 4, 4))
    kept = [feature.clone() for feature in features]
    together = heads(features, keys(*range(6)))  # (decoder, slot): 0 1 | 2 3 | 4 5
    assert all(torch.equal(feature, before) for feature, before in zip(features, kept, strict=True))
    alone = heads([feature[1:] for feature in features], keys(1, 3, 5))
    torch.testing.assert_close(together[:, 1:], alone, rtol=0, atol=1e-12)
    heads.eval()
    ours = heads([feature[:1] for feature in features], keys(7, 7, 7))
    for number, perturb in enumerate(PERTURBATIONS):
        key = keys(7)  # one generator serves all levels in turn
        perturbed = [perturb(feature[:1], key) for feature in features]
        assert torch.equal(ours[number], heads.decoders[number](perturbed))


# Signed distances


def brute_force(label: np.ndarray, value: int, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Every voxel against every voxel."""
    mask = label == value
    if not mask.any() or mask.all():
        return np.full(label.shape, -1.0 if mask.any() else 1.0)
    places = np.argwhere(np.ones_like(mask)) * np.asarray(spacing_mm)
    inside = mask.reshape(-1)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    to_inside = distances[:, inside].min(1) * ~inside
    to_outside = distances[:, ~inside].min(1) * inside
    out = (to_inside / to_inside.max() - to_outside / to_outside.max()).reshape(label.shape)
    for place in np.argwhere(mask):
        for axis, step in itertools.product(range(3), (-1, 1)):
            neighbour = place.copy()
            neighbour[axis] += step
            if 0 <= neighbour[axis] < label.shape[axis] and not mask[tuple(neighbour)]:
                out[tuple(place)] = 0.0
    return out


@given(seed=st.integers(0, 10**6), num_classes=st.integers(2, 4), spacing=st.sampled_from([(1, 1, 1), (3.0, 4.0, 2.5)]))
def test_signed_distances_are_the_brute_force(seed: int, num_classes: int, spacing: tuple[float, ...]) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, num_classes, (2, 2, 2))
    label = np.kron(coarse, np.ones((2, 3, 2), int)).astype(np.uint8)[:4, :5, :4]
    maps = signed_distances(label, num_classes, spacing_mm=spacing)
    assert maps.shape == (num_classes - 1, *label.shape)
    assert maps.dtype == np.float32
    for value in range(1, num_classes):
        np.testing.assert_allclose(maps[value - 1], brute_force(label, value, spacing), atol=1e-6)


def test_signed_distances_by_hand() -> None:
    """Five voxels in a row of 2 mm, three inside: distances in mm to the other side are 2, inner boundary 0, 4, ..."""
    label = np.zeros((1, 1, 7), np.uint8)
    label[0, 0, :4] = 1
    row = signed_distances(label, 2, spacing_mm=(1, 1, 2.0))[0, 0, 0]
    # Inside 8 6 4 2 mm over 8, the last one on the boundary; outside 2 4 6 over 6.
    assert row.tolist() == pytest.approx([-1.0, -0.75, -0.5, 0.0, 1 / 3, 2 / 3, 1.0])
    row = signed_distances(label, 2, spacing_mm=(1, 1, 2.0), truncation_mm=5.0)[0, 0, 0]
    assert row.tolist() == pytest.approx([-1.0, -1.0, -0.8, 0.0, 0.4, 0.8, 1.0])


def test_an_absent_class_is_far_outside_and_a_full_one_far_inside() -> None:
    empty, full = np.zeros((3, 3, 3), np.uint8), np.ones((3, 3, 3), np.uint8)
    assert np.unique(signed_distances(empty, 3, spacing_mm=(1, 1, 1))).tolist() == [1.0]
    maps = signed_distances(full, 3, spacing_mm=(1, 1, 1))
    assert (np.unique(maps[0]).tolist(), np.unique(maps[1]).tolist()) == ([-1.0], [1.0])
