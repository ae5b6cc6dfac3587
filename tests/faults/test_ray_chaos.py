"""On a real Ray: a worker that hangs, a driver killed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.killing import TINY, Forked, command, gone, kin, rows, started, steps_done, until
from tests.ray.test_ray_train import processes, weights
from tests.unit.tiny_cohort import make_cohort

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
