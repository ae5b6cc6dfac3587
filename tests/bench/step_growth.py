"""What an `embedding_matching` step costs as the patch, the classes and the teacher's passes grow (preset `small`).

One thing grows at a time from 32^3 (64^3 on a GPU), 2 classes, M = 5; batch of 2 slots, one at a time from 96^3 on a
CPU, for its memory. 128^3 takes about 10 GiB and, on one core, two minutes. Keys, of AXIS_SIZE such as patch_64,
classes_20 and passes_16:
  growth_s.AXIS_SIZE              seconds of a step, median
  growth_over_network.AXIS_SIZE   step / its network passes, run alone
  growth_mib.AXIS_SIZE            its memory beyond what is there before it
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from tests.bench.memory import peak_mib
from tests.bench.step import bench_device
from tests.bench.step_parts import SLOTS, Case, StepBench
from tests.bench.timing import clock_name, interleaved

METHOD = "embedding_matching"
SIDES, CLASSES, PASSES = (32, 48, 64, 96, 128), (2, 5, 10, 20), (1, 2, 4, 8, 16)
ONE_SLOT_FROM = 96  # on a CPU


def run() -> dict[str, float]:
    device = bench_device()
    side = 32 if device.type == "cpu" else 64
    cases = {f"patch_{n}": Case(side=n, slots_per_pass=_slots(n, device)) for n in SIDES if n >= side}
    cases |= {f"classes_{n}": Case(side=side, num_classes=n) for n in CLASSES}
    cases |= {f"passes_{n}": Case(side=side, passes=n) for n in PASSES}
    table = Table(title=f"{METHOD}, small, {SLOTS} slots, {device}, {clock_name(device)}")
    for column in ("", "step s", "min", "max", "over network", "peak MiB", "slots a pass"):
        table.add_column(column, justify="left" if not column else "right")
    keys: dict[str, float] = {}
    for name, case in cases.items():
        mine = _measure(name, case, device, table)
        Console().print({key: round(value, 3) for key, value in mine.items()})  # the whole takes minutes
        keys |= mine
    Console().print(table)
    return keys


def _slots(side: int, device: torch.device) -> int:
    return 1 if device.type == "cpu" and side >= ONE_SLOT_FROM else SLOTS


def _measure(name: str, case: Case, device: torch.device, table: Table) -> dict[str, float]:
    bench = StepBench(case.preset, device, case)
    functions = {**bench.passes_of(METHOD), "step": bench.step(METHOD)}
    timings = interleaved(functions, rounds=1 if case.side and case.side > 64 else 3, device=device)
    step = timings["step"]
    ratio = step.median / sum(timing.median for row, timing in timings.items() if row != "step")
    mib = peak_mib(functions["step"], device)
    times = (f"{s:.3f}" for s in (step.median, step.minimum, step.maximum))
    table.add_row(name, *times, f"{ratio:.3f}", "-" if mib is None else f"{mib:.0f}", str(case.slots_per_pass))
    keys = {f"growth_s.{name}": step.median, f"growth_over_network.{name}": ratio}
    return keys if mib is None else {**keys, f"growth_mib.{name}": mib}
