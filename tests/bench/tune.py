"""What a trial costs beside its training, by each way of running it, and sixteen trials at once against one by one.

Trials of a network of a few hundred weights, twelve steps, on scans of 18 x 22 x 20: their training is next to nothing,
so the sweep's wall time is what running trials costs. Each kind is the command line in a process of its own, random
values of the space `thresholds`, no scheduler. Ray's workers keep this command's priority (RAY_worker_niceness=0).
  local     launcher=local, one process, 16 trials one after the other
  inline    Ray, tune.runner=inline, the same 16 on the CPUs of this machine
  train     Ray, tune.runner=train, 2 trials of one worker each

Keys:
  tune.overhead_s.local, .inline, .train    a trial's seconds, begun to ended, less its steps': the median
  tune.first_trial_s.KIND                   Enter to the first trial's end
  tune.inline_over_one_by_one               wall time of the whole command, `inline` / `local`
"""

from __future__ import annotations

import json
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
from tests.unit.tiny_cohort import make_cohort

KINDS = {"local": 16, "inline": 16, "train": 2}  # trials
KEYS = (
    "space=thresholds", "tune.search=random", "tune.scheduler=none", "tune.looks=2", "tune.validation_share=0.5",
    "train.threads=1", "train.steps=12", "train.validation_patches=4", "network.base_filters=2", "network.levels=2",
    "sampling.patch_zyx=[8,8,8]", "method.passes=2", "references.patches=4", "matching.k=3",
    "logging.tensorboard=false", "logging.progress=false",
)  # fmt: skip
POLL_S = 0.05


@dataclass(frozen=True)
class Swept:
    """Seconds: the whole command, to the end of its first trial, and beside its steps of each trial."""

    wall_s: float
    first_trial_s: float
    overheads_s: list[float]


def run() -> dict[str, float]:
    swept: dict[str, Swept] = {}
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        cohort = make_cohort(Path(folder) / "cohort")
        for kind, trials in KINDS.items():
            swept[kind] = _swept(cohort, Path(folder) / kind, kind, trials)
            print(kind, swept[kind], flush=True)
    table = Table(title="a sweep of trials with next to nothing to train")
    for head in ("", "trials", "wall s", "first trial's end s", "beside its steps, s a trial"):
        table.add_column(head)
    for kind, found in swept.items():
        numbers = found.wall_s, found.first_trial_s, statistics.median(found.overheads_s)
        table.add_row(kind, str(KINDS[kind]), *(f"{number:.1f}" for number in numbers))
    Console().print(table)
    return {
        **{f"tune.overhead_s.{kind}": statistics.median(found.overheads_s) for kind, found in swept.items()},
        **{f"tune.first_trial_s.{kind}": found.first_trial_s for kind, found in swept.items()},
        "tune.inline_over_one_by_one": swept["inline"].wall_s / swept["local"].wall_s,
    }


def _swept(cohort: str, run_path: Path, kind: str, trials: int) -> Swept:
    words = ["tune", f"cohort={cohort}", f"run={run_path}", f"tune.trials={trials}", *KEYS]
    words += ["launcher=local", "tune.concurrent=1"] if kind == "local" else [f"tune.runner={kind}"]
    environment = {**os.environ, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    journal, log = run_path / "trials.jsonl", run_path.with_suffix(".log")
    first_trial_s = 0.0
    begun = time.perf_counter()
    with log.open("w") as said:
        command = [sys.executable, "-m", "distseg.cli", *words]
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if not first_trial_s and journal.exists() and '"ended"' in journal.read_text():
                first_trial_s = time.perf_counter() - begun
            time.sleep(POLL_S)
        wall_s = time.perf_counter() - begun
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()}")
    ended = [event for line in journal.read_text().splitlines() if (event := json.loads(line))["event"] == "ended"]
    assert [event["state"] for event in ended] == ["finished"] * trials
    return Swept(wall_s, first_trial_s, [event["seconds"] - _steps_s(run_path, event["trial"]) for event in ended])


def _steps_s(run_path: Path, trial: str) -> float:
    rows = RunDirectory(run_path / "trials" / trial).metrics()
    return sum(float(row["time_step_s"]) for row in rows)
