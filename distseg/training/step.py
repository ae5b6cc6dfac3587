"""One gradient step of the teacher-student loop: read this first.

A slot is one labelled and one unlabelled patch. Noise and dropout belong to the slot's key, every term is a value per
slot, and the loss is their mean over the global batch. So the result depends neither on how many ranks share the slots
nor on where a run was interrupted.

Shapes: B slots of this rank, K classes, E embedding width, Z Y X voxels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from distseg.data.batch import Batch
from distseg.data.keys import Purpose, torch_generators, torch_seed
from distseg.losses.supervised import IGNORE, supervised_loss
from distseg.methods.base import At, Method, StudentPass, Terms
from distseg.networks.best_class import best_class
from distseg.networks.dropout import keyed
from distseg.networks.ema import ema_decay, update_teacher
from distseg.networks.stochastic import add_noise
from distseg.networks.unet import NetworkOutput, UNet3D
from distseg.training.clock import Clock
from distseg.training.optimizer import step_where_finite
from distseg.training.reduce import Communicator, FlatGradients


@dataclass(frozen=True)
class Learner:
    """What a step changes. `heads` are the student's, of a method that has some; the teacher has none."""

    student: UNet3D
    teacher: UNet3D
    optimizer: torch.optim.Optimizer
    gradients: FlatGradients
    heads: nn.Module | None = None


@dataclass(frozen=True)
class StepSettings:
    """What stays the same from step to step."""

    seed: int
    batch_size: int  # slots over all ranks
    slots_per_pass: int  # of this rank's slots, how many run as one batch: less memory, the same result
    keyed: bool  # noise and dropout by slot; off on a GPU, where a rank draws for all its slots at once
    ema_decay: float
    student_noise_sigma: float
    autocast: torch.dtype | None = None  # of the networks; losses are float32 or better

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()


def training_step(
    learner: Learner,
    batch: Batch,
    *,
    method: Method,
    at: At,
    settings: StepSettings,
    communicator: Communicator,
    clock: Clock,
) -> dict[str, Tensor]:
    """One step on this rank's slots; a collective: all ranks must call. Returns sums over all slots (see `record`).

    Where a loss or a gradient is not finite on any rank the student stays as it is: `skipped`, and `broken/SLOT`.
    """
    student, teacher, s = learner.student, learner.teacher, settings
    weights = {"supervised": 1.0, **method.weights(at)}
    logged: dict[str, Tensor] = {}
    learner.gradients.zero()
    for slots in batch.micro_batches(s.slots_per_pass):
        with s.precision(slots.labelled_image.device):
            with record_function("teacher"):
                draws = _randomness(s, Purpose.TEACHER, slots, method.teacher_passes)
                targets = method.teach(teacher, slots, at, draws)
            with record_function("student, forward"):
                seen = _student_pass(student, learner.heads, slots, s, method)

        terms = Terms({})
        if seen.unlabelled is not None:
            with clock.section("matching"), record_function("matching and its losses"):
                terms = method.terms(seen.unlabelled, targets)
            _count_foreground(logged, "foreground_unlabelled", seen.unlabelled)
        if seen.heads is not None:
            terms = terms.joined(method.head_terms(seen, slots))

        losses = {"supervised": supervised_loss(seen.labelled.logits, slots.labelled_target), **terms.losses}
        loss = sum_of(weights[name] * value.sum() for name, value in losses.items()) / s.batch_size
        _mark_broken(learner.gradients, slots, losses)
        with clock.section("network"), record_function("backward"):
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

        _count_foreground(logged, "foreground_labelled", seen.labelled)
        known = slots.labelled_target != IGNORE
        _add(logged, "foreground_target/part", ((slots.labelled_target > 0) & known).sum())
        _add(logged, "foreground_target/whole", known.sum())
        _log(logged, losses, terms, targets.threshold_nats)

    with record_function("sum over ranks"):
        logged = learner.gradients.sum_over_ranks(communicator, logged)
    finite = learner.gradients.finite()
    step_where_finite(learner.optimizer, finite)
    with record_function("moving average"):
        update_teacher(teacher, student, decay=ema_decay(at.step, s.ema_decay))
    broken = learner.gradients.broken.clone().unbind()
    return {**logged, "skipped": (~finite).float(), **{f"broken/{slot}": one for slot, one in enumerate(broken)}}


