"""Sweeps on a real Ray: both runners to the end, and a driver killed on the way."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util.state.exception import ServerUnavailable

from distseg.config.schema import ResourcesConfig, TrainConfig, TrainRunConfig
from distseg.config.spaces import load_space
from distseg.config.verbs import TuneConfig
from distseg.distributed import tune_in_trial
from distseg.distributed.cluster import check_resources, wait_for_nodes
from distseg.distributed.tune import RayTrials, _check_dashboard, room_for_trials
from distseg.distributed.tune_scheduler import make_scheduler
from distseg.errors import InputError
from distseg.inference.model import load_model
from distseg.work.tune_sweep import Sweep
from distseg.work.tune_trials import Trial
from tests.faults.killing import gone, kin, started
from tests.unit.tiny_cohort import make_cohort

WITHIN_S = 900  # of a sweep: what Ray starts for it takes minutes beside other work
STARTS = 3
KEYS = (
    "train.threads=1", "network.base_filters=2", "network.levels=2", "sampling.patch_zyx=[8,8,8]", "train.steps=12",
    "train.validation_patches=4", "method.passes=2", "checkpoint.every_steps=5", "logging.tensorboard=false",
    "matching.k=3", "references.patches=4", "logging.progress=false", "tune.looks=4", "tune.validation_share=0.5",
)  # fmt: skip


def command(cohort: str, run: Path, runner: str, trials: int) -> list[str]:
    words = ["tune", f"cohort={cohort}", f"run={run}", "space=thresholds"]
    words += [f"tune.trials={trials}", f"tune.runner={runner}", *KEYS]
    return [sys.executable, "-m", "distseg.cli", *words]


def to_its_end(words: list[str]) -> None:
    """Asserts that the command ends well, and leaves nothing of it whatever happens.

    Ray gives itself 30 s to start, too few on a machine full of other work: then the same command again.
    """
    for attempt in range(STARTS):
        with started(words, RAY_worker_niceness="0") as driver:
            said = driver.communicate(timeout=WITHIN_S)[0]
            assert gone(kin(driver.pid), within_s=60) == []
        if "Ray did not start in time" not in said or attempt == STARTS - 1:
            assert driver.returncode == 0, said[-5000:]
            return


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2 * WITHIN_S)
@pytest.mark.parametrize("runner", ["inline", "train"])
def test_a_sweep_on_ray(tmp_path: Path, runner: str) -> None:
    run = tmp_path / "sweep"
    to_its_end(command(make_cohort(tmp_path / "cohort"), run, runner, 3))
    rows = (run / "trials.csv").read_text().splitlines()[1:]
    assert len(rows) == 3
    assert all(row.split(",")[1] in ("finished", "stopped") for row in rows)
    assert load_model(run / "best").info.step == 12


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2 * WITHIN_S)
def test_a_killed_driver_and_the_same_command_again(tmp_path: Path) -> None:
    """Killed outright once a trial has ended: that one is kept, all are there in the end, none twice."""
    run = tmp_path / "sweep"
    words = command(make_cohort(tmp_path / "cohort"), run, "inline", 4)
    with started(words, RAY_worker_niceness="0") as driver:
        deadline = time.monotonic() + WITHIN_S
        while not list((run / "trials").glob("*/model/model.json")):
            assert driver.poll() is None, "ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kept = {
            file.parent.parent.name: file.stat().st_mtime_ns for file in (run / "trials").glob("*/model/model.json")
        }
        family = kin(driver.pid)
        driver.kill()
        driver.wait()
        assert gone(family, within_s=90) == []
    to_its_end(words)
    rows = (run / "trials.csv").read_text().splitlines()[1:]
    assert len({row.split(",")[0] for row in rows}) == len(rows) == 4
    for name, written in kept.items():
        assert (run / "trials" / name / "model" / "model.json").stat().st_mtime_ns == written


# --- what needs no Ray that runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "wanted", "room"),
    [
        ([{"CPU": 2}], 1, 0, 16, (2, 1)),
        ([{"CPU": 2}], 2, 0, 16, (1, 1)),
        ([{"CPU": 64}], 1, 0, 4, (4, 16)),
        ([{"CPU": 3}, {"CPU": 3}], 1, 0, 3, (3, 1)),  # two CPUs each would fit two, one on either node
        ([{"CPU": 3}, {"CPU": 3}], 1, 0, 2, (2, 3)),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 16}], 1, 1.0, 16, (2, 8)),
        ([{"CPU": 16, "GPU": 1}], 1, 0.25, 16, (4, 4)),
        ([{"CPU": 16, "GPU": 4}], 2, 1.0, 16, (2, 4)),
    ],
)
def test_as_many_trials_as_fit_share_all_cpus(
    nodes: list[dict[str, float]], workers: int, gpus: float, wanted: int, room: tuple[int, int]
) -> None:
    assert room_for_trials(nodes, ResourcesConfig(workers=workers, gpus_per_worker=gpus), wanted=wanted) == room


def test_more_gpus_than_the_cluster_has_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(InputError, match=r"resources\.workers: more workers than the cluster has GPUs for .*= 1\)"):
        check_resources(workers=1, gpus_per_worker=1.0)


def test_a_dashboard_on_its_way_up_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses at once until it listens; one that never does is one line, after a minute."""
    clock, asked, answers_at = [0.0], [0], [20.0]

    # Two Rays on one machine are two dashboards: without an address the question is an error.
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1234"))

    def list_nodes(*, address: str, **_: Any) -> list[Any]:
        assert address == "127.0.0.1:1234"
        asked[0] += 1
        if clock[0] < answers_at[0]:
            raise ServerUnavailable("refused")
        return []

    monkeypatch.setattr("ray.util.state.list_nodes", list_nodes)
    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + s))
    monkeypatch.setattr("distseg.distributed.tune.time", fake)
    _check_dashboard()
    assert asked == [21]
    answers_at[0] = 1e9
    with pytest.raises(InputError, match=r"^tune\.runner: Ray's dashboard does not answer \(got train\); .*inline$"):
        _check_dashboard()
    assert clock[0] == 80.0


