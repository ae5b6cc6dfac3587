"""Twenty times SIGKILL at random progress while the command line labels a hundred phantoms: not a byte differs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distseg.data.label_output import KINDS, ledger_path, read_ledger
from distseg.data.phantom import write_phantoms
from tests.unit.tiny_run import make_run

SCANS, KILLS = 100, 20


def command(run: str, images: Path, output: Path) -> list[str]:
    words = [f"run={run}", f"cohort={images}", f"output={output}", "launcher=local", "resources.workers=2"]
    more = ["label.overlap=0.25", "label.review_scans=0", "logging.progress=false"]
    return [sys.executable, "-m", "distseg.cli", "label", *words, *more]


def masks(output: Path) -> dict[str, int]:
    return {f.name: f.stat().st_ino for f in (output / "masks").glob("[!.]*")}


def workers_of(driver: int) -> list[int]:
    """Pool processes that a driver has started."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(driver)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "spawn_main" in line]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_leave_what_no_kill_leaves(tmp_path: Path) -> None:
    images = tmp_path / "phantoms/imagesTr"
    write_phantoms(tmp_path / "phantoms", scans=SCANS, labelled=1, seed=5, val=0)
    run = make_run(tmp_path, patch_zyx=(24, 24, 24), spacing_mm=(6.0, 5.0, 5.0))
    subprocess.run(command(run, images, tmp_path / "undisturbed"), check=True)
    rng, output = random.Random(0), tmp_path / "o"
    committed: dict[str, int] = {}
    for kill in range(KILLS):
        before = len(committed)
        wanted = min(before + rng.randint(1, 2 * SCANS // KILLS), SCANS - 1)
        driver = subprocess.Popen(command(run, images, output))
        while driver.poll() is None and len(masks(output)) < wanted:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        if kill % 3 == 2 and workers_of(driver.pid):  # a worker dies first, and the driver sees it
            os.kill(rng.choice(workers_of(driver.pid)), signal.SIGKILL)
            time.sleep(rng.random())
        driver.kill()
        driver.wait()
        now = masks(output)
        assert committed.items() <= now.items(), f"kill {kill}: a committed scan was done again"
        committed = now
    assert len(committed) < SCANS
    subprocess.run(command(run, images, output), check=True)
    assert committed.items() <= masks(output).items()
    for kind in KINDS:
        expected = {f.name: f.read_bytes() for f in (tmp_path / "undisturbed" / kind).iterdir()}
        assert {f.name: f.read_bytes() for f in (output / kind).iterdir()} == expected
        assert len(expected) == SCANS
    lines = [line["done"] for line in read_ledger(ledger_path(output)) if "done" in line]
    assert len(lines) == len(set(lines)) == SCANS
