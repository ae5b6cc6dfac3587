"""The gradient step with each method: BASELINES section 8's five tests in float64, Eq 5, and what belongs to a slot."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distseg.config.compose import train_config
from distseg.config.schema import MatchingConfig, MethodConfig
from distseg.data.batch import Batch, collate
from distseg.data.keys import Purpose, torch_generators
from distseg.data.signed_distance import signed_distances
from distseg.errors import ConfigError
from distseg.losses.supervised import supervised_loss
from distseg.matching.surface import draw_references, surface_bands
from distseg.methods import KINDS, make_method, passes_per_step
from distseg.methods.base import At, Method, Passes, StudentPass, Targets
from distseg.methods.embedding_matching import EmbeddingMatching
from distseg.methods.uamt import UncertaintyAwareMeanTeacher
from distseg.networks.dropout import keyed
from distseg.networks.ema import make_teacher
from distseg.networks.stochastic import add_noise
from distseg.networks.unet import NetworkOutput, UNet3D
from distseg.training.clock import Clock
from distseg.training.reduce import FlatGradients, SingleProcess
from distseg.training.step import Learner, StepSettings, record, training_step

SIZE = 8
CUBE = (2, 2, 2)
F64 = torch.float64
WITH_TEACHER = ("mean_teacher", "uamt", "embedding_matching")
WITH_HEADS = ("cct", "mtc", "dtc")
SEMI_SUPERVISED = (*WITH_TEACHER, *WITH_HEADS)
ZERO_WEIGHTS = {f"method.weight_{name}": 0.0 for name in ("ua", "nn", "en", "consistency", "sdf", "reconstruction")}


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str, *, num_classes: int = 2, **overrides: Any) -> Method:
    keys = {"method.passes": 2, **{key.replace("__", "."): value for key, value in overrides.items()}}
    config = train_config(cohort="c", run="r", method=name, matching="prototypes", overrides=keys)
    return make_method(config, num_classes=num_classes)


def one_slot(step: int, slot: int, *, num_classes: int = 2, label: int | None = None) -> Batch:
    """Random images; a box of each class in the label, or `label` everywhere."""
    rng = np.random.default_rng([step, slot])
    target = np.zeros((SIZE,) * 3, np.int64) if label is None else np.full((SIZE,) * 3, label)
    if label is None:
        for value in range(1, num_classes):
            low = rng.integers(0, 4, 3)
            target[low[0] : low[0] + 3, low[1] : low[1] + 4, low[2] : low[2] + 3] = value
    images = torch.from_numpy(rng.normal(size=(2, 1, 1, SIZE, SIZE, SIZE)))
    images[0, 0, 0] += torch.from_numpy(target)
    index, present = draw_references(surface_bands(target, num_classes), k=3, draws=2, generator=rng)
    return Batch(
        step=step,
        slots=(slot,),
        scan_ids=(f"l{slot}+u{slot}",),
        labelled_image=images[0],
        labelled_target=torch.from_numpy(target)[None],
        unlabelled_image=images[1],
        reference_image=images[0],
        reference_index=torch.from_numpy(index)[None],
        reference_present=torch.from_numpy(present)[None],
        labelled_distance=torch.from_numpy(signed_distances(target, num_classes, spacing_mm=(3, 4, 4)))[None].double(),
    )


def batch_of(step: int, slots: int = 2, **more: Any) -> Batch:
    return collate([one_slot(step, slot, **more) for slot in range(slots)])


def new_learner(num_classes: int = 2, method: Method | None = None) -> Learner:
    """With the heads of `method`, if it has some."""
    torch.manual_seed(0)
    student = UNet3D(num_classes=num_classes, base_filters=2, levels=2, dropout_rate=0.2).double().train()
    heads = method.make_heads(student) if method is not None else None
    parameters = list(student.parameters())
    if heads is not None:
        parameters += heads.double().train().parameters()
    optimizer = torch.optim.Adam(parameters, lr=1e-2, fused=True)
    return Learner(student, make_teacher(student), optimizer, FlatGradients(parameters, slots=4), heads)


def settings(**more: Any) -> StepSettings:
    values: dict[str, Any] = {
        "seed": 3,
        "batch_size": 2,
        "slots_per_pass": 2,
        "keyed": True,
        "ema_decay": 0.99,
        "student_noise_sigma": 0.02,
    }
    return StepSettings(**{**values, **more})


def take_step(learner: Learner, method: Method, batch: Batch, at: At, **more: Any) -> dict[str, Any]:
    """One step; its line of metrics.jsonl."""
    logged = training_step(
        learner,
        batch,
        method=method,
        at=at,
        settings=settings(**more),
        communicator=SingleProcess(),
        clock=Clock(torch.device("cpu")),
    )
    numbers = {name: value.item() for name, value in logged.items()}
    return record(numbers, method=method, at=at, batch_size=more.get("batch_size", 2))


def weights_of(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


# BASELINES section 8


@pytest.mark.parametrize("name", SEMI_SUPERVISED)
def test_1_with_weight_zero_it_is_the_supervised_baseline(name: str) -> None:
    learners = []
    for method in (make(name, **ZERO_WEIGHTS), make("supervised")):
        learner = new_learner(method=method)
        for step in (1, 2, 3):
            take_step(learner, method, batch_of(step), At(step, 3))
        learners.append(learner)
    ours, baseline = learners
    torch.testing.assert_close(weights_of(ours.student), weights_of(baseline.student), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights_of(ours.teacher), weights_of(baseline.teacher), rtol=0, atol=1e-12)
    assert float((weights_of(ours.student) - weights_of(new_learner().student)).abs().max()) > 1e-3


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_2_no_gradient_reaches_the_teacher(name: str) -> None:
    learner, method, batch = new_learner(), make(name), batch_of(1)
    learner.teacher.requires_grad_(True)  # even if it could
    passes = torch_generators(3, Purpose.TEACHER, 1, (0, 1), method.teacher_passes)
    targets = method.teach(learner.teacher, batch, At(3, 3), passes)
    tensors = [t for t in vars(targets).values() if isinstance(t, Tensor)]
    assert tensors
    assert not any(t.requires_grad or t.is_inference() for t in tensors)
    # Where a target takes gradients, none arrive: the terms cut them off themselves.
    leaf = None if targets.logits is None else targets.logits.clone().requires_grad_()
    targets = dataclasses.replace(targets, logits=leaf)
    terms = method.terms(learner.student(batch.unlabelled_image), targets)
    torch.stack([value.sum() for value in terms.losses.values()]).sum().backward()
    assert leaf is None or leaf.grad is None
    assert all(p.grad is None for p in learner.teacher.parameters())
    assert float(learner.student.encoder[0][0].conv.weight.grad.abs().max()) > 0


def what_the_student_gave(num_classes: int = 2) -> dict[str, Any]:
    """Leaves that a method's head terms may send gradients to: outputs of two slots, and of CCT's three decoders."""
    random = torch.Generator().manual_seed(5)
    shapes = {
        "labelled": (2, num_classes),
        "unlabelled": (2, num_classes),
        "cct": (3, 2, num_classes),
        "mtc": (4, num_classes),
        "dtc": (4, num_classes - 1),
    }
    return {
        name: torch.randn(*shape, *(SIZE,) * 3, generator=random, dtype=F64).mul_(1e-3 if name == "dtc" else 1)
        .requires_grad_()
        for name, shape in shapes.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overrides", "reached"),
    [
        ("cct", {}, {"cct"}),  # its target, the main decoder's output, is a constant
        ("mtc", {}, {"mtc", "labelled", "unlabelled"}),
        ("mtc", {"method__mask_gradient": False}, {"mtc"}),
        ("dtc", {}, {"dtc", "labelled", "unlabelled"}),  # each task teaches the other
    ],
)
def test_2_where_head_terms_send_gradients(name: str, overrides: dict[str, Any], reached: set[str]) -> None:
    given = what_the_student_gave()
    embeddings = torch.zeros(2, 4, *(SIZE,) * 3, dtype=F64)
    seen = StudentPass(
        NetworkOutput(given["labelled"], embeddings), NetworkOutput(given["unlabelled"], embeddings), given[name]
    )
    terms = make(name, **overrides).head_terms(seen, batch_of(1))
    assert all(value.shape == (2,) for value in terms.losses.values())
    torch.stack([value.sum() for value in terms.losses.values()]).sum().backward()
    assert {key for key, leaf in given.items() if leaf.grad is not None and bool(leaf.grad.abs().max() > 0)} == reached


@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_train_and_the_teacher_has_none(name: str) -> None:
    """Heads and encoder move; the main decoder's output layer gets CCT's gradient from labelled patches alone."""
    method = make(name)
    learner = new_learner(method=method)
    assert learner.heads is not None
    heads, encoder = weights_of(learner.heads), weights_of(learner.student.encoder)
    row = take_step(learner, method, batch_of(1), At(3, 3))
    assert float((weights_of(learner.heads) - heads).abs().max()) > 1e-3
    assert float((weights_of(learner.student.encoder) - encoder).abs().max()) > 1e-3
    assert learner.teacher.state_dict().keys() == learner.student.state_dict().keys()
    terms = {"cct": {"consistency"}, "mtc": {"reconstruction"}, "dtc": {"sdf", "consistency"}}[name]
    assert {key.removeprefix("loss_") for key in row if key.startswith("loss_")} == {"supervised", *terms}
    assert row["loss"] == pytest.approx(
        sum(row[f"weight_{term}"] * row[f"loss_{term}"] for term in (*terms, "supervised"))
    )
    assert row["foreground_unlabelled"] is not None


@pytest.mark.parametrize("name", ["supervised", *SEMI_SUPERVISED])
@pytest.mark.parametrize("label", [0, 1])
def test_3_uniform_patches_are_finite(name: str, label: int) -> None:
    """All background, all foreground; at the last step, where the threshold leaves nothing unreliable too."""
    method = make(name)
    learner = new_learner(method=method)
    for step in (1, 3):
        row = take_step(learner, method, batch_of(step, label=label), At(step, 3))
        assert all(math.isfinite(value) for value in row.values() if value is not None)
        if name == "embedding_matching":  # no surface: L_NN = L_EN = 0, and it is counted
            assert (row["loss_nn"], row["loss_en"], row["slots_with_surface"]) == (0.0, 0.0, 0.0)
            assert row["coverage_matched"] == 0.0
            assert row["foreground_matched"] is None
    assert bool(torch.isfinite(weights_of(learner.student)).all())


def test_4_uamt_with_a_full_mask_is_mean_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = make("uamt", method__threshold="fixed", method__threshold_value=1.0)
    one = make("mean_teacher")
    batch, learner = batch_of(1), new_learner()
    at = At(2, 3)
    # UA-MT's target is its first pass, so with the same keys both have the same target.
    masked = everything.teach(learner.teacher, batch, at, torch_generators(3, Purpose.TEACHER, 1, (0, 1), 3))
    plain = one.teach(learner.teacher, batch, at, torch_generators(3, Purpose.TEACHER, 1, (0, 1), 1))
    assert everything.teacher_passes == 3
    torch.testing.assert_close(masked.logits, plain.logits, rtol=0, atol=1e-12)
    masked = dataclasses.replace(masked, reliable=torch.ones_like(masked.reliable))
    output = learner.student(batch.unlabelled_image)
    ours, theirs = everything.terms(output, masked).losses, one.terms(output, plain).losses
    torch.testing.assert_close(ours["consistency"], theirs["consistency"], rtol=0, atol=1e-15)
    # And step by step.
    teach = UncertaintyAwareMeanTeacher.teach

    def unmasked(self: Any, *arguments: Any) -> Targets:
        targets = teach(self, *arguments)
        return dataclasses.replace(targets, reliable=torch.ones_like(targets.reliable))

    monkeypatch.setattr(UncertaintyAwareMeanTeacher, "teach", unmasked)
    results = []
    for method in (everything, one):
        learner = new_learner()
        for step in (1, 2):
            take_step(learner, method, batch_of(step), At(step, 2))
        results.append(weights_of(learner.student))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["supervised", *SEMI_SUPERVISED])
def test_5_three_classes(name: str) -> None:
    method = make(name, num_classes=3)
    learner = new_learner(3, method)
    before = weights_of(learner.student)
    rows = [take_step(learner, method, batch_of(step, num_classes=3), At(step, 3)) for step in (1, 2, 3)]
    assert all(math.isfinite(value) for row in rows for value in row.values() if value is not None)
    assert float((weights_of(learner.student) - before).abs().max()) > 1e-3
    if name == "embedding_matching":
        expected = [(0.75 + 0.25 * math.exp(-5 * (1 - t / 3) ** 2)) * math.log(3) for t in (1, 2, 3)]
        assert [row["threshold_nats"] for row in rows] == pytest.approx(expected)
        assert rows[0]["loss_en"] == pytest.approx(math.log(3), abs=0.5)


def test_more_classes_than_a_method_serves_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(kind.max_classes is None for kind in KINDS.values())  # all serve what a cohort can hold
    monkeypatch.setattr(KINDS["dtc"], "max_classes", 2)
    make("dtc", num_classes=2)
    message = "more classes than this method can serve.*dtc.*at most 2 with the background, the cohort has 3"
    with pytest.raises(ConfigError, match=message):
        make("dtc", num_classes=3)


def test_weights_and_their_ramps() -> None:
    """Full at the last step, for CCT after a tenth of the run; MTC's and DTC's regression are constant."""
    ramp = math.exp(-5 * 0.75**2)
    for step, cct, dtc in ((25, 3.0, ramp), (100, 3.0, 1.0)):
        assert make("cct").weights(At(step, 100)) == {"consistency": cct}
        assert make("dtc").weights(At(step, 100)) == {"sdf": 0.3, "consistency": pytest.approx(dtc)}
        assert make("mtc").weights(At(step, 100)) == {"reconstruction": 1.0}
    assert make("cct").weights(At(5, 100))["consistency"] == pytest.approx(3 * math.exp(-5 * 0.5**2))
    assert make("mean_teacher").weights(At(25, 100))["consistency"] == pytest.approx(0.1 * ramp)
    assert make("cct", method__consistency_ramp=0.0).weights(At(1, 100)) == {"consistency": 3.0}


def test_passes_a_step() -> None:
    def passes(name: str, **overrides: Any) -> tuple[float, ...]:
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        return tuple(passes_per_step(train_config(cohort="c", run="r", method=name, overrides=keys)))

    assert passes("supervised") == (1, 1, 0)
    assert passes("mean_teacher") == (3, 2, 0)
    assert passes("uamt", method__passes=8) == (11, 2, 0)
    assert passes("cct") == (2, 2, 3)
    assert passes("mtc") == (2, 2, 2)
    assert passes("dtc") == (2, 2, 0)
    # Two of the student, five of the teacher, and one for the slot's references.
    assert passes("embedding_matching", matching__kind="prototypes") == (8, 2, 0)
    # Or 30 patches of a bank every 50 steps of 2 slots.
    assert passes("embedding_matching", references__patches=30, references__every_steps=50) == (7.3, 2, 0)
    assert str(Passes(7.32, 2)) == "7.32 forward, 2 backward"
    assert str(Passes(2, 2, 3)) == "2 forward, 2 backward, 3 decoders"


# The step


def test_eq_5_by_hand() -> None:
    """Two slots at T = 50 of 100, sums over slots: L_S .314053 + .5, L_UA .657881 + .3, L_NN .748933 + .1, L_EN .643961
    + .6. Means .4070265, .4789405, .4244665, .6219805. Weights 1, .0716262, .0358131, .0358131:
    .4070265 + .0343047 + .0152015 + .0222750 = .4788077."""
    logged = {
        "loss_supervised": 0.314053 + 0.5,
        "loss_ua": 0.657881 + 0.3,
        "loss_nn": 0.748933 + 0.1,
        "loss_en": 0.643961 + 0.6,
        "threshold_nats": 2 * 0.569508,
        "coverage_reliable/part": 12.0,
        "coverage_reliable/whole": 16.0,
        "matched_accuracy/part": 0.0,
        "matched_accuracy/whole": 0.0,
    }
    row = record(
        logged,
        method=EmbeddingMatching(MethodConfig(), num_classes=2, matching=MatchingConfig(), draws=1),
        at=At(50, 100),
        batch_size=2,
    )
    assert row["loss"] == pytest.approx(0.4788077, abs=1e-6)
    assert row["step"] == 50
    assert row["weight_supervised"] == 1.0
    assert (row["weight_ua"], row["weight_nn"]) == pytest.approx((0.0716262, 0.0358131), abs=1e-7)
    assert (row["loss_ua"], row["loss_en"]) == pytest.approx((0.4789405, 0.6219805))
    assert row["threshold_nats"] == pytest.approx(0.569508)
    assert row["coverage_reliable"] == 0.75
    assert row["matched_accuracy"] is None  # a share of nothing


def test_the_gradient_is_eq_5s() -> None:
    """The step's gradient is that of the weighted sum written out, term by term, from one forward pass."""
    method, batch, at = make("embedding_matching"), batch_of(1), At(2, 3)
    learner = new_learner()
    take_step(learner, method, batch, at)
    by_step = torch.cat([p.grad.flatten() for p in learner.student.parameters()])

    other = new_learner()
    passes = torch_generators(3, Purpose.TEACHER, 1, (0, 1), method.teacher_passes)
    targets = method.teach(other.teacher, batch, at, passes)
    draws = torch_generators(3, Purpose.STUDENT_LABELLED, 1, (0, 1))
    with keyed(other.student, draws):
        labelled = other.student(add_noise(batch.labelled_image, 0.02, None, draws))
    draws = torch_generators(3, Purpose.STUDENT_UNLABELLED, 1, (0, 1))
    with keyed(other.student, draws):
        unlabelled = other.student(add_noise(batch.unlabelled_image, 0.02, None, draws))
    losses = method.terms(unlabelled, targets).losses
    ramp = math.exp(-5 * (1 - 2 / 3) ** 2)
    loss = supervised_loss(labelled.logits, batch.labelled_target).mean()
    loss = loss + 0.25 * ramp * losses["ua"].mean() + 0.125 * ramp * (losses["nn"] + losses["en"]).mean()
    expected = torch.autograd.grad(loss, list(other.student.parameters()))
    torch.testing.assert_close(by_step, torch.cat([g.flatten() for g in expected]), rtol=0, atol=1e-12)


