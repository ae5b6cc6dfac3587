"""Each loss against a 2 x 2 x 2 case worked by hand, and against loops over voxels that spell its formula out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distseg.config.schema import MethodConfig
from distseg.losses.consistency import consistency_loss
from distseg.losses.entropy import entropy_nats
from distseg.losses.masked_mean import masked_mean
from distseg.losses.reconstruction import reconstruction_loss, unit_window
from distseg.losses.signed_distance import distance_loss, dual_task_loss
from distseg.losses.similarity_entropy import similarity_entropy
from distseg.losses.supervised import dice_loss, supervised_loss
from distseg.methods.base import At
from distseg.methods.uncertainty import reliable_voxels, surest_of_each_class, uncertainty_and_label

CUBE = (2, 2, 2)
F64 = torch.float64
# Teacher: probability of foreground in pass 1 and 2, voxel by voxel.
PASS_1 = [0.9, 0.1, 0.75, 0.75, 0.9, 0.5, 0.9, 0.99]
PASS_2 = [0.9, 0.1, 0.75, 0.50, 0.5, 0.9, 0.2, 0.99]


def two_class_logits(foreground: list[float]) -> Tensor:
    """Probabilities of foreground of eight voxels -> logits [1, 2, 2, 2, 2]."""
    p = torch.tensor(foreground, dtype=F64)
    return torch.stack([1 - p, p]).log().reshape(1, 2, *CUBE)


def random_logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def random_labels(seed: int, num_classes: int, *shape: int) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed + 1))


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def entropy(p: list[float]) -> float:
    return -sum(q * math.log(q) for q in p if q > 0)


# Eq 2, the threshold and the teacher's label


def test_eq_2_by_hand() -> None:
    """h(p) = -p ln p - (1-p) ln(1-p): h(.9) = .325083, h(.75) = .562335, h(.5) = .693147, h(.2) = .500402,
    h(.99) = .056002. Mean of the two passes' entropies, e.g. voxel 3: (.562335 + .693147)/2 = .627741."""
    passes = torch.stack([two_class_logits(PASS_1), two_class_logits(PASS_2)])  # [2, 1, 2, 2, 2, 2]
    mean_of_entropies, label = uncertainty_and_label(passes, uncertainty="mean_of_entropies")
    by_hand = [0.325083, 0.325083, 0.562335, 0.627741, 0.509115, 0.509115, 0.412743, 0.056002]
    assert mean_of_entropies.flatten().tolist() == pytest.approx(by_hand, abs=1e-6)
    # UA-MT: the entropy of the mean. Voxel 3: h(.625) = .661563; 4, 5: h(.7) = .610864; 6: h(.55) = .688139.
    entropy_of_mean, same_label = uncertainty_and_label(passes, uncertainty="entropy_of_mean")
    by_hand = [0.325083, 0.325083, 0.562335, 0.661563, 0.610864, 0.610864, 0.688139, 0.056002]
    assert entropy_of_mean.flatten().tolist() == pytest.approx(by_hand, abs=1e-6)
    # argmax of the mean: .9, .1, .75, .625, .7, .7, .55, .99
    assert label.flatten().tolist() == same_label.flatten().tolist() == [1, 0, 1, 1, 1, 1, 1, 1]


def test_threshold_by_hand() -> None:
    """lambda at T = 50 of 100 is .569508: voxel 3 (.627741) is unreliable under Eq 2; under UA-MT's estimator, which
    is never below it, voxels 3 to 6 are."""
    passes = torch.stack([two_class_logits(PASS_1), two_class_logits(PASS_2)])
    for uncertainty, unreliable in (("mean_of_entropies", {3}), ("entropy_of_mean", {3, 4, 5, 6})):
        values, _ = uncertainty_and_label(passes, uncertainty=uncertainty)
        reliable, threshold = reliable_voxels(
            values, torch.zeros_like(values).long(), MethodConfig(), at=At(50, 100), num_classes=2
        )
        assert threshold.tolist() == pytest.approx([0.569508], abs=1e-6)
        assert set(torch.nonzero(~reliable.flatten()).flatten().tolist()) == unreliable


