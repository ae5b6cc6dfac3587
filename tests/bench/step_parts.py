"""The tensors, networks and functions that the step's benchmarks time: all a step is made of, apart and whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distseg.config.compose import train_config
from distseg.config.schema import TrainRunConfig
from distseg.data.batch import Batch
from distseg.data.keys import Purpose, torch_generators
from distseg.inference.model import build_network
from distseg.losses.supervised import supervised_loss
from distseg.matching.prototypes import class_prototypes, prototype_similarity
from distseg.methods import make_method
from distseg.methods.base import At, Method
from distseg.methods.uncertainty import uncertainty_and_label
from distseg.networks.dropout import keyed
from distseg.networks.ema import make_teacher, update_teacher
from distseg.networks.stochastic import stochastic_logits
from distseg.networks.unet import NetworkOutput, UNet3D
from distseg.training.allocator import keep_large_buffers
from distseg.training.clock import Clock
from distseg.training.optimizer import make_optimizer
from distseg.training.precision import resolved_precision
from distseg.training.reduce import FlatGradients, SingleProcess
from distseg.training.step import Learner, StepSettings, training_step
from tests.bench.peer_uamt import peer_uamt_step

# Timed whole, beside the passes that `StepBench.passes_of` counts for each. Methods with heads of their own bring more
# network; their passes a step stand in a benchmark's tables.
METHODS = ("supervised", "mean_teacher", "uamt", "embedding_matching")
SLOTS, AT = 2, At(500, 1000)

Functions = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """What grows: the patch, the classes, the teacher's passes. `slots_per_pass`: fewer take less memory."""

    preset: str = "small"
    side: int | None = None  # of the cubic patch; None: 32 on a CPU, 96 on a GPU
    num_classes: int = 2
    passes: int = 5
    slots_per_pass: int = SLOTS


