"""The options of a step that depend on the device: what each gains, and what bfloat16 does to the teacher's labels.

    python -m tests.bench precision [--trained RUN --cohort COHORT] [--json FILE]

An `embedding_matching` step with `train.precision=bfloat16`, `train.channels_last` and `train.compile` beside the plain
one in float32; batch of 2 slots, 32^3 on a CPU, 96^3 on a GPU. With a trained run, its teacher's M = 5 passes over
patches uniform in the body of held-out scans in both precisions, by the same noise and masks. Keys:
  precision.OPTION_over_plain            step with the option / plain step (of `small`; `.xie2024` of that preset)
  precision.labels_equal                 share of voxels with the same label in bfloat16 (target >= .995)
  precision.foreground_dice              of the two foregrounds
  precision.labels_equal_where_unsure    where the entropy is >= 0.75 ln K
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distseg.data.cohort import Cohort
from distseg.data.keys import Purpose, generator, torch_generators
from distseg.data.patches import PatchReader
from distseg.inference.model import load_model
from distseg.methods.uncertainty import uncertainty_and_label
from distseg.networks.ema import make_teacher
from distseg.networks.stochastic import stochastic_logits
from distseg.training.compiled import compile_network
from distseg.training.optimizer import make_optimizer
from distseg.training.reduce import FlatGradients
from distseg.training.step import Learner
from tests.bench.step import bench_device
from tests.bench.step_parts import StepBench
from tests.bench.timing import clock_name, interleaved

METHOD = "embedding_matching"
PATCHES, BATCH, PASSES, SEED = 8, 4, 5, 0  # patches of a scan


def run(trained: str | None = None, cohort: str | None = None, rounds: int = 5) -> dict[str, float]:
    device = bench_device()
    keys: dict[str, float] = {}
    for preset, suffix in (("small", ""), ("xie2024", ".xie2024")):
        steps = {option: _step(preset, device, option) for option in ("plain", "bfloat16", "channels_last", "compile")}
        timings = interleaved(steps, rounds=rounds, device=device)
        table = Table(title=f"{METHOD}, {preset}, {device}, {clock_name(device)}, {rounds} rounds")
        for column in ("", "median ms", "min", "max"):
            table.add_column(column, justify="right" if column else "left")
        for option, timing in timings.items():
            table.add_row(option, *(f"{1e3 * s:.1f}" for s in (timing.median, timing.minimum, timing.maximum)))
            keys[f"precision.{option}_over_plain{suffix}"] = timing.median / timings["plain"].median
        Console().print(table)
    keys |= _labels(trained, cohort, device) if trained and cohort else {}
    Console().print({key: round(value, 5) for key, value in keys.items()})
    return keys


def _step(preset: str, device: torch.device, option: str) -> Callable[[], object]:
    """A whole step in float32, but for the option."""
    bench = StepBench(preset, device)
    autocast = torch.bfloat16 if option == "bfloat16" else None
    bench.settings = dataclasses.replace(bench.settings, autocast=autocast)
    if option == "channels_last":
        student = bench.student.to(memory_format=torch.channels_last_3d)
        optimizer = make_optimizer(student.parameters(), bench.config.optimizer)
        bench.learner = Learner(student, make_teacher(student), optimizer, FlatGradients(student.parameters(), slots=2))
    if option == "compile":
        for network in (bench.learner.student, bench.learner.teacher):
            compile_network(network)
    return bench.step(METHOD)


def _labels(trained: str, cohort: str, device: torch.device) -> dict[str, float]:
    model, opened = load_model(trained), Cohort.open(cohort)
    teacher, size = model.networks["teacher"].to(device), model.patch_zyx
    reader = PatchReader(opened, spacing_mm=model.spacing_mm, intensity=model.intensity, memory_nbytes=2**31)
    found: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    scans = [record.scan_id for record in opened.select("val", True)]
    for number, scan_id in enumerate(scans):
        body = reader.placement(scan_id).body
        rng = generator(SEED, Purpose.VALIDATION, number)
        centres = [body[rng.integers(len(body))] for _ in range(PATCHES)]
        starts = [tuple(int(c) - n // 2 for c, n in zip(centre, size, strict=True)) for centre in centres]
        images = torch.from_numpy(np.stack([reader.image(scan_id, start, size) for start in starts]))[:, None].to(
            device
        )
        for low, part in enumerate(images.split(BATCH)):
            for bfloat16, outputs in found.items():
                keys = torch_generators(SEED, Purpose.TEACHER, low, range(len(part)), PASSES)
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    logits = stochastic_logits(teacher, part, passes=PASSES, noise_sigma=0.01, generators=keys)
                    outputs.append(uncertainty_and_label(logits, uncertainty="mean_of_entropies"))
    (entropy, label), (_, rounded) = (map(torch.cat, zip(*outputs, strict=True)) for outputs in found.values())
    same = (label == rounded).double()
    unsure = entropy >= 0.75 * math.log(len(model.class_names))
    both = ((label > 0) & (rounded > 0)).sum() * 2 / ((label > 0).sum() + (rounded > 0).sum())
    Console().print(f"{label.numel()} voxels of {len(scans)} held-out scans, {int(unsure.sum())} of them unsure")
    return {
        "precision.labels_equal": same.mean().item(),
        "precision.labels_equal_where_unsure": same[unsure].mean().item(),
        "precision.foreground_dice": both.item(),
    }