def test_other_thresholds() -> None:
    values = torch.arange(1.0, 9.0).reshape(1, *CUBE) / 10
    fixed = MethodConfig(threshold="fixed", threshold_value=0.5)
    reliable, threshold = reliable_voxels(values, torch.zeros_like(values).long(), fixed, at=At(1, 9), num_classes=3)
    assert threshold.item() == pytest.approx(0.5 * math.log(3))  # .549: .1 to .5 lie under it
    assert int(reliable.sum()) == 5
    quantile = MethodConfig(threshold="quantile", threshold_value=0.75)
    reliable, threshold = reliable_voxels(values, torch.zeros_like(values).long(), quantile, at=At(1, 9), num_classes=2)
    assert threshold.item() == pytest.approx(0.6)  # the sixth of eight: five lie under it
    assert int(reliable.sum()) == 5


def test_at_the_last_step_nothing_but_complete_doubt_is_unreliable() -> None:
    """METHOD trap 2: lambda = ln 2, strictly above every entropy but that of (.5, .5)."""
    values, _ = uncertainty_and_label(two_class_logits([0.501] * 7 + [0.5])[None], uncertainty="mean_of_entropies")
    reliable, _ = reliable_voxels(
        values, torch.zeros_like(values).long(), MethodConfig(), at=At(100, 100), num_classes=2
    )
    assert reliable.flatten().tolist()[:7] == [True] * 7


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 4), passes=st.integers(1, 4))
def test_eq_2_is_the_loop(seed: int, num_classes: int, passes: int) -> None:
    logits = random_logits(seed, passes, 2, num_classes, 2, 1, 2)
    values, label = uncertainty_and_label(logits, uncertainty="mean_of_entropies")
    of_mean, _ = uncertainty_and_label(logits, uncertainty="entropy_of_mean")
    for b in range(2):
        for z in range(2):
            for x in range(2):
                p = [softmax(logits[m, b, :, z, 0, x].tolist()) for m in range(passes)]
                mean = [sum(q[c] for q in p) / passes for c in range(num_classes)]
                assert values[b, z, 0, x].item() == pytest.approx(sum(map(entropy, p)) / passes, abs=1e-12)
                assert of_mean[b, z, 0, x].item() == pytest.approx(entropy(mean), abs=1e-12)
                assert mean[label[b, z, 0, x]] == max(mean)
    assert bool((of_mean >= values - 1e-12).all())  # Jensen


def test_entropy_of_certainty_is_zero_and_finite() -> None:
    extreme = torch.tensor([[[[[1e4]]], [[[-1e4]]]]]).requires_grad_()
    for uncertainty in ("mean_of_entropies", "entropy_of_mean"):
        assert uncertainty_and_label(extreme.detach()[None], uncertainty=uncertainty)[0].item() == 0.0
    value = entropy_nats(extreme, dim=1)
    value.sum().backward()
    assert value.item() == 0.0
    assert bool(torch.isfinite(extreme.grad).all())


# L_UA


def test_l_ua_by_hand() -> None:
    """Labels 1 0 1 . 1 1 1 1, voxel 3 unreliable. The student's foreground probabilities .5 .5 .25 .1 .5 .8 .8 .5 cost
    ln 2, ln 2, ln 4, -, ln 2, ln 1.25, ln 1.25, ln 2: together ln(2^4 x 4 x 1.25^2) = ln 100 = 4.605170; over the seven
    reliable voxels .657881."""
    student = two_class_logits([0.5, 0.5, 0.25, 0.1, 0.5, 0.8, 0.8, 0.5])
    label = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1]).reshape(1, *CUBE)
    reliable = torch.tensor([True, True, True, False, True, True, True, True]).reshape(1, *CUBE)
    voxelwise = torch.nn.functional.cross_entropy(student, label, reduction="none")
    assert masked_mean(voxelwise, reliable).item() == pytest.approx(0.657881, abs=1e-6)


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_masked_mean_is_the_loop(seed: int, share: float) -> None:
    values = random_logits(seed, 3, 2, 3, 2)
    mask = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < share
    for b, mean in enumerate(masked_mean(values, mask).tolist()):
        inside = [v for v, kept in zip(values[b].flatten().tolist(), mask[b].flatten().tolist(), strict=True) if kept]
        assert mean == pytest.approx(sum(inside) / len(inside) if inside else 0.0, abs=1e-12)


