"""Slab-wise labelling against a naive whole-volume one; matching, thresholds, blank windows, memory, facts."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import math
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from distseg.data.keys import Purpose, torch_generators
from distseg.data.label_output import KINDS
from distseg.data.plane_spool import PlaneSpool
from distseg.data.volume import NativeGrid
from distseg.evaluation.metrics import largest_components
from distseg.inference import islands
from distseg.inference.label_scan import Grids, LabelRule, _capacities, _give_largest, label_scan
from distseg.inference.scan_facts import FactsOfPlanes
from distseg.inference.sliding_window import segment
from distseg.inference.teacher_passes import PassSettings
from distseg.inference.windows import WindowGrid, gaussian_profile, window_starts
from distseg.networks import stochastic
from distseg.networks.stochastic import stochastic_logits
from distseg.networks.unet import NetworkOutput, UNet3D
from distseg.work.label_sources import ScanSource
from distseg.work.label_task import LabelTask, _write
from tests.bench.memory import peak_mib, without_reserves

PATCH, CLASSES, ID = (8, 6, 8), 3, "scan"
RULE = LabelRule(PassSettings(3, 0.05, None, "mean_of_entropies"), threshold_nats=1.02)
CPU = torch.device("cpu")


def network(seed: int = 0, *, dropout: str = "all") -> UNet3D:
    torch.manual_seed(seed)
    net = UNet3D(num_classes=CLASSES, base_filters=2, levels=2, dropout=dropout, dropout_rate=0.3)
    return net.eval().requires_grad_(False)


class Prototypes:
    """The smallest matcher: cosine with one vector a class."""

    def __init__(self, width: int = 4, seed: int = 0) -> None:
        vectors = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(seed))
        self.vectors = torch.nn.functional.normalize(vectors, dim=1)

    def match(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        similarity = torch.nn.functional.normalize(queries, dim=1) @ self.vectors.T
        return similarity.argmax(1), similarity


def run(image: np.ndarray, net: UNet3D, rule: LabelRule = RULE, matcher=None, **more):
    """Mask, trust and facts, each output plane given exactly once and in order."""
    spacing, shape = more.pop("spacing", (1.0, 1.0, 1.0)), more.pop("shape", image.shape)
    output_spacing = more.pop("output_spacing", (1.0, 1.0, 1.0))
    planes: list[tuple[int, np.ndarray, np.ndarray]] = []
    settings_ = {"overlap": 0.5, "batch_size": 4, "patch_zyx": PATCH, **more}
    facts = label_scan(
        image, scan_id=ID, teacher=net, matcher=matcher, rule=rule,
        grids=Grids((1.0, 1.0, 1.0), spacing, output_spacing, shape),
        normalise=lambda box: box, fill=0.0, num_classes=CLASSES, device=CPU,
        sink=lambda *plane: planes.append(plane), **settings_,
    )  # fmt: skip
    assert [z for z, _, _ in planes] == list(range(shape[0]))
    return np.stack([m for _, m, _ in planes]), np.stack([t for _, _, t in planes]), facts


def whole_volume(image: np.ndarray, net: UNet3D, overlap: float, matcher: Prototypes | None, rule: LabelRule):
    """The same by loops over the whole volume: (shares [K, ...], entropy, label, code, confidence)."""
    starts = [window_starts(n, p, overlap) for n, p in zip(image.shape, PATCH, strict=True)]
    corners = list(itertools.product(*starts))
    low = [min(s[0], 0) for s in starts]
    padded_shape = [max(n, p) for n, p in zip(image.shape, PATCH, strict=True)]
    padded = np.zeros(padded_shape, np.float32)
    inner = tuple(slice(-a, -a + n) for a, n in zip(low, image.shape, strict=True))
    padded[inner] = image
    z, y, x = (gaussian_profile(p) for p in PATCH)
    importance = z[:, None, None] * y[:, None] * x
    total, weights = np.zeros((CLASSES + 1, *padded_shape)), np.zeros(padded_shape)
    key = int.from_bytes(hashlib.sha256(ID.encode()).digest()[:8], "little")
    embeddings = {}
    for number, corner in enumerate(corners):
        box = tuple(slice(c - a, c - a + p) for c, a, p in zip(corner, low, PATCH, strict=True))
        window = torch.from_numpy(padded[box])[None, None]
        generators = torch_generators(0, Purpose.LABEL, key, [number], rule.passes.passes)
        logits = stochastic_logits(
            net, window, passes=rule.passes.passes, noise_sigma=rule.passes.noise_sigma, generators=generators
        )[:, 0].double()
        p = torch.softmax(logits, 1)
        entropies = -(p * torch.log(p)).sum(1)
        mean = p.mean(0)
        if rule.passes.uncertainty == "mean_of_entropies":
            entropy = entropies.mean(0)
        else:
            entropy = -(mean * mean.log()).sum(0)
        total[(slice(None), *box)] += torch.cat([mean, entropy[None]]).numpy() * importance
        weights[box] += importance
        embeddings[corner] = net(window).embeddings[0]
    total = (total / weights)[(slice(None), *inner)]
    shares, entropy = total[:-1], total[-1]
    label, confidence = shares.argmax(0), 1 - entropy / math.log(CLASSES)
    code = np.where(entropy >= rule.threshold_nats, 2, 0)
    for voxel in map(tuple, np.argwhere(code == 2)) if matcher is not None else ():
        distances = [sum((v - c - (p - 1) / 2) ** 2 for v, c, p in zip(voxel, corner, PATCH, strict=True))
                     for corner in corners]  # fmt: skip
        corner = corners[int(np.argmin(distances))]  # the first of equally near ones
        local = tuple(v - c for v, c in zip(voxel, corner, strict=True))
        similarity = matcher.match(embeddings[corner][(slice(None), *local)][None])[1][0]
        best, second = similarity.topk(2).values
        if rule.min_similarity is None or best >= rule.min_similarity:
            label[voxel], code[voxel] = int(similarity.argmax()), 1
            confidence[voxel] = min(1.0, float(best - second))
    return shares, entropy, label, code, confidence


@settings(max_examples=8)
@given(
    shape=st.tuples(st.integers(3, 19), st.integers(4, 12), st.integers(5, 14)),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    batch_size=st.integers(1, 5),
    matched=st.sampled_from([None, -2.0, 0.6]),
    uncertainty=st.sampled_from(["mean_of_entropies", "entropy_of_mean"]),
)
def test_slab_wise_equals_whole_volume(shape, overlap, batch_size, matched, uncertainty) -> None:
    image = np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)
    net, matcher = network(1), None if matched is None else Prototypes()
    rule = dataclasses.replace(
        RULE, min_similarity=matched, passes=dataclasses.replace(RULE.passes, uncertainty=uncertainty)
    )
    mask, trust, facts = run(image, net, rule, matcher, overlap=overlap, batch_size=batch_size)
    shares, entropy, label, code, confidence = whole_volume(image, net, overlap, matcher, rule)
    top = np.sort(shares, axis=0)
    clear = (np.abs(entropy - rule.threshold_nats) > 1e-5) & ((top[-1] - top[-2] > 1e-5) | (code == 1))
    assert (~clear).sum() <= max(3, 0.01 * clear.size)  # exact ties, where dropout left a voxel nothing
    np.testing.assert_array_equal(mask[clear], label[clear])
    np.testing.assert_array_equal((trust // 64)[clear], code[clear])
    assert np.abs((trust % 64)[clear] - 63 * confidence[clear]).max() < 0.51
    assert facts.voxels == mask.size
    assert abs(facts.doubtful - (code > 0).sum()) <= (~clear).sum()
    assert abs(facts.matched - (code == 1).sum()) <= (~clear).sum()
    if matcher is None:
        assert facts.windows_embedded == 0


def test_everything_sure_is_the_argmax_on_any_grid() -> None:
    """Without dropout's noise the passes are the network itself: label is then what `segment` makes of it."""
    image = np.random.default_rng(0).normal(size=(11, 9, 12)).astype(np.float32)
    net = network(2)
    quiet = dataclasses.replace(RULE, threshold_nats=9.0, passes=PassSettings(2, 0.0, None, "mean_of_entropies"))
    for module in net.modules():
        if hasattr(module, "p"):
            module.p = 1e-9  # dropped with probability 0 of 2^16, so dropout is there and does nothing
    grid = {"output_spacing": (0.7, 0.8, 1.3), "shape": (16, 11, 9), "spacing": (1.1, 1.0, 1.2)}
    mask, trust, _ = run(image, net, quiet, **grid)
    expected = segment(
        image, source_spacing_mm=(1, 1, 1), target_spacing_mm=grid["spacing"], patch_zyx=PATCH, overlap=0.5,
        normalise=lambda box: box, fill=0.0, predict={"t": lambda windows: net(windows).logits}, num_classes=CLASSES,
        batch_size=4, output_shape=grid["shape"], output_spacing_mm=grid["output_spacing"],
    )["t"]  # fmt: skip
    assert (mask == expected).mean() > 0.999
    assert trust.max() < 64


