"""Weak scaling over hosts: training and labelling on two namespaced hosts against one with half of the work.

A host is a network namespace with a Ray node of one CPU, as in tests/faults/hosts.py. **Both hosts are this one
machine's**: each is held to a core of its own, so that neither computes on the other's, but memory, caches and disk are
shared, and the wire between them has no latency to speak of. What this shows is what the system itself adds when a
second host joins; it says nothing of a network. Takes root and two cores, and means something on idle cores only.

Each round starts one host, then two, afresh, and on each of them runs the command line on host a: `train supervised`,
preset `small` (32^3), two slots a worker, on CT-like scans of 64 x 96 x 96; then `label` on eight phantoms a worker at
4 mm, by an untrained network of preset `small` (M = 2, overlap 0.25, 0.5 % of the voxels matched). Workers have this
command's priority (RAY_worker_niceness=0). Steps past the first ten count; scans count from the first results, one for
each worker, to the last.

Keys, minima of the times over the rounds; 1 is perfect scaling:
  hosts.weak_scaling.train, .label           one host's time a step, a worker's scan / two hosts', wall time
  hosts.cpu_weak_scaling.train, .label       the same in CPU time of the workers, which other work hardly blurs
  hosts.first_step_s.one, .two               Enter to the first line of metrics.jsonl
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from subprocess import Popen

from rich.console import Console
from rich.table import Table

from distseg.data.phantom import make_phantom
from distseg.training.run import RunDirectory
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort
from tests.bench.label import SPACING_MM, untrained_run, write_image
from tests.bench.process_cpu import cpu_seconds_of
from tests.bench.volumes import write_nnunet_source
from tests.faults.hosts import Hosts, no_hosts_here

ROUNDS, STEPS, SETTLING, SLOTS_A_WORKER, SCANS_A_WORKER, PHANTOMS = 5, 100, 10, 2, 8, 4
SCANS, LABELLED, SHAPE = 4, 2, (64, 96, 96)
KINDS = {"one": ("a",), "two": ("a", "b")}
CORES = {"a": 0, "b": 1}  # of those this process may use
POLL_S, NODE_S, COMMAND_S = 0.02, 120.0, 1800.0
SHOWN = 5000  # characters of what a failed command said


@dataclass(frozen=True)
class Measured:
    """Seconds."""

    step_s: float
    step_cpu_s: float  # a worker's
    first_step_s: float
    scan_s: float  # that a worker takes
    scan_cpu_s: float


def run(rounds: int | None = None) -> dict[str, float]:
    why_not, cores = no_hosts_here(), sorted(os.sched_getaffinity(0))
    if why_not or len(cores) < len(CORES):
        raise SystemExit(f"hosts: {why_not or 'each host takes a core of its own'}")
    found: dict[str, list[Measured]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        bench = _Bench(Path(folder), {name: cores[index] for name, index in CORES.items()})
        for number in range(rounds or ROUNDS):
            for kind, names in KINDS.items():
                found[kind].append(bench.measured(names, f"{kind}{number}"))
                print(f"round {number + 1}: {kind} {found[kind][-1]}", flush=True)
    best = {
        kind: Measured(*(min(getattr(m, field.name) for m in measured) for field in fields(Measured)))
        for kind, measured in found.items()
    }
    _show(found)
    one, two = best["one"], best["two"]
    return {
        "hosts.weak_scaling.train": one.step_s / two.step_s,
        "hosts.weak_scaling.label": one.scan_s / two.scan_s,
        "hosts.cpu_weak_scaling.train": one.step_cpu_s / two.step_cpu_s,
        "hosts.cpu_weak_scaling.label": one.scan_cpu_s / two.scan_cpu_s,
        **{f"hosts.first_step_s.{kind}": measured.first_step_s for kind, measured in best.items()},
    }


class _Bench:
    """What is trained on and labelled, and the hosts' cores."""

    def __init__(self, root: Path, cores: dict[str, int]) -> None:
        self._root, self._cores = root, cores
        source = write_nnunet_source(root / "source", scans=SCANS, shape=SHAPE, labelled=LABELLED)
        self._cohort = root / "c.zarr"
        ingest_cohort(source=str(source), cohort=str(self._cohort), executor=LocalExecutor(1), progress=False)
        self._untrained = untrained_run(root)
        self._phantoms = [root / f"phantom_{number}.nii.gz" for number in range(PHANTOMS)]
        for number, file in enumerate(self._phantoms):
            write_image(file, make_phantom(number).image, SPACING_MM)

    def measured(self, names: tuple[str, ...], label: str) -> Measured:
        with _started(names, self._cores) as hosts:
            step = self._train(hosts, names, self._root / f"train_{label}")
            scan = self._label(hosts, names, self._root / f"label_{label}")
        return Measured(*step, *scan)

    def _train(self, hosts: Hosts, names: tuple[str, ...], run_path: Path) -> tuple[float, float, float]:
        """Seconds of a step, of a worker's CPU time a step, and from Enter to the first."""
        words = [f"cohort={self._cohort}", f"run={run_path}", "method=supervised", "preset=small"]
        words += [f"train.batch_size={SLOTS_A_WORKER * len(names)}", f"train.steps={STEPS}", "train.threads=1"]
        words += ["train.validation_patches=1", "logging.tensorboard=false"]
        metrics = RunDirectory(run_path).metrics_file

        def steps() -> int:
            return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

        begun = time.perf_counter()
        driver = _command(hosts, names, "train", words)
        first_step_s = _until(lambda: steps() >= 1, driver, hosts) - begun
        _until(lambda: steps() >= SETTLING, driver, hosts)
        first, before = steps(), _cpu(hosts, names)
        _until(lambda: steps() >= STEPS - 1, driver, hosts)  # the workers end with the last
        last, after = steps(), _cpu(hosts, names)
        _ended_well(driver, hosts)
        seconds = [row["time_step_s"] for row in RunDirectory(run_path).metrics()[SETTLING:]]
        cpu_s = _busiest_s(before, after, len(names)) / len(names)
        return statistics.median(seconds), cpu_s / (last - first), first_step_s

    def _label(self, hosts: Hosts, names: tuple[str, ...], output: Path) -> tuple[float, float]:
        """Seconds that a worker takes for a scan, and its CPU time."""
        images = output.with_suffix(".images")
        images.mkdir()
        count = SCANS_A_WORKER * len(names)
        for number in range(count):
            os.link(self._phantoms[number % PHANTOMS], images / f"{number:02d}.nii.gz")
        words = [f"run={self._untrained}", f"cohort={images}", f"output={output}", "label.review_scans=0"]
        words += ["label.passes=2", "label.overlap=0.25", "label.quantile=0.995", "label.attempts=1"]
        masks = output / "masks"

        def done() -> int:
            return len(os.listdir(masks)) if masks.is_dir() else 0

        driver = _command(hosts, names, "label", words)
        begun = _until(lambda: done() >= len(names), driver, hosts)
        first, before = done(), _cpu(hosts, names)
        ended = _until(lambda: done() >= count, driver, hosts)
        after = _cpu(hosts, names)
        _ended_well(driver, hosts)
        scans_a_worker = (count - first) / len(names)
        return (ended - begun) / scans_a_worker, _busiest_s(before, after, len(names)) / len(names) / scans_a_worker