def test_the_teacher_follows_after_the_step() -> None:
    """Step 1: teacher = (teacher + new student) / 2, the EMA rule at T = 1."""
    learner = new_learner()
    before = weights_of(learner.teacher)
    take_step(learner, make("supervised"), batch_of(1), At(1, 3))
    expected = 0.5 * before + 0.5 * weights_of(learner.student)
    torch.testing.assert_close(weights_of(learner.teacher), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["supervised", *SEMI_SUPERVISED])
def test_micro_batches_change_nothing(name: str) -> None:
    results = []
    for slots_per_pass in (1, 2, 4):
        method = make(name)
        learner = new_learner(method=method)
        rows = [
            take_step(learner, method, batch_of(step, 4), At(step, 2), slots_per_pass=slots_per_pass, batch_size=4)
            for step in (1, 2)
        ]
        results.append((weights_of(learner.student), rows))
    for weights, rows in results[1:]:
        torch.testing.assert_close(weights, results[0][0], rtol=0, atol=1e-12)
        for row, expected in zip(rows, results[0][1], strict=True):
            assert row == pytest.approx(expected, abs=1e-12)


def test_where_gradients_go() -> None:
    """L_NN reaches the student's logits alone (its pseudo-label is a constant), L_EN its embeddings alone."""
    method = make("embedding_matching")
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, *CUBE, generator=random, dtype=F64).requires_grad_()
    embeddings = torch.randn(1, 3, *CUBE, generator=random, dtype=F64).requires_grad_()
    targets = Targets(
        label=torch.zeros(1, *CUBE, dtype=torch.long),
        reliable=torch.zeros(1, *CUBE, dtype=torch.bool),
        references=torch.randn(1, 2, 3, generator=random, dtype=F64),
        present=torch.ones(1, 2, dtype=torch.bool),
    )
    losses = method.terms(NetworkOutput(logits, embeddings), targets).losses

    def reached(loss: Tensor) -> tuple[bool, bool]:
        grads = torch.autograd.grad(loss.sum(), [logits, embeddings], allow_unused=True, retain_graph=True)
        return tuple(g is not None and bool(g.abs().max() > 0) for g in grads)

    assert reached(losses["nn"]) == (True, False)
    assert reached(losses["en"]) == (False, True)
    assert losses["ua"].item() == 0.0


