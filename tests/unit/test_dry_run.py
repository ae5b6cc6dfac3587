"""The dry run: its bytes are those of the run it foresees, nothing is written, a run half done counts as half."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distseg import api
from distseg.cli import main
from distseg.config.compose import identity_hash, to_plain, train_config
from distseg.config.schema import TrainRunConfig
from distseg.errors import ConfigError, RunMismatchError
from distseg.training import dry_run
from distseg.training.dry_run import DryRun, trial
from distseg.training.run import RunDirectory

TINY: dict[str, Any] = {
    "launcher": "local",
    "network.base_filters": 2,
    "network.levels": 2,
    "sampling.patch_zyx": [8, 8, 8],
    "train.steps": 12,
    "train.batch_size": 4,
    "train.threads": 1,
    "train.validation_patches": 4,
    "method.passes": 2,
    "checkpoint.every_steps": 5,
    "logging.progress": False,
    "logging.tensorboard": False,
}


def config(cohort: str, run: Path, method: str = "supervised", **more: Any) -> TrainRunConfig:
    return train_config(cohort=cohort, run=str(run), method=method, overrides={**TINY, **more})


@pytest.fixture(scope="module")
def half_done(cohort_path: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRunConfig:
    """A run whose newest checkpoint is of step 10 of 12."""
    wanted = config(cohort_path, tmp_path_factory.mktemp("half") / "run", **{"checkpoint.keep": 3})
    api.train_from_config(wanted)
    last = Path(wanted.run) / "checkpoints" / "step_0000012"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    return wanted


def foreseen(wanted: TrainRunConfig) -> DryRun:
    return trial(to_plain(wanted), threads=1, steps_done=dry_run.steps_of_same_run(wanted))


def test_it_foresees_the_run(half_done: TrainRunConfig) -> None:
    run = RunDirectory(half_done.run)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    found = foreseen(dataclasses.replace(half_done, dry_run=True))
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before
    assert (found.steps, found.checkpoints, found.pauses, found.slots) == (2, 1, 1, 4)
    (kept, _) = sorted(path for path in run.checkpoints.iterdir())
    on_disk = sum(file.stat().st_size for file in kept.iterdir())
    assert found.checkpoint_nbytes == pytest.approx(on_disk, rel=0.02)
    assert found.checkpoints_kept == 3
    weights = sum(p.numel() for p in torch.load(kept / "optimizer.pt", weights_only=True)["state"][0].values())
    assert found.gradient_nbytes >= 4 * weights > 0
    assert found.memory_nbytes > found.volumes_nbytes > 0
    assert found.gpu_memory_nbytes is None
    assert 0 < found.step_s < 60
    assert found.hours == pytest.approx((found.start_s + 2 * found.step_s + found.pause_s + found.checkpoint_s) / 3600)


def test_volumes_are_counted_up_to_the_room_for_them(cohort_path: str, tmp_path: Path) -> None:
    grid = 18 * 22 * 20
    everything = foreseen(config(cohort_path, tmp_path / "a", **{"data.spacing_mm": [3, 2, 2]}))
    assert everything.volumes_nbytes == 9 * 4 * grid + 7 * grid  # 9 images as float32, 7 labels, validation's too
    little = foreseen(config(cohort_path, tmp_path / "b", **{"data.memory_gib": 1e-4}))
    assert little.volumes_nbytes <= 1e-4 * 2**30
    assert list(tmp_path.iterdir()) == []


def test_a_worker_has_its_share_of_the_slots(cohort_path: str, tmp_path: Path) -> None:
    shared = config(cohort_path, tmp_path / "r", **{"resources.workers": 3, "launcher": "ray"})
    found = foreseen(shared)
    assert (found.workers, found.slots) == (3, 2)
    assert "the all-reduce of" in found.lines()[1]


def test_the_command_says_it_and_writes_nothing(
    cohort_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{key}={value}".replace(" ", "") for key, value in TINY.items()]
    assert (
        main(["train", "dry_run=true", f"cohort={cohort_path}", f"run={tmp_path}/r", "method=supervised", *words]) == 0
    )
    said = capsys.readouterr().out
    assert f"dry run: nothing was written to {tmp_path}/r" in said
    number = r"[\d.e+-]+"
    for line in (
        rf"speed: {number} steps/s \(20 steps of 4 slots, 1 threads\)",
        rf"time: {number} hours for 12 steps, 4 looks at validation, 3 checkpoints",
        rf"memory: {number} GiB a worker, of it {number} GiB volumes",
        rf"disk: at most {number} MiB \({number} MiB a checkpoint, 2 kept\)",
    ):
        assert re.search(f"^{line}$", said, re.MULTILINE), said
    assert list(tmp_path.iterdir()) == []


def test_it_raises_what_the_run_would(cohort_path: str, tmp_path: Path, half_done: TrainRunConfig) -> None:
    other = dataclasses.replace(half_done, seed=5, dry_run=True)
    with pytest.raises(RunMismatchError, match=r"seed: 0 there, 5 asked"):
        api.train_from_config(other)
    with pytest.raises(ConfigError, match=r"data.labeled_scans"):
        foreseen(config(cohort_path, tmp_path / "r", **{"data.labeled_scans": 99}))


def test_it_is_no_part_of_a_runs_identity(cohort_path: str, tmp_path: Path) -> None:
    wanted = config(cohort_path, tmp_path)
    assert identity_hash(wanted) == identity_hash(dataclasses.replace(wanted, dry_run=True))