@contextmanager
def _started(names: tuple[str, ...], cores: dict[str, int]) -> Iterator[Hosts]:
    """Hosts with a Ray node in each of `names`, which know each other."""
    hosts = Hosts(cores=cores, RAY_worker_niceness="0")
    try:
        for name in names:
            hosts.start(name)
            _until(lambda name=name: "Ray runtime started" in hosts.said(name), hosts.nodes[name], hosts, NODE_S)
        yield hosts
    finally:
        hosts.close()


def _command(hosts: Hosts, names: tuple[str, ...], verb: str, words: list[str]) -> Popen[bytes]:
    more = ["launcher=ray", f"resources.workers={len(names)}", "logging.progress=false"]
    return hosts.run("a", [sys.executable, "-m", "distseg.cli", verb, *words, *more])


def _until(ready: Callable[[], bool], process: Popen[bytes], hosts: Hosts, within_s: float = COMMAND_S) -> float:
    """The time at which `ready` came true. Raises RuntimeError where the process ended before."""
    deadline = time.perf_counter() + within_s
    while not ready():
        if process.poll() is not None and not ready():
            raise RuntimeError(f"ended with {process.returncode}:\n{hosts.said('a')[-SHOWN:]}")
        if time.perf_counter() > deadline:
            raise RuntimeError(f"no progress in {within_s:.0f} s:\n{hosts.said('a')[-SHOWN:]}")
        time.sleep(POLL_S)
    return time.perf_counter()


def _ended_well(driver: Popen[bytes], hosts: Hosts) -> None:
    if driver.wait(COMMAND_S) != 0:
        raise RuntimeError(f"ended with {driver.returncode}:\n{hosts.said('a')[-SHOWN:]}")


def _cpu(hosts: Hosts, names: tuple[str, ...]) -> dict[int, float]:
    return cpu_seconds_of(pid for name in names for pid in hosts.pids(name))


def _busiest_s(before: dict[int, float], after: dict[int, float], workers: int) -> float:
    """CPU seconds of the `workers` processes that took most: nothing computes more than the workers do."""
    spent = sorted((seconds - before.get(pid, 0.0) for pid, seconds in after.items()), reverse=True)
    return sum(spent[:workers])


def _show(found: dict[str, list[Measured]]) -> None:
    table = Table(title="one host, and two with twice the work: minimum (all rounds)")
    for head in (
        "hosts",
        "step, wall ms",
        "CPU ms a worker",
        "Enter to first step s",
        "a worker's scan, s",
        "its CPU s",
    ):
        table.add_column(head)
    columns = (
        ("step_s", 1e3, 0),
        ("step_cpu_s", 1e3, 0),
        ("first_step_s", 1, 1),
        ("scan_s", 1, 2),
        ("scan_cpu_s", 1, 2),
    )
    for kind, measured in found.items():
        cells = []
        for name, scale, digits in columns:
            values = [getattr(m, name) * scale for m in measured]
            cells.append(f"{min(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})")
        table.add_row(kind, *cells)
    Console().print(table)
