"""The same step under Ray Train and under torchrun, two workers each, and what each costs to start.

Each measurement is the command line in a process of its own, `supervised`, preset `small` (32^3), one thread a worker,
two slots a worker, on CT-like scans of 64 x 96 x 96. Five rounds, in each the three kinds one after the other:
  ray        `distseg train launcher=ray resources.workers=2`, an embedded Ray
  torchrun   the same run under `torchrun --nproc-per-node=2`, launcher=local
  one        one worker's share in one process, launcher=local
Ray lowers its workers' priority (a nice value of 15) unless RAY_worker_niceness says otherwise; here it is 0, so that
all kinds run at the priority of this command. Steps past the first ten count. Wall time is a run's median of
`time_step_s`, which other processes on the cores lengthen; CPU time is the workers' own, a worker and step, which they
hardly do.

Keys, minima over the rounds:
  ray.over_torchrun              step, wall time (target 1.05)
  ray.fastest_over_torchrun      the fastest single steps, wall time
  ray.cpu_over_torchrun          step, CPU time of the workers
  ray.all_cpu_over_torchrun      step, CPU time of every process: Ray's own too, which goes by the clock, not by step
  ray.weak_scaling.ray, .torchrun          one worker's step / two workers' with twice the slots, wall; 1 is perfect
  ray.cpu_weak_scaling.ray, .torchrun      the same in the workers' CPU time
  ray.first_step_s.ray, .torchrun, .one    Enter to the first line of metrics.jsonl (targets: ray 30, one 8)
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distseg.training.run import RunDirectory
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort
from tests.bench.process_cpu import cpu_seconds
from tests.bench.volumes import write_nnunet_source

SCANS, LABELLED, SHAPE = 4, 2, (64, 96, 96)
ROUNDS, STEPS, SETTLING, SLOTS_A_WORKER = 5, 50, 10, 2
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
POLL_S = 0.05
KINDS = {"ray": (2, "ray"), "torchrun": (2, "local"), "one": (1, "local")}  # workers, launcher
TARGETS = {"ray": 30, "torchrun": None, "one": 8}  # seconds to the first step


@dataclass(frozen=True)
class Measured:
    """Of one command, seconds."""

    step_s: float
    fastest_s: float
    cpu_s: float  # a worker's, a step
    all_cpu_s: float  # of every process, a step
    first_step_s: float


def run() -> dict[str, float]:
    found: dict[str, list[Measured]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        root = Path(folder)
        source = write_nnunet_source(root / "source", scans=SCANS, shape=SHAPE, labelled=LABELLED)
        cohort = root / "c.zarr"
        ingest_cohort(source=str(source), cohort=str(cohort), executor=LocalExecutor(1), progress=False)
        for number in range(ROUNDS):
            for kind in KINDS:
                found[kind].append(_measured(cohort, root / f"{kind}{number}", kind))
                print(f"round {number + 1}: {kind} {found[kind][-1]}", flush=True)
    best = {
        kind: Measured(*(min(getattr(m, name) for m in measured) for name in Measured.__dataclass_fields__))
        for kind, measured in found.items()
    }
    _show(found, best)
    ray, torchrun, one = best["ray"], best["torchrun"], best["one"]
    return {
        "ray.over_torchrun": ray.step_s / torchrun.step_s,
        "ray.fastest_over_torchrun": ray.fastest_s / torchrun.fastest_s,
        "ray.cpu_over_torchrun": ray.cpu_s / torchrun.cpu_s,
        "ray.all_cpu_over_torchrun": ray.all_cpu_s / torchrun.all_cpu_s,
        "ray.weak_scaling.ray": one.step_s / ray.step_s,
        "ray.weak_scaling.torchrun": one.step_s / torchrun.step_s,
        "ray.cpu_weak_scaling.ray": one.cpu_s / ray.cpu_s,
        "ray.cpu_weak_scaling.torchrun": one.cpu_s / torchrun.cpu_s,
        **{f"ray.first_step_s.{kind}": measured.first_step_s for kind, measured in best.items()},
    }


def _measured(cohort: Path, run_path: Path, kind: str) -> Measured:
    workers, launcher = KINDS[kind]
    words = ["-m", "distseg.cli", "train", f"cohort={cohort}", f"run={run_path}", "method=supervised", "preset=small"]
    words += [f"launcher={launcher}", f"train.steps={STEPS}", f"train.batch_size={SLOTS_A_WORKER * workers}"]
    words += ["train.threads=1", "logging.progress=false", "logging.tensorboard=false", "train.validation_patches=1"]
    words += [f"resources.workers={workers}"] if launcher == "ray" else []
    command = [sys.executable, *(TORCHRUN if kind == "torchrun" else ()), *words]
    environment = {**os.environ, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    log = run_path.with_suffix(".log")
    metrics = RunDirectory(run_path).metrics_file
    begun = time.perf_counter()
    with log.open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        first_step_s, snapshots = 0.0, dict[int, dict[int, float]]()
        while process.poll() is None:
            steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if steps and not first_step_s:
                first_step_s = time.perf_counter() - begun
            if steps >= SETTLING and steps not in snapshots:
                snapshots[steps] = cpu_seconds(process.pid)
            time.sleep(POLL_S)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()}")
    seconds = [row["time_step_s"] for row in RunDirectory(run_path).metrics()[SETTLING:]]
    first, last = min(snapshots), max(snapshots)
    spent = sorted((after - snapshots[first].get(pid, 0.0) for pid, after in snapshots[last].items()), reverse=True)
    cpu_s = sum(spent[:workers]) / workers / (last - first)  # nothing computes more than the workers do
    return Measured(statistics.median(seconds), min(seconds), cpu_s, sum(spent) / (last - first), first_step_s)


def _show(found: dict[str, list[Measured]], best: dict[str, Measured]) -> None:
    table = Table(title=f"{ROUNDS} rounds, minimum (all rounds)")
    for head in ("", "step, wall ms", "fastest", "CPU ms a worker", "CPU ms, all", "Enter to first step s", "target"):
        table.add_column(head)
    for kind, measured in found.items():
        low = best[kind]
        steps, cpu = (_listed([getattr(m, name) * 1e3 for m in measured], 0) for name in ("step_s", "cpu_s"))
        first = _listed([m.first_step_s for m in measured], 1)
        rest = f"{1e3 * low.fastest_s:.0f}", cpu, f"{1e3 * low.all_cpu_s:.0f}", first
        table.add_row(kind, steps, *rest, str(TARGETS[kind] or ""))
    Console().print(table)


def _listed(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"
