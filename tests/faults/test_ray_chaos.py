"""On a real Ray: a worker that hangs, a driver killed, an actor out of memory."""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from distseg.data.label_output import read_ledger
from tests.faults.killing import TINY, Forked, command, gone, kin, rows, started, steps_done, until
from tests.ray.test_ray_train import processes, weights
from tests.unit.tiny_cohort import AFFINE, make_cohort, scan_arrays
from tests.unit.tiny_run import make_run

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1200)]


def on_ray(cohort: str, run: Path, **keys: object) -> list[str]:
    values = {"launcher": "ray", "resources__workers": 2, "train__precision": "float64", **keys}
    more = tuple(word for word in TINY if word != "launcher=local")
    return command("train", cohort=cohort, run=run, more=more, **values)


def test_a_hung_worker_is_named_and_a_killed_driver_leaves_nobody(tmp_path: Path) -> None:
    cohort, run = make_cohort(tmp_path / "cohort"), tmp_path / "run"
    keys = {"train__steps": 400, "train__worker_timeout_s": 20, "checkpoint__every_steps": 10}
    alone = command(
        "train", cohort=cohort, run=tmp_path / "one", more=TINY, train__precision="float64", train__steps=400
    )
    assert Forked(alone).wait() == 0
    words = on_ray(cohort, run, **keys)
    with started(words) as driver:
        assert until(lambda: steps_done(run) >= 15, driver), driver.communicate()[0][-3000:]
        ours = set(kin(driver.pid))
        hanging = next(pid for pid in processes("ray::RayTrainWorker") if pid in ours)
        os.kill(hanging, signal.SIGSTOP)

        def told() -> bool:
            return any(file.stat().st_size for file in (run / "ray").glob("*.faults"))

        assert until(told, driver)
        faults = next((run / "ray").glob("*.faults")).read_text()
        assert re.search(r"(rank \d|worker \d:) does not answer", faults), faults
        before = steps_done(run)
        assert until(lambda: steps_done(run) < before or steps_done(run) > before + 20, driver)
        assert gone([hanging], within_s=60) == []
        family = kin(driver.pid)
        driver.kill()
        said = driver.communicate()[0]
        assert re.search(
            r"note: worker \d: .*all workers start again from the newest checkpoint", " ".join(said.split())
        )
        assert gone(family, within_s=90) == []
    with started(words) as driver:
        assert driver.wait() == 0
    for network in ("student", "teacher"):
        torch.testing.assert_close(weights(run, network), weights(tmp_path / "one", network), rtol=0, atol=1e-6)
    assert [row["step"] for row in rows(run)] == list(range(1, 401))


def test_an_actor_out_of_memory_sets_aside_what_it_cannot_hold(tmp_path: Path) -> None:
    """Actors may grow by 32 MiB each once they have labelled a scan; one scan of many needs far more, and comes last.

    Whether Python's allocation fails or a library's thread takes the actor with it: the scan is tried again, set aside
    with its reason, and the others are done as by a process that nothing limits.
    """
    run, images = make_run(tmp_path), tmp_path / "images"
    images.mkdir()
    for number in range(8):
        nib.save(nib.Nifti1Image(scan_arrays(number)[0], AFFINE), images / f"phantom_{number}.nii.gz")
    keys = {"label__overlap": 0.0, "label__review_scans": 2, "logging__progress": "false"}
    alone = command("label", run=run, cohort=images, output=tmp_path / "one", launcher="local", **keys)
    assert Forked(alone).wait() == 0
    large = (np.arange(320**3) % 2000 - 1000).astype(np.int16).reshape(320, 320, 320)  # 65 MB, before anything is made
    nib.save(nib.Nifti1Image(large, AFFINE), images / "z_large.nii.gz")

    output = tmp_path / "o"
    limited: set[int] = set()
    words = command("label", run=run, cohort=images, output=output, launcher="ray", resources__workers=1, **keys)
    with started(words) as driver:

        def ended() -> bool:
            masks = output / "masks"
            if masks.is_dir() and any(masks.iterdir()):
                for pid in set(processes("ray::_Worker")) & set(kin(driver.pid)) - limited:
                    grown = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * 4096 + 2**25
                    resource.prlimit(pid, resource.RLIMIT_AS, (grown, grown))
                    limited.add(pid)
            return driver.poll() is not None

        until(ended, driver)
        said = driver.communicate()[0]
        assert limited, said[-3000:]
        assert driver.returncode == 3, said[-3000:]
        assert gone(kin(driver.pid), within_s=60) == []
    assert re.search(r"z_large.*memory; use fewer resources\.workers", " ".join(said.split()))
    masks = {file.name: file.read_bytes() for file in (output / "masks").iterdir()}
    assert masks == {file.name: file.read_bytes() for file in (tmp_path / "one" / "masks").iterdir()}
    failures = [line for line in read_ledger(output) if "failed" in line]
    assert {line["failed"] for line in failures} == {"z_large"}
    done = [line["done"] for line in read_ledger(output) if "done" in line]
    assert sorted(done) == [f"phantom_{number}" for number in range(8)]  # each once
