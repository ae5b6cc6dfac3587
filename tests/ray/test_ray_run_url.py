"""Ray Train on a run behind a URL, in a real S3 server: a worker killed on the way, then the machine gone."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from distseg.data.carry import files_below, get_folder
from distseg.data.place import as_place
from distseg.training.remote_run import working_folder
from distseg.training.run import RunDirectory
from tests.ray.test_ray_train import config, kill_after, weights
from tests.unit.test_cohort_url import s3_bucket
from tests.unit.tiny_cohort import make_cohort

__all__ = ["s3_bucket"]  # a fixture


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_train_to_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_bucket: str) -> None:
    from distseg import api

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("DISTSEG_CACHE", str(tmp_path / "cache"))
    cohort, url = make_cohort(tmp_path / "cohort"), f"{s3_bucket}/ray/run"
    api.train_from_config(config(cohort, tmp_path / "one", **{"launcher": "local", "train.threads": 1}))
    two = config(cohort, tmp_path, **{"launcher": "ray", "resources.workers": 2})
    two.run = url
    killed: list[int] = []
    arguments = (working_folder(url), 12, "ray::RayTrainWorker", killed)
    threading.Thread(target=kill_after, args=arguments, daemon=True).start()
    done = api.train_from_config(two)
    assert killed
    assert (done.run, done.last["step"]) == (url, 40)
    shutil.rmtree(tmp_path / "cache")
    again = api.train_from_config(two)  # elsewhere, as it were: nothing is left to do
    assert (again.resumed_from, again.last["step"]) == (40, 40)
    get_folder(as_place(url), tmp_path / "two")
    for network in ("student", "teacher"):
        torch.testing.assert_close(
            weights(tmp_path / "two", network), weights(tmp_path / "one", network), rtol=0, atol=1e-6
        )  # the model is float32
    rows = {run: RunDirectory(tmp_path / run).metrics() for run in ("one", "two")}
    assert [row["step"] for row in rows["two"]] == list(range(1, 41))
    for name in ("loss", "loss_nn", "coverage_matched", "bank_age_steps"):
        assert [row[name] for row in rows["two"]] == pytest.approx([row[name] for row in rows["one"]], abs=1e-6)
    parts = {
        run: sorted(name for name in names if name.split("/")[0] in ("bank", "checkpoints"))
        for run, names in (("one", _files(tmp_path / "one")), ("two", files_below(as_place(url))))
    }
    assert parts["one"] == parts["two"]


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