def test_asha_goes_on_as_if_there_had_been_one_session(tmp_path: Path) -> None:
    """Ray loses ASHA's rungs; ours are filled again from the journal, so the same trials are stopped."""
    sweep, values = _sweep(tmp_path, steps=9, looks=9, reduction=3), [0.5, 0.2, 0.6, 0.55, 0.1, 0.58, 0.61, 0.4]
    looks = [{step: value * (1 + step / 100) for step in range(1, 9)} for value in values]
    whole = make_scheduler(sweep, SimpleNamespace(ended=[]), "max")
    stopped_at = [_stopped_at(whole, f"t{n}", look) for n, look in enumerate(looks)]
    assert len(set(stopped_at)) == 3  # at the first rung, at the second, not at all
    half = [
        Trial(f"t{n}", {}, f"t{n}", looks={s: v for s, v in look.items() if s <= (stopped_at[n] or 9)})
        for n, look in enumerate(looks[:4])
    ]
    resumed = make_scheduler(sweep, SimpleNamespace(ended=half), "max")
    assert [_stopped_at(resumed, f"t{n}", looks[n]) for n in range(4, 8)] == stopped_at[4:]


@pytest.mark.parametrize(("concurrent", "workers"), [(None, []), (3, [6]), (99, [16])])
def test_a_cluster_that_grows_is_asked_for_all_trials_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrent: int | None, workers: list[int]
) -> None:
    """Not for more of them than there are; where the number is left open, for one."""
    told: list[Any] = []
    monkeypatch.setattr("distseg.distributed.tune.connect", lambda **_: nullcontext())
    monkeypatch.setattr("distseg.distributed.tune.wait_for_nodes", lambda **words: told.append(words))
    sweep = _sweep(tmp_path, steps=9)
    sweep.settings.concurrent = concurrent
    with RayTrials(ResourcesConfig(workers=2, gpus_per_worker=0.5)).ready(sweep):
        assert told == [{"workers": number, "gpus_per_worker": 0.5} for number in workers]


def test_nodes_are_asked_for_once_and_not_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers' at once, until they are there or the time is up; the request is withdrawn; none without a wait."""
    clock, requests, cpus = [0.0], list[int](), [2.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] >= 30:
            cpus[0] = 8.0

    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
    monkeypatch.setattr("distseg.distributed.cluster.time", fake)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": cpus[0]})
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda *, bundles: requests.append(len(bundles)))
    monkeypatch.delenv("DISTSEG_WAIT_FOR_NODES_S", raising=False)
    wait_for_nodes(workers=8)
    assert (clock, requests) == ([0.0], [])
    monkeypatch.setenv("DISTSEG_WAIT_FOR_NODES_S", "60")
    wait_for_nodes(workers=2)
    assert (clock, requests) == ([0.0], [])  # they are there
    wait_for_nodes(workers=8)
    assert (clock, requests) == ([30.0], [8, 0])
    wait_for_nodes(workers=9)
    assert (clock, requests) == ([90.0], [8, 0, 9, 0])  # in vain, and no error


def test_a_take_over_that_fails_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune would try it three times and say that its process died; and the journal keeps the trial's own run."""
    reported: list[dict[str, Any]] = []

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ray.tune.get_context", lambda: SimpleNamespace(get_trial_name=lambda: "t001"))
    monkeypatch.setattr("ray.tune.report", reported.append)
    monkeypatch.setattr(tune_in_trial, "_pointer", lambda: {"name": "t002", "run": "t002", "step": 3})
    monkeypatch.setattr(tune_in_trial, "fork_run", full)
    given = {"name": "t002", "run": "t002", "values": {}}
    tune_in_trial.trial_in_tune({"trial": given}, sweep=_sweep(tmp_path, steps=9), cpus=1)
    assert reported == [{"step": 1, "run": "t002", "error": "OSError: [Errno 28] No space left on device"}]


def _sweep(run: Path, **settings: int) -> Sweep:
    steps = settings.pop("steps")
    base = TrainRunConfig(cohort="c", run="", train=TrainConfig(steps=steps, validate_every_steps=1))
    tune = TuneConfig(space="s", scheduler="asha", trials=8, runner="inline", **settings)
    return Sweep(run, load_space("thresholds"), base, tune, None)


def _stopped_at(scheduler: Any, name: str, looks: dict[int, float]) -> int | None:
    trial = SimpleNamespace(trial_id=name)
    scheduler.on_trial_add(None, trial)
    for step, value in looks.items():
        if scheduler.on_trial_result(None, trial, {"step": step, "val_dice": value}) == "STOP":
            return step
    return None
