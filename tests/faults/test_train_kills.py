"""Training killed at seeded progress and started by the same command: the undisturbed run, bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.faults.killing import ROOT, TINY, command, differences, kill_often
from tests.unit.tiny_cohort import make_cohort


def differences_after(tmp_path: Path, *, kills: int, steps: int) -> list[str]:
    """Of a run killed so often from one left alone."""
    cohort = make_cohort(tmp_path / "cohort")
    words = [command("train", cohort=cohort, run=tmp_path / run, more=TINY, train__steps=steps) for run in ("u", "k")]
    subprocess.run(words[0], check=True, cwd=ROOT)
    done = kill_often(words[1], tmp_path / "k", kills=kills, steps=steps, seed=1)
    print(done)
    assert done.tried == kills
    assert max(done.lost) <= 5  # checkpoint.every_steps
    return differences(tmp_path / "k", tmp_path / "u")


def test_two_kills(tmp_path: Path) -> None:
    assert differences_after(tmp_path, kills=2, steps=20) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(tmp_path: Path) -> None:
    assert differences_after(tmp_path, kills=20, steps=200) == []
