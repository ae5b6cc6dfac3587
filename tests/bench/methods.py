"""What a step of every method costs, on the same tensors in one run: equal steps are not equal compute.

Preset `small`, batch of 2 slots, 32^3 patches on a CPU and 96^3 on a GPU; embedding matching by prototypes (against the
bank: tests/bench/bank.py). Keys:
  step_over_supervised.METHOD   median step / median step of `supervised`
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from distseg.config.schema import METHOD_NAMES
from distseg.data.signed_distance import signed_distances
from distseg.networks.ema import make_teacher
from distseg.training.clock import Clock
from distseg.training.optimizer import make_optimizer
from distseg.training.reduce import FlatGradients, SingleProcess
from distseg.training.step import Learner, training_step
from tests.bench.step import bench_device
from tests.bench.step_parts import AT, StepBench
from tests.bench.timing import clock_name, interleaved


def run(rounds: int = 7) -> dict[str, float]:
    device = bench_device()
    bench = StepBench("small", device)
    timings = interleaved({name: _step(bench, name) for name in METHOD_NAMES}, rounds=rounds, device=device)
    table = Table(title=f"a step, small, {bench.side}^3, {device}, {clock_name(device)}, {rounds} rounds")
    for column in ("method", "passes a slot", "median ms", "min", "over supervised"):
        table.add_column(column, justify="left" if column in ("method", "passes a slot") else "right")
    base = timings["supervised"].median
    for name, timing in timings.items():
        times = (f"{1e3 * timing.median:.0f}", f"{1e3 * timing.minimum:.0f}", f"{timing.median / base:.2f}")
        table.add_row(name, str(bench.method(name).passes), *times)
    Console().print(table)
    return {f"step_over_supervised.{name}": timing.median / base for name, timing in timings.items()}


def _step(bench: StepBench, name: str) -> Callable[[], object]:
    """With networks of its own, and the heads and targets the method asks for."""
    device, num_classes = bench.device, bench.case.num_classes
    method, student = bench.method(name), copy.deepcopy(bench.student)
    heads = method.make_heads(student)
    parameters = list(student.parameters())
    if heads is not None:
        parameters += heads.to(device).train().parameters()
    optimizer = make_optimizer(parameters, bench.config.optimizer)
    learner = Learner(student, make_teacher(student), optimizer, FlatGradients(parameters, slots=2), heads)
    labels = bench.batch.labelled_target.cpu().numpy()
    maps = [torch.from_numpy(signed_distances(label, num_classes, spacing_mm=(1, 1, 1))) for label in labels]
    batch = dataclasses.replace(bench.batch, labelled_distance=torch.stack(maps).to(device))
    clock = Clock(torch.device("cpu"))
    return lambda: training_step(
        learner, batch, method=method, at=AT, settings=bench.settings, communicator=SingleProcess(), clock=clock
    )
