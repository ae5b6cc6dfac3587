"""What a trial costs beside its training, by each way of running it, and sixteen trials at once against one by one.

Trials of a network of a few hundred weights, twelve steps, on scans of 18 x 22 x 20: their training is next to nothing,
so the sweep's wall time is what running trials costs. Each kind is the command line in a process of its own, random
values of the space `thresholds`, no scheduler. Ray's workers keep this command's priority (RAY_worker_niceness=0).
  local     launcher=local, one process, 16 trials one after the other
  inline    Ray, tune.runner=inline, the same 16 on the CPUs of this machine
  train     Ray, tune.runner=train, 2 trials of one worker each

With `--cohort C` trials that really train, in place of those: preset `small` as it stands (`embedding_matching`), 60
steps each from one warm-up of as many, on 4 labelled scans of C; `local`, and `inline` two at once, on one CPU each.
`--trials N`: not sixteen.

Keys; with a cohort they begin with tune.trained:
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

TRIALS = {"local": 16, "inline": 16, "train": 2}
TRAINED_TRIALS = {"local": 16, "inline": 16}
SWEEP = (
    "space=thresholds", "tune.search=random", "tune.scheduler=none", "tune.looks=2", "train.threads=1",
    "logging.tensorboard=false", "logging.progress=false",
)  # fmt: skip
NEXT_TO_NOTHING = (
    "tune.validation_share=0.5", "train.steps=12", "train.validation_patches=4", "network.base_filters=2",
    "network.levels=2", "sampling.patch_zyx=[8,8,8]", "method.passes=2", "references.patches=4", "matching.k=3",
)  # fmt: skip
TRAINED = ("preset=small", "train.steps=60", "data.labeled_scans=4", "tune.concurrent=2")
POLL_S = 0.05


@dataclass(frozen=True)
class Swept:
    """Seconds: the whole command, to the end of its first trial, and beside its steps of each trial."""

    wall_s: float
    first_trial_s: float
    overheads_s: list[float]


def run(cohort: str | None = None, trials: int | None = None) -> dict[str, float]:
    swept: dict[str, Swept] = {}
    counts, keys = (TRIALS, NEXT_TO_NOTHING) if cohort is None else (TRAINED_TRIALS, TRAINED)
    counts = {kind: min(count, trials or count) for kind, count in counts.items()}
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        path = cohort or make_cohort(Path(folder) / "cohort")
        for kind, count in counts.items():
            swept[kind] = _swept(path, Path(folder) / kind, kind, count, keys)
            print(kind, swept[kind], flush=True)
    table = Table(title=f"a sweep of trials with {'60 steps' if cohort else 'next to nothing'} to train")
    for head in ("", "trials", "wall s", "first trial's end s", "beside its steps, s a trial"):
        table.add_column(head)
    for kind, found in swept.items():
        numbers = found.wall_s, found.first_trial_s, statistics.median(found.overheads_s)
        table.add_row(kind, str(counts[kind]), *(f"{number:.1f}" for number in numbers))
    Console().print(table)
    prefix = "tune.trained" if cohort else "tune"
    return {
        **{f"{prefix}.overhead_s.{kind}": statistics.median(found.overheads_s) for kind, found in swept.items()},
        **{f"{prefix}.first_trial_s.{kind}": found.first_trial_s for kind, found in swept.items()},
        f"{prefix}.inline_over_one_by_one": swept["inline"].wall_s / swept["local"].wall_s,
    }


def _swept(cohort: str, run_path: Path, kind: str, trials: int, keys: tuple[str, ...]) -> Swept:
    words = ["tune", f"cohort={cohort}", f"run={run_path}", f"tune.trials={trials}", *SWEEP, *keys]
    words += [f"tune.runner={kind}"] if kind != "local" else ["launcher=local", "tune.concurrent=1"]
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
