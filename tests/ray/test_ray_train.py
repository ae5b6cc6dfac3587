"""Ray Train on two workers: the numbers of one process, a worker killed on the way, the same command again."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distseg.config.compose import train_config
from distseg.config.schema import TrainRunConfig
from distseg.training.run import RunDirectory
from tests.unit.tiny_cohort import make_cohort

TINY: dict[str, Any] = {
    "network.base_filters": 2,
    "network.levels": 2,
    "sampling.patch_zyx": [8, 8, 8],
    "train.steps": 40,
    "train.validation_patches": 4,
    "train.precision": "float64",
    "method.passes": 2,
    "checkpoint.every_steps": 5,
    "logging.progress": False,
    "logging.tensorboard": False,
}


def config(cohort: str, run: Path, **more: Any) -> TrainRunConfig:
    return train_config(cohort=cohort, run=str(run), overrides={**TINY, **more})


def kill_a_worker_after(run: Path, step: int, killed: list[int]) -> None:
    """SIGKILL one worker once `step` is in metrics.jsonl: placed by progress, not by the clock."""
    while not killed:
        row = RunDirectory(run).last_metrics()
        if row is not None and row["step"] >= step:
            for pid in workers()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        time.sleep(0.02)


def workers() -> list[int]:
    """Processes of Ray Train's workers, by the title Ray gives them."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"RayTrainWorker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # gone meanwhile
    return sorted(found)


def weights(run: Path, network: str) -> torch.Tensor:
    state = load_file(run / "model" / f"{network}.safetensors")
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray's own, of its own options
@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_are_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: bool) -> None:
    """Undisturbed; and with one worker killed on the way, after which the same command again finds nothing to do."""
    from distseg import api

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cohort = make_cohort(tmp_path / "cohort")
    steps = {"train.steps": 40 if kill else 6}
    api.train_from_config(config(cohort, tmp_path / "one", **{"launcher": "local", "train.threads": 1, **steps}))

    two = config(cohort, tmp_path / "two", **{"launcher": "ray", "resources.workers": 2, **steps})
    killed: list[int] = []
    if kill:
        arguments = (tmp_path / "two", 12, killed)
        threading.Thread(target=kill_a_worker_after, args=arguments, daemon=True).start()
    api.train_from_config(two)
    assert bool(killed) == kill
    for network in ("student", "teacher"):
        torch.testing.assert_close(
            weights(tmp_path / "two", network), weights(tmp_path / "one", network), rtol=0, atol=1e-6
        )  # the model is float32
    rows = {run: RunDirectory(tmp_path / run).metrics() for run in ("one", "two")}
    assert [row["step"] for row in rows["two"]] == list(range(1, two.train.steps + 1))
    assert [row["loss"] for row in rows["two"]] == pytest.approx([row["loss"] for row in rows["one"]], abs=1e-9)
    if kill:
        assert api.train_from_config(two).resumed_from == two.train.steps
        assert RunDirectory(tmp_path / "two").metrics() == rows["two"]