def test_slots_pair_with_their_own_references() -> None:
    """What slot 0 matches does not change when slot 1's labelled patch does; a slot without a surface has no part."""
    method, learner = make("embedding_matching", method__threshold="fixed", method__threshold_value=0.0), new_learner()
    passes = lambda: torch_generators(3, Purpose.TEACHER, 1, (0, 1), method.teacher_passes)  # noqa: E731  # one-liner
    first = batch_of(1)
    other = collate([one_slot(1, 0), one_slot(1, 1, label=0)])
    output = learner.student(first.unlabelled_image)
    terms = [method.terms(output, method.teach(learner.teacher, b, At(1, 3), passes())) for b in (first, other)]
    for name in ("ua", "nn", "en"):
        torch.testing.assert_close(terms[0].losses[name][0], terms[1].losses[name][0], rtol=0, atol=1e-12)
    assert terms[1].losses["nn"][1].item() == terms[1].losses["en"][1].item() == 0.0
    assert terms[1].shares["coverage_matched"].part.tolist() == [SIZE**3, 0]
    assert terms[1].shares["slots_with_surface"].part.tolist() == [True, False]


def test_the_reference_pass_is_deterministic() -> None:
    """Prototypes come from a pass without noise or dropout: whatever the keys, they are the same."""
    method, learner, batch = make("embedding_matching", method__teacher_noise_sigma=5.0), new_learner(), batch_of(1)
    targets = [
        method.teach(learner.teacher, batch, At(1, 3), torch_generators(seed, Purpose.TEACHER, 1, (0, 1), 2))
        for seed in (1, 2)
    ]
    assert torch.equal(targets[0].references, targets[1].references)
    assert not torch.equal(targets[0].label, targets[1].label)
    with torch.no_grad():
        embeddings = learner.teacher.eval()(batch.reference_image).embeddings.flatten(2)
    for slot in range(2):
        for value in range(2):
            index = batch.reference_index[slot, value]
            units = torch.nn.functional.normalize(embeddings[slot][:, index], dim=0)
            torch.testing.assert_close(targets[0].references[slot, value], units.mean(1), rtol=0, atol=1e-12)


def test_shares_of_a_step() -> None:
    row = take_step(new_learner(), make("embedding_matching"), batch_of(1), At(1, 3))
    assert row["coverage_reliable"] + row["coverage_matched"] == pytest.approx(1.0)
    for name in ("foreground_labelled", "foreground_unlabelled", "foreground_pseudo", "slots_with_surface"):
        assert 0 <= row[name] <= 1
    weighted = sum(row[f"weight_{n}"] * row[f"loss_{n}"] for n in ("supervised", "ua", "nn", "en"))
    assert row["loss"] == pytest.approx(weighted, abs=1e-12)
    assert not any(name.endswith("accuracy") for name in row)  # nobody opened the truth