def test_an_empty_mask_has_no_gradient() -> None:
    values = torch.ones(1, *CUBE, requires_grad=True)
    masked_mean(values, torch.zeros(1, *CUBE, dtype=torch.bool)).sum().backward()
    assert values.grad.tolist() == torch.zeros(1, *CUBE).tolist()


# L_EN


def test_eq_4_by_hand() -> None:
    """Similarities to (outside, inside), their difference d, and the entropy of (s, 1 - s) with s = 1/(1 + e^-d):

    (.8, .36)  d -.44: .669520    (.6, .48)    d -.12: .691350    (0, .6)     d .6: .650094    (-1, 0) d 1: .582203
    (.92, .23) d -.69: .636643    (.385, .554) d .169: .689580    (0, -.6)    d -.6: .650094   (1, 0) d -1: .582203

    Their sum is 5.151689, their mean .643961.
    """
    outside = [0.8, 0.6, 0.0, -1.0, 12 / 13, 5 / 13, 0.0, 1.0]
    inside = [0.36, 0.48, 0.6, 0.0, 3 / 13, 36 / 65, -0.6, 0.0]
    similarity = torch.tensor([outside, inside], dtype=F64).reshape(1, 2, *CUBE)
    assert similarity_entropy(similarity).item() == pytest.approx(0.643961, abs=1e-6)
    # METHOD trap 3: cosines differ by at most 2, so the floor is h(1/(1 + e^-2)) = h(.880797) = .365334.
    floor = similarity_entropy(torch.tensor([[-1.0], [1.0]], dtype=F64).reshape(1, 2, 1, 1, 1))
    assert floor.item() == pytest.approx(0.365334, abs=1e-6)
    # With temperature .5 the differences double: h(1/(1 + e^-4)) = h(.982014) = .090095.
    sharper = similarity_entropy(torch.tensor([[-1.0], [1.0]], dtype=F64).reshape(1, 2, 1, 1, 1), temperature=0.5)
    assert sharper.item() == pytest.approx(0.090095, abs=1e-6)


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 4), temperature=st.sampled_from([0.1, 1.0, 2.0]))
def test_eq_4_is_the_loop(seed: int, num_classes: int, temperature: float) -> None:
    similarity = random_logits(seed, 2, num_classes, 2, 3, 1).tanh()
    for b, value in enumerate(similarity_entropy(similarity, temperature=temperature).tolist()):
        per_voxel = [
            entropy(softmax([similarity[b, c, z, y, 0].item() / temperature for c in range(num_classes)]))
            for z in range(2)
            for y in range(3)
        ]
        assert value == pytest.approx(sum(per_voxel) / 6, abs=1e-12)


# L_S


def test_l_s_by_hand() -> None:
    """Two of eight voxels are foreground. The student gives them .8 and .2 to the rest: cross-entropy -ln .8 = .223144.
    Dice: 2 (2 x .8) / (2 x .64 + 6 x .04 + 2) = 3.2 / 3.52 = .909091, so 1 - Dice = .090909; in all .314053."""
    logits = two_class_logits([0.8, 0.8] + [0.2] * 6)
    target = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]).reshape(1, *CUBE)
    assert supervised_loss(logits, target).item() == pytest.approx(0.314053, abs=1e-5)  # Dice is smoothed by 1e-5
    assert dice_loss(logits, target).item() == pytest.approx(0.090909, abs=1e-5)


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 4))
def test_l_s_is_the_loop(seed: int, num_classes: int) -> None:
    logits, target = random_logits(seed, 2, num_classes, 2, 2, 3), random_labels(seed, num_classes, 2, 2, 2, 3)
    for b, value in enumerate(supervised_loss(logits, target).tolist()):
        voxels = [(z, y, x) for z in range(2) for y in range(2) for x in range(3)]
        p = {v: softmax([logits[b, c][v].item() for c in range(num_classes)]) for v in voxels}
        cross_entropy = -sum(math.log(p[v][target[b][v]]) for v in voxels) / len(voxels)
        dice = []
        for c in range(1, num_classes):
            overlap = sum(p[v][c] for v in voxels if target[b][v] == c)
            squares = sum(p[v][c] ** 2 for v in voxels) + sum(1 for v in voxels if target[b][v] == c)
            dice.append((2 * overlap + 1e-5) / (squares + 1e-5))
        assert value == pytest.approx(cross_entropy + 1 - sum(dice) / len(dice), abs=1e-12)