class StepBench:
    """One preset on one device, with random tensors."""

    def __init__(self, preset: str, device: torch.device, case: Case | None = None) -> None:
        self.case, self.device = case or Case(preset), device
        if device.type == "cpu":
            keep_large_buffers()  # as every run does
        self.side = self.case.side or (32 if device.type == "cpu" else 96)
        self.config = self._config("embedding_matching")
        torch.manual_seed(0)
        self.student = self._network("all").train()
        self.teacher = make_teacher(self.student)
        self.batch = _batch(self.side, self.case.num_classes, device)
        self.optimizer = make_optimizer(self.student.parameters(), self.config.optimizer)
        self.learner = Learner(
            self.student, self.teacher, self.optimizer, FlatGradients(self.student.parameters(), slots=2)
        )
        bfloat16 = resolved_precision("auto", device) == "bfloat16"
        self.settings = StepSettings(
            seed=0, batch_size=SLOTS, slots_per_pass=self.case.slots_per_pass, keyed=device.type == "cpu",
            ema_decay=0.99, student_noise_sigma=0.02, autocast=torch.bfloat16 if bfloat16 else None,
        )  # fmt: skip
        with torch.inference_mode(), self.settings.precision(device):
            output = self.student(self.batch.unlabelled_image)
        self.output = NetworkOutput(*(t.float().clone() for t in output))
        self.prototypes = class_prototypes(self.output.embeddings, self.batch.reference_index)

    def _config(self, method: str, **overrides: object) -> TrainRunConfig:
        keys = {"sampling.patch_zyx": [self.side] * 3, "train.steps": 1000, **overrides}
        if method == "embedding_matching":
            keys["method.passes"] = self.case.passes
        # Matching as the paper has it; against the bank: tests/bench/bank.py.
        return train_config(
            cohort="-", run="-", preset=self.case.preset, method=method, matching="prototypes", overrides=keys
        )

    def _network(self, dropout: str) -> UNet3D:
        config = self._config("supervised", **{"network.dropout": dropout}).network
        return build_network(config, num_classes=self.case.num_classes).to(self.device)

    def method(self, name: str) -> Method:
        return make_method(self._config(name), num_classes=self.case.num_classes)

    # --- network passes: what a step costs at least ---

    def passes_of(self, method: str) -> Functions:
        """The network passes of one step of `method`, as they would run alone; names are shared between methods."""
        kind, batch = self.method(method), self.batch
        both = torch.cat([batch.labelled_image, batch.unlabelled_image])
        passes: Functions = {}
        if kind.uses_unlabelled:
            passes["student, L + U: forward + backward"] = self._student(both)
        else:
            passes["student, L: forward + backward"] = self._student(batch.labelled_image)
        if kind.teacher_passes:
            passes[_teacher(kind.teacher_passes)] = self.teacher_passes(kind.teacher_passes, self.teacher)
        if kind.needs_references:
            passes["teacher, references: one pass"] = self.inference(lambda: self.teacher(batch.reference_image))
        return passes

    def other_passes(self) -> Functions:
        """One pass of all dropout, and eight of networks whose passes share what comes before dropout."""
        functions: Functions = {
            "student, L + U: forward": self.inference(
                lambda: self.student(torch.cat([self.batch.labelled_image, self.batch.unlabelled_image]))
            ),
            _teacher(1): self.teacher_passes(1, self.teacher),
            _teacher(8): self.teacher_passes(8, self.teacher),
        }
        for dropout in ("decoder", "last"):
            functions[_teacher(8, dropout)] = self.teacher_passes(8, make_teacher(self._network(dropout)))
        return functions

    def teacher_passes(self, passes: int, network: UNet3D) -> Callable[[], object]:
        return self.inference(
            lambda: stochastic_logits(
                network, self.batch.unlabelled_image, passes=passes, noise_sigma=0.01,
                generators=self._generators(passes),
            )
        )  # fmt: skip

    def _student(self, images: Tensor) -> Callable[[], object]:
        per_pass = len(images) * self.case.slots_per_pass // SLOTS

        def forward_backward() -> None:
            self.learner.gradients.zero()
            for part in images.split(per_pass):
                with keyed(self.student, self._generators(1, len(part))), self.settings.precision(self.device):
                    logits = self.student(part).logits
                logits.float().mean().backward()

        return forward_backward

    def inference(self, function: Callable[[], object]) -> Callable[[], object]:
        def timed() -> None:
            with torch.inference_mode(), self.settings.precision(self.device):
                function()

        return timed

    def _generators(self, passes: int, slots: int = SLOTS) -> list[torch.Generator] | None:
        return torch_generators(0, Purpose.TEACHER, 1, range(slots), passes) if self.settings.keyed else None

    # --- the rest of a step, and the whole ---

    def parts(self) -> Functions:
        """What a step does beside its passes."""
        batch, output = self.batch, self.output
        present = batch.reference_present
        passes = torch.randn(self.case.passes, *output.logits.shape, device=self.device)

        def losses() -> None:
            leaves = NetworkOutput(*(t.detach().requires_grad_() for t in output))
            terms = method.terms(leaves, targets).losses
            terms["supervised"] = supervised_loss(leaves.logits, batch.labelled_target)
            torch.stack([value.sum() for value in terms.values()]).sum().backward()

        method = self.method("embedding_matching")
        targets = method.teach(self.teacher, batch, AT, self._generators(method.teacher_passes))
        return {
            "teacher's label and entropy": lambda: uncertainty_and_label(passes, uncertainty="mean_of_entropies"),
            "references to prototypes": lambda: class_prototypes(output.embeddings, batch.reference_index),
            "matching": lambda: prototype_similarity(output.embeddings, self.prototypes, present).max(1),
            "losses, matching in them: forward + backward": losses,
            "EMA": lambda: update_teacher(self.teacher, self.student, decay=0.99),
            "optimizer": self.optimizer.step,
        }

    def step(self, name: str) -> Callable[[], object]:
        method, clock = self.method(name), Clock(torch.device("cpu"))
        return lambda: training_step(
            self.learner, self.batch, method=method, at=AT, settings=self.settings,
            communicator=SingleProcess(), clock=clock,
        )  # fmt: skip

    def peer(self) -> Callable[[], object]:
        return lambda: peer_uamt_step(self.learner, self.batch)


def _teacher(passes: int, dropout: str = "all") -> str:
    where = "" if dropout == "all" else f", network.dropout={dropout}"
    return f"teacher, {passes} pass{'es' if passes > 1 else ''}{where}"


def _batch(side: int, num_classes: int, device: torch.device) -> Batch:
    """A box in slabs, one a class, in noise."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(side, side, side, dtype=torch.int64)
    low, high = side // 6, side - side // 6
    slabs = torch.arange(high - low) * (num_classes - 1) // (high - low) + 1
    label[low:high, low:high, low:high] = slabs[:, None, None]
    images = [label + 0.3 * torch.randn(SLOTS, 1, side, side, side, generator=generator) for _ in range(2)]
    voxels = [torch.nonzero((label == value).flatten()).flatten() for value in range(num_classes)]
    index = torch.stack([v[torch.randint(len(v), (80,), generator=generator)] for v in voxels])
    batch = Batch(
        step=1,
        slots=tuple(range(SLOTS)),
        scan_ids=("a", "b"),
        labelled_image=images[0],
        labelled_target=label[None].repeat(SLOTS, 1, 1, 1),
        unlabelled_image=images[1],
        reference_image=images[0],
        reference_index=index[None].repeat(SLOTS, 1, 1),
        reference_present=torch.ones(SLOTS, num_classes, dtype=torch.bool),
    )
    return batch.to(device, torch.float32)
