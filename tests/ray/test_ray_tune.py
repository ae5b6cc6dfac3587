"""Sweeps on a real Ray: both runners to the end, and a driver killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distseg.inference.model import load_model
from tests.unit.tiny_cohort import make_cohort

KEYS = (
    "train.threads=1", "network.base_filters=2", "network.levels=2", "sampling.patch_zyx=[8,8,8]", "train.steps=12",
    "train.validation_patches=4", "method.passes=2", "checkpoint.every_steps=5", "logging.tensorboard=false",
    "matching.k=3", "references.patches=4", "tune.looks=4", "tune.validation_share=0.5",
)  # fmt: skip


def command(cohort: str, run: Path, runner: str, trials: int) -> list[str]:
    words = ["tune", f"cohort={cohort}", f"run={run}", "space=thresholds"]
    words += [f"tune.trials={trials}", f"tune.runner={runner}", *KEYS]
    return [sys.executable, "-m", "distseg.cli", *words]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("runner", ["inline", "train"])
def test_a_sweep_on_ray(tmp_path: Path, runner: str) -> None:
    run = tmp_path / "sweep"
    cohort = make_cohort(tmp_path / "cohort")
    done = subprocess.run(command(cohort, run, runner, 3), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = (run / "trials.csv").read_text().splitlines()[1:]
    assert len(rows) == 3
    assert all(row.split(",")[1] in ("finished", "stopped") for row in rows)
    assert load_model(run / "best").info.step == 12


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_and_the_same_command_again(tmp_path: Path) -> None:
    """Killed outright once a trial has ended: that one is kept, all are there in the end, none twice."""
    run = tmp_path / "sweep"
    words = command(make_cohort(tmp_path / "cohort"), run, "inline", 4)
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list((run / "trials").glob("*/model/model.json")):
        assert driver.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept = {file.parent.parent.name: file.stat().st_mtime_ns for file in (run / "trials").glob("*/model/model.json")}
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = (run / "trials.csv").read_text().splitlines()[1:]
    assert len({row.split(",")[0] for row in rows}) == len(rows) == 4
    for name, written in kept.items():
        assert (run / "trials" / name / "model" / "model.json").stat().st_mtime_ns == written