def test_l_s_of_a_perfect_and_of_an_empty_patch_is_zero() -> None:
    empty, full = torch.zeros(1, *CUBE, dtype=torch.long), torch.ones(1, *CUBE, dtype=torch.long)
    sure = 50.0 * torch.tensor([1.0, -1.0], dtype=F64).reshape(1, 2, 1, 1, 1).expand(1, 2, *CUBE)
    assert supervised_loss(sure, empty).item() == pytest.approx(0.0, abs=1e-9)
    assert supervised_loss(-sure, full).item() == pytest.approx(0.0, abs=1e-9)
    assert supervised_loss(-sure, empty).item() == pytest.approx(100 + 1, abs=1e-3)  # all wrong: CE 100 nats, Dice 0


def test_losses_are_per_slot() -> None:
    """What one slot costs does not depend on the others in its batch."""
    logits, target = random_logits(0, 3, 2, *CUBE), random_labels(0, 2, 3, *CUBE)
    together = supervised_loss(logits, target)
    alone = torch.cat([supervised_loss(logits[b : b + 1], target[b : b + 1]) for b in range(3)])
    assert torch.equal(together, alone)


# Consistency


def test_consistency_by_hand() -> None:
    """Student .5 everywhere, teacher .9 in two voxels and .5 in six: each of the two differs by .4 in both classes, so
    the mean of squares is 2 x .16 / 8 = .04; over the mask of those two voxels alone it is .16."""
    student, teacher = two_class_logits([0.5] * 8), two_class_logits([0.9, 0.9] + [0.5] * 6)
    assert consistency_loss(student, teacher).item() == pytest.approx(0.04)
    mask = torch.tensor([True, True] + [False] * 6).reshape(1, *CUBE)
    assert consistency_loss(student, teacher, mask).item() == pytest.approx(0.16)
    assert consistency_loss(student, teacher, ~mask).item() == pytest.approx(0.0)
    assert consistency_loss(student, teacher, torch.zeros_like(mask)).item() == 0.0


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 4))
def test_consistency_is_ua_mts_formula(seed: int, num_classes: int) -> None:
    """sum_v m_v sum_c (s - q)^2 / (C sum_v m_v) (Yu et al. 2019); no gradient to the target."""
    student = random_logits(seed, 2, num_classes, 2, 2, 2).requires_grad_()
    target = random_logits(seed + 7, 2, num_classes, 2, 2, 2).requires_grad_()
    mask = torch.rand(2, *CUBE, generator=torch.Generator().manual_seed(seed)) < 0.6
    loss = consistency_loss(student, target, mask)
    squares = (student.softmax(1) - target.softmax(1)).square().sum(1)
    for b in range(2):
        inside = squares[b][mask[b]]
        expected = inside.sum().item() / (num_classes * max(1, len(inside)))
        assert loss[b].item() == pytest.approx(expected, abs=1e-12)
    loss.sum().backward()
    assert target.grad is None
    everywhere = consistency_loss(student, target, torch.ones_like(mask))
    torch.testing.assert_close(everywhere, consistency_loss(student, target), rtol=0, atol=1e-15)


# L_R, L_sdf and L_c of MTC and DTC


def test_reconstruction_by_hand() -> None:
    """Half the voxels foreground: w = .5 for both. Reconstructions .5 everywhere; image 1 on foreground, .2 elsewhere.
    Foreground's target is 1 there and 0 elsewhere: mean of .25 is .25. Background's is 0 there and .2 elsewhere: mean
    of .25 and .09 is .17. L_R = .5 x .25 + .5 x .17 = .21."""
    foreground = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=F64)
    probability = torch.stack([1 - foreground, foreground]).reshape(1, 2, *CUBE)
    image = torch.where(foreground > 0, 1.0, 0.2).double().reshape(1, 1, *CUBE)
    loss = reconstruction_loss(torch.zeros(1, 2, *CUBE, dtype=F64), image, probability)
    assert loss.tolist() == pytest.approx([0.21])
    assert unit_window(torch.tensor([-9.0, -3.0, 0.0, 1.5, 4.0])).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


