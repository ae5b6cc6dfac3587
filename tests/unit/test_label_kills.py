"""Twenty times SIGKILL at random progress while a hundred small phantoms are labelled: not a byte differs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest

from distseg.config.verbs import LabelSectionConfig
from distseg.data.label_output import read_ledger
from distseg.work.executor import LocalExecutor
from distseg.work.label_cohort import label_cohort
from distseg.work.ledger import Ledger
from tests.unit.test_label_cohort import contents, reviewed
from tests.unit.tiny_cohort import AFFINE, scan_arrays
from tests.unit.tiny_run import make_run

SCANS, KILLS, SEED = 100, 20, 0
POOL_EVERY = 5  # of the drivers, one in so many has two worker processes, of which one is killed before it


def drive(run: str, images: str, output: str, workers: int, held: bool = False) -> None:
    """The command, which waits to be killed before its last scan if `held`."""
    settings = LabelSectionConfig(overlap=0.0, review_scans=2)
    if held:
        commit = Ledger.commit

        def waits_before_the_last(ledger: Ledger, *of_scan: Any) -> None:
            if len(masks(Path(output))) == SCANS - 1:
                time.sleep(600)
            commit(ledger, *of_scan)

        Ledger.commit = waits_before_the_last  # type: ignore[method-assign]  # in this process alone
    executor = LocalExecutor(workers, at_once=2)
    try:
        label_cohort(run=run, cohort=images, output=output, settings=settings, executor=executor, progress=False)
    finally:
        executor.close()


def masks(output: Path) -> dict[str, int]:
    return {f.name: f.stat().st_ino for f in (output / "masks").glob("[!.]*")}


def workers_of(driver: int) -> list[int]:
    """Pool processes that a driver has started."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(driver)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "spawn_main" in line]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_leave_what_no_kill_leaves(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(SCANS):
        nib.save(nib.Nifti1Image(scan_arrays(number)[0], AFFINE), images / f"phantom_{number:03d}.nii.gz")
    run, context = make_run(tmp_path), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distseg.work.label_cohort"])

    def start(output: Path, workers: int, held: bool) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=drive, args=(run, str(images), str(output), workers, held))
        process.start()
        return process

    undisturbed = start(tmp_path / "undisturbed", 1, held=False)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    rng, output = random.Random(SEED), tmp_path / "o"
    committed: dict[str, int] = {}
    for kill in range(KILLS):
        workers = 2 if kill % POOL_EVERY == POOL_EVERY - 1 else 1
        wanted = min(len(committed) + rng.randint(1, 2 * SCANS // KILLS - 3), SCANS - 10)
        driver = start(output, workers, held=True)
        while driver.is_alive() and len(masks(output)) < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        if workers > 1:  # a worker dies first, and the driver sees it
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(rng.choice(workers_of(driver.pid or 0)), signal.SIGKILL)
            time.sleep(rng.random())
        assert driver.is_alive(), f"kill {kill}: it was done before it was killed"
        driver.kill()
        driver.join()
        now = masks(output)
        assert committed.items() <= now.items(), f"kill {kill}: a committed scan was done again"
        committed = now
    assert len(committed) < SCANS
    drive(run, str(images), str(output), 1)
    assert committed.items() <= masks(output).items()
    assert contents(output) == contents(tmp_path / "undisturbed")
    assert reviewed(output) == reviewed(tmp_path / "undisturbed")
    assert len(masks(output)) == SCANS
    lines = [line["done"] for line in read_ledger(output) if "done" in line]
    assert len(lines) == len(set(lines)) == SCANS
    assert not [line for line in read_ledger(output) if "failed" in line]
    assert sorted(f.name for f in output.iterdir()) == sorted(f.name for f in (tmp_path / "undisturbed").iterdir())