def test_the_same_scan_gives_the_same_bytes_and_another_seed_does_not() -> None:
    image = np.random.default_rng(5).normal(size=(13, 9, 10)).astype(np.float32)
    rules = [dataclasses.replace(RULE, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (run(image, network(), rule, Prototypes())[:2] for rule in rules)
    assert [a.tobytes() for a in first] == [a.tobytes() for a in again]
    assert first[1].tobytes() != other[1].tobytes()


def test_the_quantile_is_of_the_scans_own_entropies() -> None:
    image = np.random.default_rng(6).normal(size=(15, 11, 13)).astype(np.float32)
    _, entropy, *_ = whole_volume(image, network(), 0.5, None, RULE)
    for share in (0.5, 0.9):
        _, trust, facts = run(image, network(), dataclasses.replace(RULE, quantile=share))
        # Of single windows; blending narrows the spread of `entropy` and of what is held against the threshold.
        assert facts.threshold_nats == pytest.approx(np.quantile(entropy, share), abs=0.05)
        assert (trust < 64).mean() == pytest.approx(share, abs=0.15)
    _, trust, facts = run(np.zeros_like(image), network(), dataclasses.replace(RULE, quantile=0.5))
    assert facts.threshold_nats == math.inf
    assert trust.max() < 64


def test_blank_windows_cost_one_draw_and_change_nothing_else() -> None:
    """Air is one value to the network: its passes are drawn once. What windows see anything else keep every bit."""
    image = np.zeros((8, 6, 64), np.float32)
    image[:, :, 30:34] = np.random.default_rng(0).normal(size=(8, 6, 4))

    class Counting(UNet3D):
        samples = 0

        def forward(self, x):
            self.samples += len(x)
            return super().forward(x)

    torch.manual_seed(0)
    net = Counting(num_classes=CLASSES, base_filters=2, levels=2, dropout_rate=0.3).eval().requires_grad_(False)
    mask, trust, _ = run(image, net, overlap=0.0)
    assert net.samples == 3 * (1 + 2)  # of 8 windows 2 see something
    slightly = image.copy()
    slightly[..., 0] += 1e-4  # no window is blank any more
    slightly[..., 63] -= 1e-4
    for start in range(8, 64, 8):
        slightly[0, 0, start] += 1e-4 if start not in (24, 32) else 0
    mask_full, trust_full, _ = run(slightly, net, overlap=0.0)
    sees = slice(24, 40)
    np.testing.assert_array_equal(mask[..., sees], mask_full[..., sees])
    np.testing.assert_array_equal(trust[..., sees], trust_full[..., sees])
    # Elsewhere only the draw differs: with many passes both tend to the same mean, within 3 of 63 steps on average.
    many = dataclasses.replace(RULE, threshold_nats=9.0, passes=dataclasses.replace(RULE.passes, passes=80))
    blank = np.r_[0:24, 40:64]
    one, each = (run(volume, net, many, overlap=0.0)[1][..., blank].astype(float) for volume in (image, slightly))
    assert np.abs(one - each).mean() < 3


def test_memory_does_not_grow_with_depth() -> None:
    """numpy's by tracemalloc. torch's are the rolling planes, whose number the grid alone decides."""

    class Deep:
        dtype = np.dtype(np.float32)

        def __init__(self, depth: int) -> None:
            self.shape = (depth, 12, 16)

        def __getitem__(self, box):
            return np.random.default_rng(box[0].start).normal(size=[s.stop - s.start for s in box]).astype(np.float32)

    one_pass = dataclasses.replace(RULE, passes=dataclasses.replace(RULE.passes, passes=1))
    peaks = []
    for depth in (24, 96):
        gc.collect()
        tracemalloc.start()
        label_scan(
            Deep(depth), scan_id=ID, teacher=network(), matcher=None, rule=one_pass,
            grids=Grids((1.0, 1.0, 1.0), (1.3, 1.0, 1.0), (1.0, 1.0, 1.0), (depth, 12, 16)), patch_zyx=PATCH,
            overlap=0.25, normalise=lambda box: box, fill=0.0, num_classes=CLASSES, batch_size=8, device=CPU,
            sink=lambda *_: None,
        )  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    for overlap in (0.0, 0.25, 0.5):
        grids = [WindowGrid.of((depth, 12, 16), PATCH, overlap) for depth in (64, 6400)]
        assert [_capacities(grid, grid.cells(0)) for grid in grids] == [_capacities(grids[0], grids[0].cells(0))] * 2
        assert max(_capacities(grids[0], grids[0].cells(0))) <= 2 * PATCH[0]


class Mostly:
    """An image [Z, 128, 128] that is read by region: air, with something in one window of 32."""

    dtype = np.dtype(np.int16)

    def __init__(self, depth: int) -> None:
        self.shape = (depth, 128, 128)

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        values = np.zeros([s.stop - s.start for s in box], np.int16)
        if box[0].start % 128 == 0:
            values[:8, 20:50, 20:50] = 700
        return values


class InPieces:
    """A matcher that makes noise of a scan: single voxels of both classes."""

    def match(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = (queries.double().sum(1) * 1e4) % 1
        label = (drawn < 0.06).long() + 2 * ((drawn >= 0.06) & (drawn < 0.12)).long()
        return label, 0.9 * torch.nn.functional.one_hot(label, CLASSES).float()


class Noise(Mostly):
    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        rng = np.random.default_rng(box[0].start)
        return rng.integers(0, 700, [s.stop - s.start for s in box]).astype(np.int16)


@pytest.mark.slow
@pytest.mark.own_process
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("image", "matcher", "threshold_nats"),
    [(Mostly, None, 9.0), (Noise, Prototypes, -1.0), (Noise, InPieces, -1.0)],
    ids=["all sure", "all matched", "all matched, in pieces"],
)
def test_memory_is_a_plus_a_byte_a_voxel(tmp_path: Path, image: Any, matcher: Any, threshold_nats: float) -> None:
    """All of it, of the process, by the kernel's high-water mark. Until the files are written nothing grows with the
    scan: slabs, network, matching, facts, planes that wait. Then it is the byte a voxel of one file at a time, islands
    gone. Apart, as the one would hide the other. A full-volume float of one class alone would be four bytes a voxel."""
    without_reserves()
    net = network()
    rule = LabelRule(dataclasses.replace(RULE.passes, passes=1), threshold_nats, keep_largest=(1, 2))

    def peaks(depth: int) -> tuple[float | None, float | None]:
        native = NativeGrid((128, 128, depth), np.diag([-1.0, -1.0, 1.0, 1.0]))
        task = LabelTask("", "", ScanSource(ID, "", "", False, None, None, None), str(tmp_path), rule, 0.0, 1)
        with PlaneSpool(tmp_path) as masks, PlaneSpool(tmp_path) as trusts:

            def sink(_: int, mask: np.ndarray, trust: np.ndarray) -> None:
                masks.add(mask)
                trusts.add(trust)

            def scan() -> None:
                facts = label_scan(
                    image(depth), scan_id=ID, teacher=net, matcher=None if matcher is None else matcher(), rule=rule,
                    grids=Grids((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (depth, 128, 128)),
                    patch_zyx=(16, 64, 64), overlap=0.0, normalise=lambda box: box.astype(np.float32) / 400, fill=0.0,
                    num_classes=CLASSES, batch_size=4, device=CPU, sink=sink,
                )  # fmt: skip
                assert facts.matched == (0 if matcher is None else facts.voxels)

            spools = dict(zip(KINDS, (masks, trusts), strict=True))
            written = lambda: _write(spools, tmp_path, task, native, num_classes=CLASSES)  # noqa: E731  # once, in a line
            return peak_mib(scan, CPU), peak_mib(written, CPU)

    peaks(32)  # what torch and oneDNN keep
    shallow, deep = peaks(128), peaks(512)
    if None in (*shallow, *deep):
        pytest.skip("this system does not tell a process' peak")
    mib_of_voxels = (512 - 128) * 128 * 128 / 2**20
    assert deep[0] - shallow[0] < 0.25 * mib_of_voxels
    assert deep[1] - shallow[1] < 1.25 * mib_of_voxels


@given(seed=st.integers(0, 300), planes=st.sampled_from([1, 2, 3, 16]))
def test_islands_go_as_in_a_whole_volume(seed: int, planes: int) -> None:
    """Any orientation in memory; of equally large pieces the first stays."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, 3))
    mask = (rng.integers(1, 4, shape) * (rng.random(shape) < rng.choice([0.1, 0.3, 0.6]))).astype(np.uint8)
    values = [value for value in (1, 3) if rng.random() < 0.8]
    wanted = largest_components(mask, values=values)
    stored = mask[::-1].transpose(2, 1, 0).copy(order="F")
    with mock.patch.object(islands, "PLANES", planes):
        removed = list(islands.remove_islands(stored.transpose(2, 1, 0)[::-1], values=values))
    np.testing.assert_array_equal(stored.transpose(2, 1, 0)[::-1], wanted)
    np.testing.assert_array_equal(np.concatenate(removed), mask != wanted)


@given(size=st.integers(1, 60), patch=st.integers(1, 16), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_cells_are_the_nearest_windows(size: int, patch: int, overlap: float) -> None:
    grid = WindowGrid.of((size, 5, 5), (patch, 5, 5), overlap)
    starts, cells = grid.starts[0], grid.cells(0)
    owners = [i for i, (start, stop) in enumerate(cells) for _ in range(start, stop)]
    assert len(owners) == size
    for voxel, owner in enumerate(owners):
        distances = [abs(voxel - start - (patch - 1) / 2) for start in starts]
        assert owner == int(np.argmin(distances))
        assert starts[owner] <= voxel < starts[owner] + patch


@pytest.mark.parametrize("dropout", ["all", "decoder"])
def test_passes_a_few_at_a_time_are_the_passes(dropout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, image = network(3, dropout=dropout), torch.randn(2, 1, *PATCH)

    def passes(at_once: int) -> list[NetworkOutput]:
        monkeypatch.setitem(stochastic._VOXELS_AT_ONCE, "cpu", at_once * image.numel())
        drawn = torch_generators(0, Purpose.LABEL, 1, [0, 1], 5)
        return list(stochastic.pass_outputs(net, image, passes=5, noise_sigma=0.1, generators=drawn))

    together, parts = passes(5), passes(2)
    assert [len(output.logits) for output in (*together, *parts)] == [10, 4, 6]
    for name in ("logits", "embeddings"):
        joined, whole = (torch.cat([getattr(output, name) for output in outputs]) for outputs in (parts, together))
        torch.testing.assert_close(joined, whole)


@given(cuts=st.lists(st.integers(1, 11), max_size=4), seed=st.integers(0, 20))
def test_facts_do_not_depend_on_slabs(cuts: list[int], seed: int) -> None:
    """Counts against whole-volume numpy and scipy, however the scan is cut."""
    rng = np.random.default_rng(seed)
    label = ndimage.zoom(rng.integers(0, CLASSES, (3, 3, 3)), 4, order=0) * (rng.random((12, 12, 12)) < 0.8)
    shares = torch.softmax(torch.from_numpy(rng.normal(size=(CLASSES, 12, 12, 12))).float() * 2, 0)
    entropy = torch.from_numpy(rng.random((12, 12, 12))).float()
    codes = torch.from_numpy(rng.integers(0, 3, (12, 12, 12))).to(torch.uint8)
    teacher = shares.argmax(0)
    final = torch.from_numpy(label)
    facts = FactsOfPlanes(CLASSES, threshold_nats=0.5)
    bounds = sorted({0, 12, *cuts})
    for a, b in itertools.pairwise(bounds):
        facts.add(shares[:, a:b], entropy[a:b], label=final[a:b], teacher=teacher[a:b], codes=codes[a:b])
    done = facts.finished(grid_shape=label.shape, windows=1, descriptor=torch.tensor([3.0, 4.0]))
    surface = np.zeros(label.shape, bool)
    for axis in range(3):
        differs = np.diff(label, axis=axis) != 0
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(0, -1), slice(1, None)
        surface[tuple(low)] |= differs
        surface[tuple(high)] |= differs
    assert done.surface_voxels == surface.sum()
    if surface.any():
        assert done.surface_entropy == pytest.approx(entropy.numpy()[surface].mean() / math.log(CLASSES), abs=2e-6)
    assert (done.doubtful, done.matched) == ((codes > 0).sum(), (codes == 1).sum())
    assert done.disagreeing == (final != teacher).sum()
    for value in (1, 2):
        numbers, count = ndimage.label(label == value, structure=np.ones((3, 3, 3)))
        assert done.components[value - 1] == count
        assert done.class_voxels[value - 1] == (label == value).sum()
        if count:
            largest = np.bincount(numbers.ravel())[1:].max() / (label == value).sum()
            assert done.largest_share[value - 1] == pytest.approx(largest, abs=1e-6)
        p, m = shares[value].numpy(), label == value
        assert done.expected_dice[value - 1] == pytest.approx(2 * p[m].sum() / (p.sum() + m.sum()), abs=1e-5)
    assert done.descriptor == [0.6, 0.8]


def test_a_matched_class_takes_the_largest_share() -> None:
    shares = torch.softmax(torch.randn(CLASSES, 2, 3, 4, generator=torch.Generator().manual_seed(0)), 0)
    before, at = shares.clone(), (torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([3, 1]))
    was = before.argmax(0)[at]
    now = torch.stack([(was[0] + 1) % CLASSES, was[1]])  # disagrees at one voxel, agrees at the other
    _give_largest(shares, at, was=was, now=now)
    assert shares.argmax(0)[at].tolist() == now.tolist()
    torch.testing.assert_close(shares.sum(0), torch.ones(2, 3, 4))
    changed = (shares != before).any(0)
    assert torch.nonzero(changed).tolist() == [[0, 2, 3]]