def test_the_weight_of_a_class_takes_no_gradient() -> None:
    """Perfect reconstructions leave no gradient in the masks, though their sizes are the weights."""
    logits = random_logits(3, 2, 3, *CUBE).requires_grad_()
    probability = torch.softmax(logits, 1)
    image = unit_window(random_logits(4, 2, 1, *CUBE))
    perfect = torch.logit((probability * image).detach())
    (gradient,) = torch.autograd.grad(reconstruction_loss(perfect, image, probability).sum(), logits)
    assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize("num_classes", [2, 4])
def test_mtc_and_dtc_are_their_loops(num_classes: int) -> None:
    logits, raw = random_logits(5, 2, num_classes, *CUBE), random_logits(6, 2, num_classes, *CUBE)
    image, p = unit_window(random_logits(7, 2, 1, *CUBE)), torch.softmax(logits, 1)
    distance, target = torch.tanh(raw[:, 1:]) / 100, torch.tanh(random_logits(8, 2, num_classes - 1, *CUBE))
    places = [(z, y, x) for z in range(2) for y in range(2) for x in range(2)]
    for slot in range(2):
        expected = {"reconstruction": 0.0, "sdf": 0.0, "consistency": 0.0}
        for c in range(num_classes):
            weight = sum(float(p[slot, c][at]) for at in places) / 8
            for at in places:
                covered = float(p[slot, c][at]) * float(image[slot, 0][at])
                error = 1 / (1 + math.exp(-float(raw[slot, c][at]))) - covered
                expected["reconstruction"] += weight * error**2 / 8
                if c > 0:
                    z = float(distance[slot, c - 1][at])
                    expected["sdf"] += (z - float(target[slot, c - 1][at])) ** 2 / (8 * (num_classes - 1))
                    mask = 1 / (1 + math.exp(1500 * z))
                    expected["consistency"] += (mask - float(p[slot, c][at])) ** 2 / (8 * (num_classes - 1))
        assert reconstruction_loss(raw, image, p)[slot].item() == pytest.approx(expected["reconstruction"])
        assert distance_loss(distance, target)[slot].item() == pytest.approx(expected["sdf"])
        ours = dual_task_loss(logits, distance, sharpness=1500.0)[slot].item()
        assert ours == pytest.approx(expected["consistency"])


def test_dual_task_loss_is_finite_far_from_the_boundary() -> None:
    logits = torch.zeros(1, 2, *CUBE, requires_grad=True)
    for value in (-1.0, 1.0):
        distance = torch.full((1, 1, *CUBE), value, requires_grad=True)
        loss = dual_task_loss(logits, distance, sharpness=1500.0)
        assert loss.item() == pytest.approx(0.25)  # a half against a 0 or a 1
        gradients = torch.autograd.grad(loss.sum(), [logits, distance])
        assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_per_class_threshold_leaves_no_class_out() -> None:
    """Class 1 is doubtful throughout: the surest half of its voxels is reliable all the same; class 0, under
    the paper's threshold, is as without."""
    values = torch.tensor([0.1, 0.2, 0.69, 0.68, 0.66, 0.67]).reshape(1, 1, 2, 3)
    label = torch.tensor([0, 0, 1, 1, 1, 1]).reshape(1, 1, 2, 3)
    config = MethodConfig(threshold="per_class", threshold_value=0.5)
    reliable, threshold = reliable_voxels(values, label, config, at=At(1, 100), num_classes=2)
    assert reliable.flatten().tolist() == [True, True, False, False, True, True]
    assert threshold.tolist() == pytest.approx([0.5213], abs=1e-3)  # the paper's


@given(seed=st.integers(0, 1000), share=st.floats(0, 1), num_classes=st.integers(2, 4))
def test_the_surest_of_each_class_by_loop(seed: int, share: float, num_classes: int) -> None:
    random = torch.Generator().manual_seed(seed)
    entropy = torch.rand(2, 2, 3, 4, generator=random)
    label = torch.randint(num_classes, entropy.shape, generator=random)
    kept = surest_of_each_class(entropy, label, share=share, num_classes=num_classes)
    for slot in range(2):
        for value in range(num_classes):
            there = torch.nonzero(label[slot].flatten() == value).flatten()
            count = round(float(torch.tensor(share * len(there), dtype=torch.float32)))
            surest = there[entropy[slot].flatten()[there].argsort()][:count]
            assert sorted(surest.tolist()) == [v for v in there.tolist() if kept[slot].flatten()[v]]
