"""Ray Train on two workers that share a bank: the numbers of one process, wherever the index lives and whoever is
killed on the way; the same command again."""

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
    "method.threshold": "fixed",  # splits the voxels of an untrained teacher about half and half
    "method.threshold_value": 0.9,
    "references.every_steps": 2,
    "references.patches": 6,
    "references.per_patch": 20,
    "matching.k": 3,
    "checkpoint.every_steps": 5,
    "logging.progress": False,
    "logging.tensorboard": False,
}


def config(cohort: str, run: Path, **more: Any) -> TrainRunConfig:
    return train_config(cohort=cohort, run=str(run), matching="index", overrides={**TINY, **more})


def kill_after(run: Path, step: int, title: str, killed: list[int]) -> None:
    """SIGKILL a process once `step` is in metrics.jsonl: placed by progress, not by the clock."""
    while not killed:
        row = RunDirectory(run).last_metrics()
        if row is not None and row["step"] >= step:
            for pid in processes(title)[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        time.sleep(0.02)


def processes(title: str) -> list[int]:
    """Of this machine, by the title Ray gives its workers and actors."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and title.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # gone meanwhile
    return sorted(found)


def weights(run: Path, network: str) -> torch.Tensor:
    state = load_file(run / "model" / f"{network}.safetensors")
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


@pytest.mark.ray
@pytest.mark.parametrize(
    ("placement", "victim"),
    [
        ("replica", None),
        pytest.param("shared", "RayTrainWorker", marks=pytest.mark.slow),
        pytest.param("per_node", "IndexOwner", marks=pytest.mark.slow),
    ],
)
def test_two_workers_are_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, victim: str | None
) -> None:
    """Undisturbed; and with a worker or the bank's owner killed on the way, after which the same command again finds
    nothing to do."""
    from distseg import api

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cohort = make_cohort(tmp_path / "cohort")
    more = {"train.steps": 40 if victim else 6, "matching.placement": placement}
    api.train_from_config(config(cohort, tmp_path / "one", **{"launcher": "local", "train.threads": 1, **more}))

    two = config(cohort, tmp_path / "two", **{"launcher": "ray", "resources.workers": 2, **more})
    killed: list[int] = []
    if victim:
        arguments = (tmp_path / "two", 12, f"ray::{victim}", killed)
        threading.Thread(target=kill_after, args=arguments, daemon=True).start()
    api.train_from_config(two)
    assert bool(killed) == bool(victim)
    for network in ("student", "teacher"):
        torch.testing.assert_close(
            weights(tmp_path / "two", network), weights(tmp_path / "one", network), rtol=0, atol=1e-6
        )  # the model is float32
    rows = {run: RunDirectory(tmp_path / run).metrics() for run in ("one", "two")}
    assert [row["step"] for row in rows["two"]] == list(range(1, two.train.steps + 1))
    for name in ("loss", "loss_nn", "loss_en", "coverage_matched", "bank_age_steps"):
        assert [row[name] for row in rows["two"]] == pytest.approx([row[name] for row in rows["one"]], abs=1e-6)
    assert rows["two"][-1]["loss_nn"] > 0  # the bank had a part in it
    banks = [sorted(p.name for p in (tmp_path / run / "bank").iterdir()) for run in ("one", "two")]
    assert banks[0] == banks[1]
    if victim:
        assert api.train_from_config(two).resumed_from == two.train.steps
        assert RunDirectory(tmp_path / "two").metrics() == rows["two"]