def record(logged: dict[str, float], *, method: Method, at: At, batch_size: int) -> dict[str, float | int | None]:
    """The summed numbers of a step as one line of metrics.jsonl: `loss` = sum of weight x term. None where a share
    has nothing to be a share of."""
    weights = {"supervised": 1.0, **method.weights(at)}
    row: dict[str, float | int | None] = {"step": at.step, "loss": 0.0}
    loss = 0.0
    for name, weight in weights.items():
        term = logged[f"loss_{name}"] / batch_size
        row[f"loss_{name}"], row[f"weight_{name}"] = term, weight
        loss += weight * term
    row["loss"] = loss
    if "threshold_nats" in logged:
        row["threshold_nats"] = logged["threshold_nats"] / batch_size
    for name in [n.removesuffix("/part") for n in logged if n.endswith("/part")]:
        whole = logged[f"{name}/whole"]
        row[name] = logged[f"{name}/part"] / whole if whole else None
    return row


def sum_of(values: object) -> Tensor:
    return torch.stack(list(values)).sum()  # type: ignore[call-overload]  # an iterable of tensors


def _student_pass(
    student: UNet3D, heads: nn.Module | None, slots: Batch, settings: StepSettings, method: Method
) -> StudentPass:
    """The student on labelled and unlabelled patches as one batch, then its heads; outputs in float32 or better."""
    images, draws = slots.labelled_image, _randomness(settings, Purpose.STUDENT_LABELLED, slots)
    if method.uses_unlabelled:
        images = torch.cat([images, slots.unlabelled_image])
        more = _randomness(settings, Purpose.STUDENT_UNLABELLED, slots)
        draws = None if draws is None or more is None else [*draws, *more]
    with keyed(student, draws):
        features = student.encode(add_noise(images, settings.student_noise_sigma, generators=draws))
        output = student.decode(features)
    from_heads = None
    if heads is not None:
        draws = _randomness(settings, Purpose.HEADS, slots, method.head_passes)
        from_heads = _exact(method.run_heads(heads, features, output, draws))
    logits, embeddings = _exact(output.logits), _exact(output.embeddings)
    batch = len(slots.slots)
    labelled = NetworkOutput(logits[:batch], embeddings[:batch])
    unlabelled = NetworkOutput(logits[batch:], embeddings[batch:]) if method.uses_unlabelled else None
    return StudentPass(labelled, unlabelled, from_heads)


def _exact(output: Tensor) -> Tensor:
    return output if output.dtype == torch.float64 else output.float()


def _randomness(
    settings: StepSettings, purpose: Purpose, slots: Batch, passes: int = 1
) -> list[torch.Generator] | None:
    """A generator per (pass, slot); or, where draws are not by slot, None and torch's global one seeded."""
    if settings.keyed:
        return torch_generators(settings.seed, purpose, slots.step, slots.slots, passes)
    torch.manual_seed(torch_seed(settings.seed, purpose, slots.step, slots.slots[0]))
    return None


def _mark_broken(gradients: FlatGradients, slots: Batch, losses: dict[str, Tensor]) -> None:
    """Which of these slots have a loss that is not finite; all ranks know after the sum."""
    finite = torch.stack([value.detach() for value in losses.values()]).isfinite().all(dim=0)  # [B]
    numbers = slots.slots  # every world_size-th
    stride = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    gradients.broken[numbers[0] : numbers[-1] + 1 : stride] = (~finite).to(gradients.broken)


def _count_foreground(logged: dict[str, Tensor], name: str, output: NetworkOutput) -> None:
    """The predicted foreground share: the alarm for flood and collapse (METHOD traps 9 and 10)."""
    predicted = best_class(output.logits.detach())
    _add(logged, f"{name}/part", (predicted > 0).sum())
    _add(logged, f"{name}/whole", _size(predicted))


def _size(voxels: Tensor) -> Tensor:
    """The number of elements, on their device: no copy, no wait."""
    return voxels.new_full((), voxels.numel())


def _log(logged: dict[str, Tensor], losses: dict[str, Tensor], terms: Terms, threshold: Tensor | None) -> None:
    for name, value in losses.items():
        _add(logged, f"loss_{name}", value.detach().sum())
    for name, (part, whole) in terms.shares.items():
        _add(logged, f"{name}/part", part.sum())
        _add(logged, f"{name}/whole", whole.sum())
    if threshold is not None:
        _add(logged, "threshold_nats", threshold.sum())


def _add(logged: dict[str, Tensor], name: str, value: Tensor) -> None:
    logged[name] = logged[name] + value if name in logged else value
