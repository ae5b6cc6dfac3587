"""The gradient step and its parts, and the field's usual step as the peer, on the same tensors in one run.

Keys (presets `small` and `xie2024`, 32^3 patches on a CPU, 96^3 on a GPU, batch of 2 slots; ratios of medians):
  step_over_network.METHOD           step of `small` / the network passes it makes, run alone
  step_over_network.METHOD.xie2024   the same for `xie2024`
  step_over_peer.uamt                our UA-MT step / a UA-MT step as the field writes it (a Python loop over passes)
  step_s.METHOD, part_s.PART         seconds, of `small`
  passes.decoder_8_over_full         8 decoder-only dropout passes / one full pass
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from distseg.config.compose import train_config
from distseg.config.schema import TrainRunConfig
from distseg.data.batch import Batch
from distseg.data.keys import Purpose, torch_generators
from distseg.inference.model import build_network
from distseg.losses.supervised import supervised_loss
from distseg.matching.prototypes import class_prototypes, prototype_similarity
from distseg.methods import make_method
from distseg.methods.base import At
from distseg.methods.uncertainty import uncertainty_and_label
from distseg.networks.dropout import keyed
from distseg.networks.ema import make_teacher, update_teacher
from distseg.networks.stochastic import stochastic_logits
from distseg.training.clock import Clock
from distseg.training.reduce import FlatGradients, SingleProcess
from distseg.training.step import Learner, StepSettings, training_step
from tests.bench.timing import Timing, interleaved

METHODS = ("supervised", "mean_teacher", "uamt", "embedding_matching")
SLOTS, AT = 2, At(500, 1000)


def run(rounds: int = 5) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results: dict[str, float] = {}
    for preset in ("small", "xie2024"):
        results |= _run_preset(preset, device, rounds)
    return results


def _run_preset(preset: str, device: torch.device, rounds: int) -> dict[str, float]:
    bench = _Bench(preset, device)
    timings = interleaved(bench.functions(), rounds=rounds, device=device)
    _print(f"{preset}, {bench.side}^3, {SLOTS} slots, {device}, {torch.get_num_threads()} thread(s)", timings)
    suffix = "" if preset == "small" else f".{preset}"
    keys = {}
    for method in METHODS:
        network = sum(timings[part].median for part in bench.passes_of(method))
        keys[f"step_over_network.{method}{suffix}"] = timings[f"step {method}"].median / network
        keys[f"step_s.{method}{suffix}"] = timings[f"step {method}"].median
    keys[f"step_over_peer.uamt{suffix}"] = timings["step uamt"].median / timings["peer uamt"].median
    full, eight = timings["pass: full, 1 pass"].median, timings["pass: decoder dropout, 8 passes"].median
    keys[f"passes.decoder_8_over_full{suffix}"] = eight / full
    for name, timing in timings.items():
        if name.startswith("part "):
            keys[f"part_s.{name.removeprefix('part ').replace(' ', '_')}{suffix}"] = timing.median
    Console().print({k: round(v, 3) for k, v in keys.items() if "_s." not in k})
    return keys


class _Bench:
    """The tensors, networks and functions of one preset."""

    def __init__(self, preset: str, device: torch.device) -> None:
        self.device = device
        self.side = 32 if device.type == "cpu" else 96
        self.config = _config(preset, "embedding_matching", self.side)
        torch.manual_seed(0)
        self.student = build_network(self.config.network, num_classes=2).to(device).train()
        self.teacher = make_teacher(self.student)
        self.decoder_only = make_teacher(
            build_network(_config(preset, "uamt", self.side, {"network.dropout": "decoder"}).network, num_classes=2)
        ).to(device)
        self.batch = _batch(self.side, device)
        self.optimizer = torch.optim.Adam(self.student.parameters(), fused=True)
        self.learner = Learner(self.student, self.teacher, self.optimizer, FlatGradients(self.student.parameters()))
        self.settings = StepSettings(
            seed=0, batch_size=SLOTS, slots_per_pass=SLOTS, keyed=device.type == "cpu", ema_decay=0.99,
            student_noise_sigma=0.02, autocast=torch.bfloat16 if device.type == "cuda" else None,
        )  # fmt: skip
        with torch.inference_mode(), self.settings.precision(device):
            self.output = self.student(self.batch.unlabelled_image)
            self.passes = self._teacher_passes(5).float()
        self.output = type(self.output)(*(t.float().clone() for t in self.output))
        self.passes = self.passes.clone()
        self.prototypes = class_prototypes(self.output.embeddings, self.batch.reference_index)

    def passes_of(self, method: str) -> list[str]:
        student = "pass: student L, forward + backward" if method == "supervised" else "pass: student L+U, fwd + bwd"
        teacher = {
            "supervised": [],
            "mean_teacher": ["pass: teacher, 1 pass"],
            "uamt": ["pass: teacher, 9 passes"],
            "embedding_matching": ["pass: teacher, 5 passes", "pass: references"],
        }[method]
        return [student, *teacher]

    def functions(self) -> dict[str, Callable[[], object]]:
        batch = self.batch
        steps: dict[str, Callable[[], object]] = {f"step {name}": self._step(name) for name in METHODS}
        return {
            "pass: full, 1 pass": self._inference(lambda: self.teacher(batch.unlabelled_image)),
            "pass: student L, forward + backward": self._student(batch.labelled_image),
            "pass: student L+U, fwd + bwd": self._student(torch.cat([batch.labelled_image, batch.unlabelled_image])),
            "pass: teacher, 1 pass": self._inference(lambda: self._teacher_passes(1)),
            "pass: teacher, 5 passes": self._inference(lambda: self._teacher_passes(5)),
            "pass: teacher, 9 passes": self._inference(lambda: self._teacher_passes(9)),
            "pass: references": self._inference(lambda: self.teacher(batch.reference_image)),
            "pass: decoder dropout, 8 passes": self._inference(self._decoder_passes),
            "part prototypes": lambda: class_prototypes(self.output.embeddings, batch.reference_index),
            "part similarity": lambda: prototype_similarity(
                self.output.embeddings, self.prototypes, batch.reference_present
            ),
            "part uncertainty": lambda: uncertainty_and_label(self.passes, uncertainty="mean_of_entropies"),
            "part supervised loss": lambda: supervised_loss(self.output.logits, batch.labelled_target),
            "part EMA": lambda: update_teacher(self.teacher, self.student, decay=0.99),
            "part optimizer": self.optimizer.step,
            **steps,
            "peer uamt": self._peer_uamt,
        }

    def _step(self, name: str) -> Callable[[], object]:
        method = make_method(_config(self.config.preset, name, self.side), num_classes=2)
        clock = Clock(torch.device("cpu"))
        return lambda: training_step(
            self.learner, self.batch, method=method, at=AT, settings=self.settings,
            communicator=SingleProcess(), clock=clock,
        )  # fmt: skip

    def _generators(self, passes: int) -> list[torch.Generator] | None:
        return torch_generators(0, Purpose.TEACHER, 1, range(SLOTS), passes) if self.settings.keyed else None

    def _teacher_passes(self, passes: int) -> Tensor:
        return stochastic_logits(
            self.teacher, self.batch.unlabelled_image, passes=passes, noise_sigma=0.01,
            generators=self._generators(passes),
        )  # fmt: skip

    def _decoder_passes(self) -> Tensor:
        return stochastic_logits(
            self.decoder_only, self.batch.unlabelled_image, passes=8, noise_sigma=0.01, generators=self._generators(8)
        )

    def _inference(self, function: Callable[[], object]) -> Callable[[], object]:
        def timed() -> None:
            with torch.inference_mode(), self.settings.precision(self.device):
                function()

        return timed

    def _student(self, images: Tensor) -> Callable[[], object]:
        generators = self._generators(len(images) // SLOTS)

        def forward_backward() -> None:
            self.learner.gradients.zero()
            with keyed(self.student, generators), self.settings.precision(self.device):
                logits = self.student(images).logits
            logits.float().mean().backward()

        return forward_backward

    def _peer_uamt(self) -> None:
        """UA-MT's step as its public code writes it: `repeat`, a Python loop over passes, fp32, autograd left to
        `no_grad`, Dice and cross-entropy from a softmax each (BASELINES section 2)."""
        student, teacher, batch = self.student, self.teacher, self.batch
        images = torch.cat([batch.labelled_image, batch.unlabelled_image])
        logits = student(images).logits
        unlabelled = batch.unlabelled_image
        teacher.train()
        with torch.no_grad():
            noise = torch.clamp(torch.randn_like(unlabelled) * 0.1, -0.2, 0.2)
            target = torch.softmax(teacher(unlabelled + noise).logits, 1)
            repeated = unlabelled.repeat(2, 1, 1, 1, 1)
            preds = torch.zeros(8 * SLOTS, *logits.shape[1:], device=self.device)
            for i in range(4):
                noisy = repeated + torch.clamp(torch.randn_like(repeated) * 0.1, -0.2, 0.2)
                preds[2 * SLOTS * i : 2 * SLOTS * (i + 1)] = teacher(noisy).logits
            preds = torch.softmax(preds, 1).reshape(8, SLOTS, *logits.shape[1:]).mean(0)
            uncertainty = -1.0 * torch.sum(preds * torch.log(preds + 1e-6), dim=1, keepdim=True)
        teacher.eval()
        labelled = logits[:SLOTS]
        soft = torch.softmax(labelled, 1)[:, 1]
        truth = (batch.labelled_target == 1).float()
        dice = 1 - (2 * (soft * truth).sum() + 1e-5) / ((soft * soft).sum() + truth.sum() + 1e-5)
        loss = 0.5 * (functional.cross_entropy(labelled, batch.labelled_target) + dice)
        mask = (uncertainty < 0.6).float()
        distance = (torch.softmax(logits[SLOTS:], 1) - target) ** 2
        loss = loss + 0.05 * torch.sum(mask * distance) / (2 * torch.sum(mask) + 1e-16)
        self.learner.gradients.zero()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for ema, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                ema.mul_(0.99).add_(parameter, alpha=0.01)


def _config(preset: str, method: str, side: int, more: dict[str, object] | None = None) -> TrainRunConfig:
    overrides = {"sampling.patch_zyx": [side] * 3, "train.steps": 1000, **(more or {})}
    return train_config(cohort="-", run="-", preset=preset, method=method, overrides=overrides)


def _batch(side: int, device: torch.device) -> Batch:
    """A ball in noise, so that surfaces and foreground are there."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side)] * 3, indexing="ij"))
    ball = (grid.norm(dim=0) < 0.5).long()
    images = [ball + 0.3 * torch.randn(SLOTS, 1, side, side, side, generator=generator) for _ in range(2)]
    inside, outside = (torch.nonzero((ball == value).flatten()).flatten() for value in (1, 0))
    index = torch.stack([outside[:80], inside[:80]])[None].repeat(SLOTS, 1, 1)
    batch = Batch(
        step=1,
        slots=tuple(range(SLOTS)),
        scan_ids=("a", "b"),
        labelled_image=images[0],
        labelled_target=ball[None].repeat(SLOTS, 1, 1, 1),
        unlabelled_image=images[1],
        reference_image=images[0],
        reference_index=index,
        reference_present=torch.ones(SLOTS, 2, dtype=torch.bool),
    )
    return batch.to(device, torch.float32)


def _print(title: str, timings: dict[str, Timing]) -> None:
    table = Table(title=title)
    for column in ("", "median ms", "min", "max"):
        table.add_column(column, justify="left" if not column else "right")
    for name, timing in timings.items():
        table.add_row(name, *(f"{1e3 * s:.2f}" for s in (timing.median, timing.minimum, timing.maximum)))
    Console().print(table)
