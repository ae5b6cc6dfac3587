"""Slab-wise segmentation against dense whole-volume references written without slabs, product weights or rolling."""

from __future__ import annotations

import gc
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distseg.errors import InputError
from distseg.inference.sliding_window import segment
from distseg.inference.windows import gaussian_profile, window_starts

UNIT_MM = (1.0, 1.0, 1.0)
CLASSES = 3


def context_network(seed: int):
    """A predictor whose output depends on where in the window a voxel lies (zero padding), so blending matters."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, 1, 3, 3, 3, generator=generator)
    bias = torch.randn(CLASSES, generator=generator) * 0.3

    def predict(windows: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(windows, weight, bias, padding=1)

    return predict


def dense_probabilities(image: np.ndarray, *, patch, overlap, fill, predict) -> np.ndarray:
    """[K, Z, Y, X] float64: pad, run every window, add weighted probabilities and weights over the whole volume."""
    before = [max(0, p - n) // 2 for n, p in zip(image.shape, patch, strict=True)]
    after = [max(0, p - n) - b for n, p, b in zip(image.shape, patch, before, strict=True)]
    padded = np.pad(image, list(zip(before, after, strict=True)), constant_values=fill)
    total, weights = np.zeros((CLASSES, *padded.shape)), np.zeros(padded.shape)
    z, y, x = (gaussian_profile(p) for p in patch)
    importance = z[:, None, None] * y[:, None] * x
    for corner in np.ndindex(*padded.shape):
        if any(a not in window_starts(n, p, overlap) for a, n, p in zip(corner, padded.shape, patch, strict=True)):
            continue
        box = tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True))
        logits = predict(torch.from_numpy(padded[box].astype(np.float32))[None, None])
        total[(slice(None), *box)] += torch.softmax(logits[0], 0).numpy() * importance
        weights[box] += importance
    inner = tuple(slice(b, b + n) for b, n in zip(before, image.shape, strict=True))
    return (total / weights)[(slice(None), *inner)]


def interpolate_everywhere(volume: np.ndarray, shape, ratio) -> np.ndarray:
    """Trilinear at (i + 1/2) ratio - 1/2, edges held, written as a sum over the eight neighbours."""
    out = np.zeros((len(volume), *shape))
    grids = []
    for n_out, n_in, r in zip(shape, volume.shape[1:], ratio, strict=True):
        at = np.clip((np.arange(n_out) + 0.5) * r - 0.5, 0, n_in - 1)
        low = np.minimum(at.astype(int), max(n_in - 2, 0))
        grids.append([(low, 1 - (at - low)), (np.minimum(low + 1, n_in - 1), at - low)])
    for iz, wz in grids[0]:
        for iy, wy in grids[1]:
            for ix, wx in grids[2]:
                out += volume[:, iz][:, :, iy][..., ix] * (wz[:, None, None] * wy[:, None] * wx)
    return out


def assert_same_but_for_ties(mask: np.ndarray, probabilities: np.ndarray) -> None:
    top = np.sort(probabilities, axis=0)
    clear = top[-1] - top[-2] > 1e-5
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(mask[clear], probabilities.argmax(0)[clear])


def run(image, **changes) -> np.ndarray:
    options = {
        "source_spacing_mm": UNIT_MM,
        "target_spacing_mm": UNIT_MM,
        "patch_zyx": (4, 4, 4),
        "overlap": 0.5,
        "normalise": lambda box: box,
        "fill": 0.0,
        "predict": {"only": context_network(0)},
        "num_classes": CLASSES,
    }
    masks = segment(image, **{**options, **changes})
    return masks["only"]


@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    patch=st.tuples(*[st.integers(2, 6)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    batch_size=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_equals_dense_reference(seed, shape, patch, overlap, batch_size) -> None:
    image = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    predict = context_network(seed)
    mask = run(image, patch_zyx=patch, overlap=overlap, batch_size=batch_size, fill=-1.5, predict={"only": predict})
    assert mask.dtype == np.uint8
    assert mask.shape == shape
    reference = dense_probabilities(image, patch=patch, overlap=overlap, fill=-1.5, predict=predict)
    assert_same_but_for_ties(mask, reference)


@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(*[st.integers(1, 8)] * 3),
    target=st.tuples(*[st.sampled_from([0.5, 0.8, 1.0, 1.7, 3.0])] * 3),
)
@settings(max_examples=40, deadline=None)
def test_other_spacing_equals_whole_volume_interpolation(seed, shape, target) -> None:
    image = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    predict = context_network(seed)
    run_shape = tuple(max(1, round(n / t)) for n, t in zip(shape, target, strict=True))
    on_run_grid = interpolate_everywhere(image[None], run_shape, target)[0].astype(np.float32)
    probabilities = dense_probabilities(on_run_grid, patch=(4, 5, 4), overlap=0.5, fill=0.0, predict=predict)
    reference = interpolate_everywhere(probabilities, shape, [1 / t for t in target])
    mask = run(image, target_spacing_mm=target, patch_zyx=(4, 5, 4), predict={"only": predict})
    assert_same_but_for_ties(mask, reference)


def test_output_grid_may_differ_from_the_image_grid() -> None:
    image = np.random.default_rng(3).normal(size=(6, 7, 8)).astype(np.float32)
    predict = context_network(3)
    probabilities = dense_probabilities(image, patch=(4, 4, 4), overlap=0.5, fill=0.0, predict=predict)
    shape = (9, 10, 12)
    reference = interpolate_everywhere(probabilities, shape, [2 / 3, 0.7, 2 / 3])
    mask = run(image, predict={"only": predict}, output_shape=shape, output_spacing_mm=(2 / 3, 0.7, 2 / 3))
    assert_same_but_for_ties(mask, reference)


def test_pointwise_predictor_gives_its_own_argmax() -> None:
    image = np.random.default_rng(0).integers(0, CLASSES, (11, 6, 9)).astype(np.int16)

    def one_hot(windows: Tensor) -> Tensor:
        return 9 * torch.nn.functional.one_hot(windows[:, 0].long(), CLASSES).permute(0, 4, 1, 2, 3).float()

    mask = run(image, predict={"only": one_hot}, patch_zyx=(5, 4, 20), overlap=0.3)
    np.testing.assert_array_equal(mask, image)


def test_windows_of_one_value_are_predicted_once() -> None:
    image = np.zeros((4, 4, 40), np.float32)
    image[:, :, 30:34] = np.random.default_rng(0).normal(size=(4, 4, 4))
    seen: list[Tensor] = []
    network = context_network(4)

    def counting(windows: Tensor) -> Tensor:
        seen.extend(windows)
        return network(windows)

    mask = run(image, overlap=0.0, predict={"only": counting})
    assert len(seen) == 3  # x = 28 and 32 hold noise; the other eight are one
    reference = dense_probabilities(image, patch=(4, 4, 4), overlap=0.0, fill=0.0, predict=network)
    np.testing.assert_array_equal(mask, reference.argmax(0))


def test_networks_share_one_reading_and_normalisation_is_applied() -> None:
    class CountingImage:
        shape, dtype = (13, 5, 6), np.dtype(np.int16)

        def __init__(self) -> None:
            self.values = np.random.default_rng(1).integers(-50, 50, self.shape).astype(np.int16)
            self.planes: list[int] = []

        def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
            self.planes += range(*box[0].indices(self.shape[0]))
            return self.values[box]

    image, both = CountingImage(), {"student": context_network(1), "teacher": context_network(2)}
    options = {
        "source_spacing_mm": UNIT_MM,
        "target_spacing_mm": UNIT_MM,
        "patch_zyx": (4, 4, 4),
        "overlap": 0.5,
        "normalise": lambda box: (box - 3) / 20,
        "fill": -50,
        "num_classes": CLASSES,
    }
    masks = segment(image, predict=both, **options)
    assert sorted(image.planes) == list(range(13))  # each plane once, for both networks
    scaled = ((image.values - 3) / 20).astype(np.float32)
    for name, predict in both.items():
        reference = dense_probabilities(scaled, patch=(4, 4, 4), overlap=0.5, fill=-53 / 20, predict=predict)
        assert_same_but_for_ties(masks[name], reference)


@pytest.mark.parametrize("target", [UNIT_MM, (2.0, 2.0, 2.0)])
def test_memory_does_not_grow_with_depth(target: tuple[float, float, float]) -> None:
    def peak(depth: int) -> int:
        values = np.arange(depth * 256, dtype=np.float32)  # no window is blank
        image, floats, calls = values.reshape(depth, 16, 16), [0], itertools.count()

        def predict(windows: Tensor) -> Tensor:
            if next(calls) % (depth // 32):  # walking all objects is slow: look at 16 windows of each scan
                return windows.expand(-1, CLASSES, -1, -1, -1)
            tensors = [o for o in gc.get_objects() if type(o) is Tensor and o.dtype.is_floating_point]
            floats[0] = max(floats[0], sum(t.untyped_storage().nbytes() for t in tensors))
            return windows.expand(-1, CLASSES, -1, -1, -1)

        tracemalloc.start()
        mask = run(image, predict={"only": predict}, patch_zyx=(8, 16, 16), target_spacing_mm=target)
        _, numpy_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return floats[0] + max(0, numpy_peak - mask.nbytes)

    peak(64)  # the first call imports and caches
    # 60 kB of growth allows for the 1-D tables; the planes of probabilities would be 576 x 16 x 16 x 3 x 4 B = 1.7 MB.
    assert peak(640) - peak(64) < 60_000


def test_too_many_classes_for_uint8_is_refused() -> None:
    with pytest.raises(InputError, match="256 classes"):
        run(np.zeros((4, 4, 4)), num_classes=300)
