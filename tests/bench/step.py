"""The gradient step and its parts, and the field's usual step as the peer, on the same tensors in one run.

Every row has its median, least and greatest time over interleaved rounds, and the memory of a call beyond what is there
before it. Presets `small` and `xie2024`, batch of 2 slots, 32^3 patches on a CPU and 96^3 on a GPU. Keys (ratios are of
medians; with `.xie2024` at the end they are that preset's):
  step_over_network.METHOD     whole step / the network passes it makes, run alone
  step_over_peer.uamt          our UA-MT step / a UA-MT step as the field writes it (tests/bench/peer_uamt.py)
  passes.decoder_8_over_full   8 stochastic passes with network.dropout=decoder / one with dropout everywhere
  passes.last_8_over_full      the same with network.dropout=last
  step_s.METHOD, step_mib.METHOD   of the whole step
  row_s.ROW, row_mib.ROW       of every row
"""

from __future__ import annotations

import os

import torch
from rich.console import Console
from rich.table import Table

from tests.bench.memory import peak_mib
from tests.bench.step_parts import METHODS, SLOTS, Functions, StepBench
from tests.bench.timing import Timing, clock_name, interleaved

__all__ = ["SLOTS", "StepBench", "bench_device", "run"]


def run(rounds: int = 7) -> dict[str, float]:
    device = bench_device()
    keys = _run_preset("small", device, rounds, suffix="")
    return keys | _run_preset("xie2024", device, max(3, rounds // 2), suffix=".xie2024")


def bench_device() -> torch.device:
    """A GPU where there is one; else this CPU with OMP_NUM_THREADS threads, one if that is not set."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return device


def _run_preset(preset: str, device: torch.device, rounds: int, *, suffix: str) -> dict[str, float]:
    bench = StepBench(preset, device)
    passes = {name: bench.passes_of(name) for name in METHODS}
    functions: Functions = {**bench.other_passes(), **{row: f for mine in passes.values() for row, f in mine.items()}}
    functions |= bench.parts() | {f"step, {name}": bench.step(name) for name in METHODS}
    functions["step, uamt as the field writes it"] = bench.peer()
    timings = interleaved(functions, rounds=rounds, device=device)
    memory = {name: peak_mib(function, device) for name, function in functions.items()}
    _print(bench, timings, memory, rounds)
    return _keys(passes, {name: timing.median for name, timing in timings.items()}, memory, suffix)


def _keys(
    passes: dict[str, Functions], seconds: dict[str, float], memory: dict[str, float | None], suffix: str
) -> dict[str, float]:
    ratios = {
        f"step_over_network.{name}": seconds[f"step, {name}"] / sum(seconds[row] for row in rows)
        for name, rows in passes.items()
    }
    ratios["step_over_peer.uamt"] = seconds["step, uamt"] / seconds["step, uamt as the field writes it"]
    for dropout in ("decoder", "last"):
        eight = seconds[f"teacher, 8 passes, network.dropout={dropout}"]
        ratios[f"passes.{dropout}_8_over_full"] = eight / seconds["teacher, 1 pass"]
    Console().print({key + suffix: round(value, 3) for key, value in ratios.items()})
    keys = dict(ratios)
    for row, value in seconds.items():
        keys[f"row_s.{row}"] = value
        if row.startswith("step, "):
            keys[f"step_s.{row.removeprefix('step, ')}"] = value
    for row, mib in memory.items():
        if mib is not None:
            keys[f"row_mib.{row}"] = mib
            if row.startswith("step, "):
                keys[f"step_mib.{row.removeprefix('step, ')}"] = mib
    return {key.replace(" ", "_") + suffix: value for key, value in keys.items()}


def _print(bench: StepBench, timings: dict[str, Timing], memory: dict[str, float | None], rounds: int) -> None:
    device = bench.device
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    title = (
        f"{bench.case.preset}, {bench.side}^3, {SLOTS} slots, {device}{threads}, {clock_name(device)}, {rounds} rounds"
    )
    table = Table(title=title)
    for column in ("", "median ms", "min", "max", "peak MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, timing in timings.items():
        times = (f"{1e3 * s:.2f}" for s in (timing.median, timing.minimum, timing.maximum))
        mib = memory[name]
        table.add_row(name, *times, "-" if mib is None else f"{mib:.1f}")
    Console().print(table)
