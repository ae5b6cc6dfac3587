"""Runs on the tiny cohort: one worker or two, interrupted or not, branched, and what may never change the weights."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from distseg.config.compose import train_config
from distseg.config.schema import TrainRunConfig
from distseg.data.patches import PatchReader
from distseg.data.slots import SlotSampler
from distseg.distributed import train as on_ray
from distseg.errors import ConfigError, DataError, NonFiniteLossError, RunMismatchError
from distseg.inference.model import load_model
from distseg.matching.bank import load_bank
from distseg.training import checkpoint as checkpoint_module
from distseg.training import doubt, loop
from distseg.training.alarms import Alarms, alarm_text, sounded
from distseg.training.checkpoint import Checkpoint, load_checkpoint
from distseg.training.local import train_local
from distseg.training.loop import TrainResult, train_rank
from distseg.training.profile import PARTS
from distseg.training.reduce import Communicator, FlatGradients, SingleProcess, TorchDistributed
from distseg.training.run import RunDirectory
from distseg.training.setup import open_run

TINY: dict[str, Any] = {
    "launcher": "local",
    "network.base_filters": 2,
    "network.levels": 2,
    "sampling.patch_zyx": [8, 8, 8],
    "train.steps": 5,
    "train.validation_patches": 3,
    "train.threads": 1,
    "method.passes": 2,
    "method.threshold": "fixed",  # splits the voxels of an untrained teacher about half and half
    "method.threshold_value": 0.9,
    "references.k": 4,
    "references.draws": 2,
    "references.patches": 5,
    "references.per_patch": 20,
    "references.every_steps": 1,
    "matching.k": 3,
    "matching.queries": 100,
    "checkpoint.every_steps": 2,
    "logging.progress": False,
    "logging.tensorboard": False,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def config(
    cohort: str, run: Path, *, method: str = "embedding_matching", matching: str = "prototypes", **overrides: Any
) -> TrainRunConfig:
    """Double underscores in `overrides` are dots."""
    keys = {**TINY, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return train_config(cohort=cohort, run=str(run), method=method, matching=matching, overrides=keys)


class Quiet:
    """A reporter that listens, and can interrupt the run after a step's line is written."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at, self.steps, self.checkpoints, self.notes = interrupt_at, [], [], []

    def step(self, row: Mapping[str, Any], total_steps: int) -> None:
        self.steps.append(row["step"])
        if row["step"] == self.interrupt_at:
            raise KeyboardInterrupt

    def checkpoint(self, step: int) -> None:
        self.checkpoints.append(step)

    def note(self, text: str) -> None:
        self.notes.append(text)


def train(
    settings: TrainRunConfig, reporter: Quiet | None = None, communicator: Communicator | None = None
) -> TrainResult:
    open_run(settings)
    return train_rank(settings, communicator=communicator or SingleProcess(), reporter=reporter or Quiet())


class Ranks:
    """A process group of threads: sums and barriers in memory, in rank order."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.gate = threading.Barrier(world_size, timeout=60)
        self.shared: list[Any] = [None] * world_size

    def of(self, rank: int) -> Communicator:
        group = self

        class Member:
            world_size = group.world_size

            def __init__(self) -> None:
                self.rank = rank

            def all_reduce_sum(self, tensor: torch.Tensor) -> None:
                group.shared[rank] = tensor.clone()
                group.gate.wait()
                total = group.shared[0].clone()
                for other in group.shared[1:]:
                    total += other
                group.gate.wait()  # all have read before the next sum begins
                tensor.copy_(total)

            def barrier(self) -> None:
                group.gate.wait()

        return Member()


def train_on(world_size: int, settings: TrainRunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_rank` on threads. Initial weights come from torch's global generator, so sessions start one by one."""
    group, errors, lock = Ranks(world_size), [], threading.Lock()
    start = loop.start_session

    def one_by_one(*arguments: Any) -> Any:
        with lock:
            return start(*arguments)

    def rank(number: int) -> None:
        try:
            torch.set_num_threads(1)
            train_rank(settings, communicator=group.of(number), reporter=Quiet())
        except BaseException as error:
            errors.append(error)
            group.gate.abort()

    open_run(settings)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "start_session", one_by_one)
        threads = [threading.Thread(target=rank, args=(number,)) for number in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time_")} for row in rows]


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def weights_of(run: Path, *, network: str = "student") -> torch.Tensor:
    """All weights of the newest checkpoint as one vector."""
    state = load_file(newest(run) / f"{network}.safetensors")
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Bit for bit: networks, optimiser, and every number of metrics.jsonl but the times."""
    assert newest(run).name == newest(undisturbed).name
    for name in ("student.safetensors", "teacher.safetensors"):
        assert (newest(run) / name).read_bytes() == (newest(undisturbed) / name).read_bytes()
        assert (run / "model" / name).read_bytes() == (undisturbed / "model" / name).read_bytes()
    ours, theirs = (torch.load(newest(r) / "optimizer.pt", weights_only=True) for r in (run, undisturbed))
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][name], value) for name, value in state.items())
    assert rows_of(run) == rows_of(undisturbed)


# Workers


@pytest.mark.parametrize(
    ("method", "matching"),
    [
        ("supervised", "prototypes"),
        ("embedding_matching", "prototypes"),
        ("embedding_matching", "index"),
        ("cct", "prototypes"),
        ("mtc", "prototypes"),
        ("dtc", "prototypes"),
    ],
)
def test_one_worker_is_two_in_float64(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, matching: str
) -> None:
    more = {"train__precision": "float64", "train__batch_size": 3, "train__diagnostics": True, "matching": matching}
    alone = config(cohort_path, tmp_path / "1", method=method, **more)
    train(alone)
    train_on(2, config(cohort_path, tmp_path / "2", method=method, **more, resources__workers=2), monkeypatch)
    for network in ("student", "teacher"):
        one, two = (weights_of(tmp_path / run, network=network) for run in ("1", "2"))
        torch.testing.assert_close(two, one, rtol=0, atol=1e-9)
    for ours, expected in zip(rows_of(tmp_path / "2"), rows_of(tmp_path / "1"), strict=True):
        assert ours == pytest.approx(expected, abs=1e-9)
    assert len(rows_of(tmp_path / "1")) == 5
    if method == "embedding_matching":  # every term had a part in it
        assert all(0.1 < row["coverage_matched"] < 0.9 and row["loss_nn"] > 0 for row in rows_of(tmp_path / "1"))


def test_one_worker_is_two_in_float32(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"method": "supervised", "train__steps": 20, "checkpoint__every_steps": 20}
    train(config(cohort_path, tmp_path / "1", **more))
    train_on(2, config(cohort_path, tmp_path / "2", **more, resources__workers=2), monkeypatch)
    one, two = (weights_of(tmp_path / run) for run in ("1", "2"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    losses = [[row["loss"] for row in rows_of(tmp_path / run)] for run in ("1", "2")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_torch_distributed_is_a_communicator(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        communicator = TorchDistributed()
        assert (communicator.rank, communicator.world_size) == (0, 1)
        total = torch.tensor([1.0, 2.0])
        communicator.all_reduce_sum(total)
        communicator.barrier()
        assert total.tolist() == [1.0, 2.0]
    finally:
        torch.distributed.destroy_process_group()


def test_flat_gradients() -> None:
    """Gradients are views of one buffer, so one sum over ranks sums them all, with the logged numbers behind."""
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    gradients = FlatGradients(parameters, slots=2)
    (parameters[0].sum() * 2 + parameters[1].sum() * 3).backward()

    class Twice(SingleProcess):
        def all_reduce_sum(self, tensor: torch.Tensor) -> None:
            tensor *= 2

    summed = gradients.sum_over_ranks(Twice(), {"a": torch.tensor(5), "b": torch.tensor(0.25)})
    assert {name: value.item() for name, value in summed.items()} == {"a": 10.0, "b": 0.5}
    assert parameters[0].grad.tolist() == [[4.0] * 3] * 2
    assert parameters[1].grad.tolist() == [6.0] * 4
    gradients.zero()
    assert parameters[0].grad.tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="65 logged numbers, room for 64"):
        gradients.sum_over_ranks(SingleProcess(), {str(n): torch.tensor(0.0) for n in range(65)})


# Interruptions


@pytest.fixture(scope="module")
def undisturbed(cohort_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    torch.set_num_threads(1)
    train(config(cohort_path, run))
    return run


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_interrupted_and_resumed_is_undisturbed(cohort_path: str, tmp_path: Path, undisturbed: Path, step: int) -> None:
    """Interrupted when the line of `step` is written and its checkpoint, where one is due, is not."""
    settings = config(cohort_path, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(settings, Quiet(interrupt_at=step))
    resumed = Quiet()
    result = train(settings, resumed)
    assert result.resumed_from == (step - 1) // 2 * 2
    assert resumed.steps == list(range(result.resumed_from + 1, 6))
    assert_same_run(tmp_path / "run", undisturbed)


def test_killed_while_a_checkpoint_is_written(
    cohort_path: str, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: the half-written folder is in nobody's way, and a torn last line of metrics.jsonl goes."""
    settings = config(cohort_path, tmp_path / "run")
    save = checkpoint_module.torch.save

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    for interrupted in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module.torch, "save", killed)
            with pytest.raises(KeyboardInterrupt):
                train(settings)
        assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [".step_0000002.partial"], interrupted
        with (tmp_path / "run/metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss": 0.')
    assert checkpoint_module.torch.save is save
    assert train(settings).resumed_from == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_damaged_checkpoint_is_passed_over(cohort_path: str, tmp_path: Path, undisturbed: Path) -> None:
    settings = config(cohort_path, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(settings, Quiet(interrupt_at=5))
    file = tmp_path / "run/checkpoints/step_0000004/teacher.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"damaged checkpoint.*step_0000004/teacher\.safetensors"):
        result = train(settings)
    assert result.resumed_from == 2
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_finished_run_is_left_as_it_is(cohort_path: str, tmp_path: Path) -> None:
    settings = config(cohort_path, tmp_path / "run", train__steps=2)
    first, reporter = train(settings), Quiet()
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = train(settings, reporter)
    assert (reporter.steps, again.resumed_from, again.last) == ([], 2, first.last)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_micro_batches_and_memory_are_no_part_of_a_run(cohort_path: str, tmp_path: Path, undisturbed: Path) -> None:
    """Patches read from the store are those kept in RAM, so `data.memory_gib` may change between launches."""
    settings = config(cohort_path, tmp_path / "run", data__memory_gib=0.0)
    train(settings)
    assert_same_run(tmp_path / "run", undisturbed)


# The bank


@pytest.fixture(scope="module")
def undisturbed_with_bank(cohort_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed_with_bank") / "run"
    torch.set_num_threads(1)
    train(config(cohort_path, run, matching="index"))
    return run


def test_a_bank_is_versioned_by_step(undisturbed_with_bank: Path) -> None:
    """R = 1: version v, made after step v, serves step v + 2; version 0 serves steps 1 and 2. What no run resumed from
    a kept checkpoint, of step 4 or 5, will ask for is gone."""
    rows = rows_of(undisturbed_with_bank)
    assert [row["bank_age_steps"] for row in rows] == [1, 2, 2, 2, 2]
    lines = (undisturbed_with_bank / "metrics.jsonl").read_text().splitlines()
    waits = [json.loads(line)["time_bank_wait_s"] for line in lines]
    assert all(0 <= seconds < 60 for seconds in waits)
    assert all(row["loss_nn"] > 0 and 0 < row["coverage_matched"] <= 100 / 512 for row in rows)
    versions = sorted(p.name for p in (undisturbed_with_bank / "bank").iterdir())
    assert versions == ["v_0003", "v_0004", "v_0005"]
    bank = load_bank(undisturbed_with_bank / "bank/v_0004", num_classes=3, device=torch.device("cpu"))
    assert (bank.version, bank.step) == (4, 4)
    assert set(bank.table.scans.tolist()) <= set(range(6))
    assert len(bank.table.classes) <= 5 * 20
    assert load_model(undisturbed_with_bank).matcher is not None


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_resumed_run_uses_the_same_bank(
    cohort_path: str, tmp_path: Path, undisturbed_with_bank: Path, step: int
) -> None:
    settings = config(cohort_path, tmp_path / "run", matching="index")
    with pytest.raises(KeyboardInterrupt):
        train(settings, Quiet(interrupt_at=step))
    train(settings)
    assert_same_run(tmp_path / "run", undisturbed_with_bank)
    names = [sorted(p.name for p in (r / "bank").iterdir()) for r in (tmp_path / "run", undisturbed_with_bank)]
    assert names[0] == names[1]


def test_the_index_is_chosen_aloud(cohort_path: str, tmp_path: Path) -> None:
    reporter = Quiet()
    train(config(cohort_path, tmp_path / "run", matching="index", train__steps=1), reporter)
    (note,) = [text for text in reporter.notes if text.startswith("bank: ")]
    assert re.fullmatch(r"bank: \d+ references of 6 scans; index: exact: \d+ rows are fewer than \d+", note)


def test_a_lost_bank_is_one_line(cohort_path: str, tmp_path: Path) -> None:
    settings = config(cohort_path, tmp_path / "run", matching="index")
    with pytest.raises(KeyboardInterrupt):
        train(settings, Quiet(interrupt_at=4))
    shutil.rmtree(tmp_path / "run/bank/v_0001")
    with pytest.raises(
        DataError, match=r"v_0001: bank version 1 is not there; the step to go on from uses it; restore it"
    ):
        train(settings)


def test_matchings_that_are_not_the_closed_form(cohort_path: str, tmp_path: Path) -> None:
    """Every reference by itself, in another similarity and reduction: trains, and says so in its model."""
    more = {"matching__similarity": "euclid", "matching__reduction": "max", "train__steps": 2}
    train(config(cohort_path, tmp_path / "run", **more))
    assert all(math.isfinite(row["loss"]) and row["loss_nn"] > 0 for row in rows_of(tmp_path / "run"))
    assert load_model(tmp_path / "run").matcher.config.similarity == "euclid"


# Where the teacher is in doubt


@pytest.mark.parametrize("step", [2, 3, 4])
def test_doubt_survives_an_interruption(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The lists of centres go by step: list 1 after step 2, list 2 after step 4; a resumed run draws from the same."""
    monkeypatch.setattr(doubt, "CANDIDATES", 9)
    doubtful = {"sampling__unlabelled": "doubt", "sampling__doubt_every_steps": 2, "sampling__doubt_share": 1.0}
    train(config(cohort_path, tmp_path / "whole", **doubtful, checkpoint__every_steps=1))
    settings = config(cohort_path, tmp_path / "run", **doubtful, checkpoint__every_steps=3)
    with pytest.raises(KeyboardInterrupt):
        train(settings, Quiet(interrupt_at=step))
    train(settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    lists = [sorted((tmp_path / run / "doubt").iterdir()) for run in ("run", "whole")]
    assert [file.name for file in lists[0]] == ["v_0001.json", "v_0002.json"]
    assert [file.read_text() for file in lists[0]] == [file.read_text() for file in lists[1]]
    scan_ids = {scan for scan, _ in json.loads(lists[0][0].read_text())}
    assert scan_ids == {"u", "w"}


def test_two_workers_doubt_as_one(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubt, "CANDIDATES", 9)
    doubtful = {"sampling__unlabelled": "doubt", "sampling__doubt_every_steps": 2, "train__precision": "float64"}
    train(config(cohort_path, tmp_path / "1", **doubtful))
    train_on(2, config(cohort_path, tmp_path / "2", **doubtful, resources__workers=2), monkeypatch)
    for name in ("v_0001.json", "v_0002.json"):
        assert (tmp_path / "1/doubt" / name).read_text() == (tmp_path / "2/doubt" / name).read_text()
    one, two = (weights_of(tmp_path / run) for run in ("1", "2"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-9)


def test_alarms_by_hand() -> None:
    """Nothing before 25 rows. Flood: predicted on unlabelled patches over twice the truth on labelled ones. Collapse:
    under a hundredth of it. A flood of matched labels: over half of them."""
    quiet = {"foreground_unlabelled": 0.19, "foreground_target": 0.1, "foreground_matched": 0.49}
    for change, expected in (
        ({}, {}),
        ({"foreground_unlabelled": 0.21}, {"alarm_flood": 1}),
        ({"foreground_unlabelled": 0.0009}, {"alarm_collapse": 1}),
        ({"foreground_matched": 0.51}, {"alarm_matched_flood": 1}),
        ({"foreground_matched": None, "foreground_unlabelled": None}, {}),
    ):
        row = {**quiet, **change, "step": 9}
        alarms = Alarms([row] * 23)
        assert (alarms.of(row), alarms.of(row)) == ({}, expected)
        assert all(alarm_text(name, [row]).startswith("step 9: ") for name in expected)
    # Of a whole run, in words: means over the steps that sounded.
    course = [
        {**quiet, "step": 1},
        {**quiet, "step": 2, "foreground_matched": 0.6, "alarm_matched_flood": 1},
        {**quiet, "step": 3, "foreground_matched": 0.8, "alarm_matched_flood": 1, "alarm_flood": 1},
    ]
    flood, matched = sounded(course)
    assert (flood.name, flood.when) == ("alarm_flood", "at 1 of 3 steps, from 3 to 3")
    assert (matched.name, matched.when) == ("alarm_matched_flood", "at 2 of 3 steps, from 2 to 3")
    assert matched.text.startswith("flood of matched labels: 70% of")
    assert sounded(course[:1]) == sounded([]) == []
    # A branch whose share falls below a quarter of what it began with; a run from nothing began with noise.
    began, shrunk, held = ({**quiet, "foreground_unlabelled": share} for share in (0.1, 0.024, 0.026))
    for branched, last, expected in ((True, shrunk, {"alarm_shrink": 1}), (True, held, {}), (False, shrunk, {})):
        assert Alarms([began] * 25 + [last] * 24, branched=branched).of(last) == expected
        live = Alarms([], branched=branched)
        assert [live.of(row) for row in [began] * 25 + [last] * 25][-1] == expected
    assert alarm_text("alarm_shrink", [{**shrunk, "step": 50}]).startswith(
        "step 50: shrinking: the student calls 2.40%"
    )
    # A mean over the window: one wild step is no alarm.
    assert Alarms([quiet] * 24).of({**quiet, "foreground_matched": 0.7}) == {}
    # Each matched voxel counts the same, and a handful of them is no flood.
    many, few = (
        {**quiet, "coverage_matched": covered, "foreground_matched": share}
        for covered, share in ((0.01, 0.4), (0.001, 1.0))
    )
    assert Alarms([few] * 23 + [many]).of(many) == {"alarm_matched_flood": 1}  # (23 x .001 + 2 x .004) / (.023 + .02)
    assert Alarms([few] * 13 + [many] * 11).of(many) == {}
    handful = {**quiet, "coverage_matched": 0.00009, "foreground_matched": 1.0}
    assert Alarms([handful] * 24).of(handful) == {}
    assert "64% of the voxels the teacher is unsure of" in alarm_text(
        "alarm_matched_flood", [few, {**many, "foreground_matched": 0.6, "step": 3}]
    )


# The contract of metrics.jsonl


def test_xie2024_obeys_the_paper_line_by_line(cohort_path: str, tmp_path: Path) -> None:
    """`preset=xie2024 train.steps=20`, with smaller patches. T runs from 1 to 20."""
    overrides = {
        **{key: value for key, value in TINY.items() if key.split(".")[0] in ("launcher", "logging", "checkpoint")},
        "train.steps": 20,
        "train.threads": 1,
        "train.validation_patches": 1,
        "sampling.patch_zyx": [16, 8, 8],
        "checkpoint.every_steps": 20,
    }
    settings = train_config(cohort=cohort_path, run=str(tmp_path / "run"), preset="xie2024", overrides=overrides)
    assert (settings.network.base_filters, settings.method.passes) == (16, 5)
    assert (settings.references.k, settings.references.draws) == (16, 5)
    result = train(settings)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 21))
    for row in rows:
        ramp = math.exp(-5 * (1 - row["step"] / 20) ** 2)  # Eq 1
        assert row["weight_ua"] == pytest.approx(0.25 * ramp, abs=1e-12)
        assert row["weight_nn"] == row["weight_en"] == pytest.approx(0.125 * ramp, abs=1e-12)
        assert row["weight_supervised"] == 1.0
        assert row["threshold_nats"] == pytest.approx((0.75 + 0.25 * ramp) * math.log(3), abs=1e-6)  # three classes
        terms = [name.removeprefix("loss_") for name in row if name.startswith("loss_")]
        assert sorted(terms) == ["en", "nn", "supervised", "ua"]
        weighted = sum(row[f"weight_{name}"] * row[f"loss_{name}"] for name in terms)
        assert row["loss"] == pytest.approx(weighted, abs=1e-6)
        assert row["coverage_reliable"] + row["coverage_matched"] <= 1 + 1e-9
        for name in ("coverage_reliable", "coverage_matched", "foreground_labelled", "foreground_unlabelled"):
            assert 0 <= row[name] <= 1
        assert "matched_accuracy" not in row
    assert len({row["loss"] for row in rows}) == 20
    assert result.last["step"] == 20
    assert {"time_step_s", "time_data_s", "time_network_s", "time_matching_s"} <= set(result.last)


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("supervised", {"supervised"}),
        ("mean_teacher", {"supervised", "consistency"}),
        ("uamt", {"supervised", "consistency"}),
        ("cct", {"supervised", "consistency"}),
        ("mtc", {"supervised", "reconstruction"}),
        ("dtc", {"supervised", "sdf", "consistency"}),
    ],
)
def test_every_method_trains(cohort_path: str, tmp_path: Path, method: str, terms: set[str]) -> None:
    train(config(cohort_path, tmp_path / "run", method=method, train__steps=2))
    for row in rows_of(tmp_path / "run"):
        assert {name.removeprefix("loss_") for name in row if name.startswith("loss_")} == terms
        assert {name.removeprefix("weight_") for name in row if name.startswith("weight_")} == terms
        assert ("threshold_nats" in row) == ("coverage_reliable" in row) == (method == "uamt")
        assert ("foreground_unlabelled" in row) == (method != "supervised")


def test_a_run_learns(cohort_path: str, tmp_path: Path) -> None:
    """The bones differ in density: sixty steps find them, and validation says so."""
    more = {"method": "supervised", "train__steps": 60, "optimizer__lr": 0.02, "checkpoint__every_steps": 60}
    network = {"network__base_filters": 4, "network__dropout_rate": 0.0}
    train(config(cohort_path, tmp_path / "run", **more, **network, train__validation_patches=8))
    rows = rows_of(tmp_path / "run")
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.7 * first
    looks = {row["step"]: row["val_dice"] for row in rows if "val_dice" in row}
    assert list(looks) == [15, 30, 45, 60]
    assert looks[60] > 0.35


# Hidden truth


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"matching": "index"},
        {"sampling__unlabelled": "doubt", "sampling__doubt_every_steps": 2, "sampling__doubt_share": 1.0},
        {"data__labeled_patches": 30},
    ],
    ids=["prototypes", "bank", "doubt", "labelled patches"],
)
def test_hidden_labels_change_nothing(
    cohort_path: str, poisoned_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any]
) -> None:
    """Scans c to f are unlabelled in this run. Whether their labels are true or noise, and whether diagnostics looks at
    them, the weights are the same bit for bit; only `matched_accuracy` tells."""
    monkeypatch.setattr(doubt, "CANDIDATES", 9)
    accuracies = {}
    for cohort in (cohort_path, poisoned_path):
        for diagnostics in (False, True):
            run = tmp_path / f"{cohort == cohort_path}-{diagnostics}"
            train(config(cohort, run, data__labeled_ids=["a", "b"], train__diagnostics=diagnostics, **variant))
            rows = rows_of(run)
            assert all(("matched_accuracy" in row) == diagnostics for row in rows)
            accuracies[run.name] = [row.pop("matched_accuracy", None) for row in rows]
            stored = yaml.safe_load((run / "config.yaml").read_text())["plan"]
            whole = [] if "data__labeled_patches" not in variant else ["a", "b"]  # what is left of them
            assert (stored["labelled"], stored["unlabelled"]) == (["a", "b"], [*whole, "c", "d", "e", "f", "u", "w"])
    runs = [tmp_path / name for name in accuracies]
    for run in runs[1:]:
        for name in ("student.safetensors", "teacher.safetensors"):
            assert (newest(run) / name).read_bytes() == (newest(runs[0]) / name).read_bytes()
    blind = [
        {k: v for k, v in row.items() if "accuracy" not in k and k != "foreground_true"} for row in rows_of(runs[0])
    ]
    for run in runs[1:]:
        seen = [{k: v for k, v in row.items() if k in blind[0]} for row in rows_of(run)]
        assert seen == [{k: v for k, v in row.items() if k in blind[0]} for row in blind]
    assert accuracies["True-True"] != accuracies["False-True"]  # diagnostics did look


def test_a_scan_is_never_measured_against_its_own_references(cohort_path: str, tmp_path: Path) -> None:
    """Where labelled scans serve as unlabelled too, their truth would be found among their own references. Scan c, of
    which there are none, is measured."""
    for unlabelled, measured in ((["a", "b"], False), (["c"], True)):
        settings = config(
            cohort_path, tmp_path / f"{measured}", matching="index", data__labeled_ids=["a", "b"],
            train__diagnostics=True, train__steps=4,
        )  # fmt: skip
        run, _ = open_run(settings)
        stored = yaml.safe_load(run.config_file.read_text())
        stored["plan"]["unlabelled"] = unlabelled
        run.config_file.write_text(yaml.safe_dump(stored))
        train(settings)
        rows = rows_of(run.path)
        assert all(row["coverage_matched"] > 0 for row in rows)
        assert {row.get("matched_accuracy") is not None for row in rows} == {measured}


def test_no_label_of_an_unlabelled_scan_is_opened(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[str] = set()
    label = PatchReader.label

    def spy(self: PatchReader, scan_id: str, *arguments: Any) -> Any:
        opened.add(scan_id)
        return label(self, scan_id, *arguments)

    monkeypatch.setattr(PatchReader, "label", spy)
    train(config(cohort_path, tmp_path / "run", data__labeled_ids=["a", "b"], train__steps=8))
    assert opened == {"a", "b", "v"}


# Branches and identity


def test_a_branch_takes_over(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student copied, teacher := student, Adam's moments kept, T from 1, the learning rate going on."""
    shared = {"train__steps": 4, "optimizer__schedule_steps": 7}
    train(config(cohort_path, tmp_path / "warm", method="supervised", **shared))
    parent = checkpoint_module.load_checkpoint(newest(tmp_path / "warm"))
    settings = config(
        cohort_path, tmp_path / "branch", train__init_from=str(tmp_path / "warm"), **{**shared, "train__steps": 3}
    )
    open_run(settings)
    session = loop.start_session(settings, SingleProcess())
    assert (session.first_step, session.schedule_offset) == (1, 4)
    for name, tensor in parent.student.items():
        assert torch.equal(session.learner.student.state_dict()[name], tensor)
        assert torch.equal(session.learner.teacher.state_dict()[name], tensor)
    assert any(not torch.equal(parent.student[name], parent.teacher[name]) for name in parent.student)
    moments = session.learner.optimizer.state_dict()["state"]
    for index, state in parent.optimizer["state"].items():
        assert all(torch.equal(moments[index][name], value) for name, value in state.items())
    stored = RunDirectory(tmp_path / "branch").stored()
    assert stored.plan.intensity == RunDirectory(tmp_path / "warm").stored().plan.intensity

    rates = []
    set_lr = loop._set_lr

    def spy(session: Any, step: int) -> None:
        set_lr(session, step)
        rates.append(session.learner.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(loop, "_set_lr", spy)
    with pytest.raises(KeyboardInterrupt):
        train(settings, Quiet(interrupt_at=3))
    assert train(settings).resumed_from == 2
    lr = settings.optimizer.lr
    expected = [lr * (1 - done / 7) ** 0.9 for done in (4, 5, 6, 6)]  # step 3 was done twice
    assert rates == pytest.approx(expected)
    rows = rows_of(tmp_path / "branch")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["weight_ua"] == pytest.approx(0.25 * math.exp(-5 * (2 / 3) ** 2))
    state = json.loads((newest(tmp_path / "branch") / "state.json").read_text())
    assert (state["step"], state["schedule_step"]) == (3, 7)


def test_a_branch_of_supervised_is_the_longer_run(cohort_path: str, tmp_path: Path) -> None:
    """But for the slots it sees (they are counted from 1 again) it continues: its first step starts from the parent."""
    more = {"method": "supervised", "optimizer__schedule": "constant"}
    train(config(cohort_path, tmp_path / "a", **more, train__steps=2))
    train(config(cohort_path, tmp_path / "b", **more, train__steps=2, train__init_from=str(tmp_path / "a")))
    first, second = (weights_of(tmp_path / run) for run in ("a", "b"))
    change = (second - first).abs().max().item()
    assert 0 < change <= 2 * 2 * 1e-3  # two Adam steps of lr 1e-3


@pytest.mark.parametrize("method", ["cct", "mtc", "dtc"])
def test_a_branch_with_heads(cohort_path: str, tmp_path: Path, method: str) -> None:
    """The student and its moments are the parent's, the heads a draw of their own without moments; interrupted, it goes
    on bit for bit; its model is the U-Net alone."""
    more = {"train__steps": 3, "checkpoint__every_steps": 1}
    train(config(cohort_path, tmp_path / "warm", method="supervised", **more))
    parent = checkpoint_module.load_checkpoint(newest(tmp_path / "warm"))
    assert parent.heads == {}
    settings, whole = (
        config(cohort_path, tmp_path / name, method=method, train__init_from=str(tmp_path / "warm"), **more)
        for name in ("branch", "whole")
    )
    drawn = []
    for _ in range(2):
        open_run(settings)
        torch.manual_seed(7)  # whatever came before
        session = loop.start_session(settings, SingleProcess())
        drawn.append(session.learner.heads.state_dict())
    assert all(torch.equal(drawn[0][name], tensor) for name, tensor in drawn[1].items())
    for name, tensor in parent.student.items():
        assert torch.equal(session.learner.student.state_dict()[name], tensor)
    moments = session.learner.optimizer.state_dict()
    assert moments["state"].keys() == parent.optimizer["state"].keys()
    assert len(moments["param_groups"][0]["params"]) == len(moments["state"]) + len(
        list(session.learner.heads.parameters())
    )

    with pytest.raises(KeyboardInterrupt):
        train(settings, Quiet(interrupt_at=3))
    assert train(settings).resumed_from == 2
    train(whole)
    assert_same_run(tmp_path / "branch", tmp_path / "whole")
    ours, theirs = (load_file(newest(tmp_path / name) / "heads.safetensors") for name in ("branch", "whole"))
    assert ours.keys() == drawn[0].keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], drawn[0][name]) for name in ours)
    assert load_model(tmp_path / "branch").networks["student"].state_dict().keys() == parent.student.keys()
    # And back: a run that branches from it leaves its heads behind.
    train(
        config(cohort_path, tmp_path / "back", method="uamt", train__init_from=str(tmp_path / "branch"), train__steps=1)
    )
    assert not (newest(tmp_path / "back") / "heads.safetensors").exists()


def test_a_branch_has_its_own_betas(cohort_path: str, tmp_path: Path) -> None:
    train(config(cohort_path, tmp_path / "warm", method="supervised", train__steps=1))
    settings = config(
        cohort_path, tmp_path / "branch", train__init_from=str(tmp_path / "warm"), optimizer__betas=[0.5, 0.9]
    )
    open_run(settings)
    session = loop.start_session(settings, SingleProcess())
    assert [tuple(group["betas"]) for group in session.learner.optimizer.param_groups] == [(0.5, 0.9)]


def test_what_a_branch_must_share(cohort_path: str, tmp_path: Path) -> None:
    train(config(cohort_path, tmp_path / "warm", method="supervised", train__steps=1))
    init = {"train__init_from": str(tmp_path / "warm")}
    with pytest.raises(
        ConfigError,
        match=r"the run to branch from has another network.*network\.base_filters: 2 there, 3 here; use",
    ):
        open_run(config(cohort_path, tmp_path / "b", **init, network__base_filters=3))
    with pytest.raises(
        ConfigError, match=r"data\.spacing_mm: .*another spacing \(got \[3\.0, 3\.0, 3\.0\]\).*3\.0, 2\.0, 2\.0"
    ):
        open_run(config(cohort_path, tmp_path / "b", **init, data__spacing_mm=[3, 3, 3]))
    with pytest.raises(ConfigError, match=r"train\.init_from: no run to branch from \(got .*nowhere\)"):
        open_run(config(cohort_path, tmp_path / "b", train__init_from=str(tmp_path / "nowhere")))
    stored = yaml.safe_load((tmp_path / "warm/config.yaml").read_text())
    stored["plan"]["class_names"][1] = "liver"
    (tmp_path / "warm/config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(
        ConfigError, match=r"has other classes \(got background, liver, femur\); the cohort has background, hip"
    ):
        open_run(config(cohort_path, tmp_path / "b", **init))
    assert not (tmp_path / "b").exists()


def test_a_branch_needs_a_checkpoint(cohort_path: str, tmp_path: Path) -> None:
    open_run(config(cohort_path, tmp_path / "warm", method="supervised"))
    settings = config(cohort_path, tmp_path / "branch", train__init_from=str(tmp_path / "warm"))
    with pytest.raises(ConfigError, match=r"train\.init_from: the run to branch from has no checkpoint"):
        train(settings)
    assert not (tmp_path / "branch").exists()


def test_bad_input_is_told_before_ray_starts(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(**_: Any) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(on_ray, "connect", started)
    with pytest.raises(ConfigError, match=r"data\.labeled_scans: more labelled scans asked for than there are"):
        on_ray.train_on_ray(config(cohort_path, tmp_path / "run", data__labeled_scans=50))
    assert not (tmp_path / "run").exists()
    with pytest.raises(AssertionError, match="Ray was asked for"):
        on_ray.train_on_ray(config(cohort_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_directory_is_refused(cohort_path: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run(config(cohort_path, run))
    with pytest.raises(
        RunMismatchError, match=r"another run lives here \(got optimizer\.lr: 0\.001 there, 0\.01 asked\)"
    ):
        open_run(config(cohort_path, run, optimizer__lr=0.01))
    with pytest.raises(RunMismatchError, match=r"method\.name: embedding_matching there, supervised asked"):
        open_run(config(cohort_path, run, method="supervised"))
    # What decides nothing about the result may change.
    elsewhere = {
        "checkpoint__every_steps": 1,
        "logging__tensorboard": True,
        "data__memory_gib": 1.0,
        "train__threads": 2,
    }
    open_run(config(cohort_path, run, **elsewhere, resources__workers=2, launcher="ray"))


# Selection, the model, the launcher


def test_select_val_takes_the_best_look(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """val_dice .1 .9 .2 .3 .9: step 2, the first of the best, outlives `checkpoint.keep=1` and becomes the model."""
    course = iter([0.1, 0.9, 0.2, 0.3, 0.9])
    monkeypatch.setattr(loop.ValidationPatches, "dice", lambda *_: next(course))
    more = {"train__select": "val", "train__validate_every_steps": 1, "checkpoint__keep": 1}
    train(config(cohort_path, tmp_path / "run", **more))
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step_0000002", "step_0000005"]
    model = load_model(tmp_path / "run")
    assert (model.info.step, model.info.checkpoint) == (2, "val")
    best = load_file(tmp_path / "run/checkpoints/step_0000002/student.safetensors")
    assert all(torch.equal(model.networks["student"].state_dict()[name], value) for name, value in best.items())


def test_the_model_is_the_last_checkpoint(undisturbed: Path) -> None:
    model = load_model(undisturbed)
    assert (model.info.step, model.info.checkpoint, model.info.method) == (5, "last", "embedding_matching")
    assert (tuple(model.class_names), model.spacing_mm) == (("background", "hip", "femur"), (3.0, 2.0, 2.0))
    assert model.patch_zyx == (8, 8, 8)
    assert model.intensity == RunDirectory(undisturbed).stored().plan.intensity
    for name, network in model.networks.items():
        saved = load_file(newest(undisturbed) / f"{name}.safetensors")
        assert all(torch.equal(network.state_dict()[key], value) for key, value in saved.items())
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_validation_leaves_the_student_as_it_was(cohort_path: str, tmp_path: Path) -> None:
    """The same weights with a look at every step and with one at the end."""
    for run, every in (("often", 1), ("seldom", 4)):
        train(config(cohort_path, tmp_path / run, train__steps=4, train__validate_every_steps=every))
    assert torch.equal(weights_of(tmp_path / "often"), weights_of(tmp_path / "seldom"))


def test_launcher_local(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(cohort_path, tmp_path / "run", train__steps=1, logging__tensorboard=True)
    result = train_local(settings)
    assert (result.steps, result.resumed_from, result.last["step"]) == (1, 0, 1)
    assert list((tmp_path / "run/tensorboard").iterdir())
    two = config(cohort_path, tmp_path / "two", resources__workers=2)
    with pytest.raises(ConfigError, match=r"resources\.workers: launcher=local is one process \(got 2\).*torchrun"):
        train_local(two)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ConfigError, match=r"WORLD_SIZE: more processes than slots \(got 3\); at most train\.batch_size = 2"
    ):
        train_local(two)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_is_skipped(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """Its scans are named whichever rank saw them; the student stays as it was, and so do Adam's moments."""
    settings = config(
        cohort_path, tmp_path / "run", checkpoint__every_steps=1, checkpoint__keep=9, resources__workers=world_size
    )
    cut, seen = SlotSampler.unlabelled_patch, []

    def broken(sampler: SlotSampler, step: int, slot: int, **more: Any) -> Any:
        patch = cut(sampler, step, slot, **more)
        if (step, slot) == (3, 1):
            patch.image[0, 0, 0] = math.nan
            seen.append(f"{sampler.labelled_patch(step, slot).scan_id}+{patch.scan_id}")
        return patch

    monkeypatch.setattr(SlotSampler, "unlabelled_patch", broken)
    train_on(world_size, settings, monkeypatch)
    rows = rows_of(tmp_path / "run")
    assert [("not_finite" in row, row.get("alarm_not_finite")) for row in rows] == [
        (step == 3, 1 if step == 3 else None) for step in range(1, 6)
    ]
    assert rows[2]["not_finite"] == f"loss_ua, loss_nn, loss_en not finite on {seen[0]}"
    assert rows[2]["loss"] is None
    before, after = (load_checkpoint(tmp_path / f"run/checkpoints/step_000000{step}") for step in (2, 3))
    assert all(torch.equal(before.student[name], after.student[name]) for name in before.student)
    assert before.optimizer["state"][0]["step"] == after.optimizer["state"][0]["step"] == 2
    assert not all(torch.equal(before.student[n], load_newest_of(tmp_path / "run").student[n]) for n in before.student)
    (sounding,) = sounded(rows)
    assert (sounding.name, sounding.when) == ("alarm_not_finite", "at 1 of 5 steps, from 3 to 3")


def test_a_gradient_that_is_not_finite_is_skipped(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(cohort_path, tmp_path / "run", method="supervised", train__steps=3)
    sums = FlatGradients.sum_over_ranks

    def broken(gradients: FlatGradients, *arguments: Any) -> Any:
        gradients._gradients[7] = math.inf
        return sums(gradients, *arguments)

    monkeypatch.setattr(FlatGradients, "sum_over_ranks", broken)
    reporter = Quiet()
    train(settings, reporter)
    rows = rows_of(tmp_path / "run")
    assert all(re.match(r"the gradient not finite on [a-f]\+[a-f]", row["not_finite"]) for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_run_that_is_not_finite_any_more_stops(cohort_path: str, tmp_path: Path) -> None:
    """After so many steps in a row, with a checkpoint from before."""
    settings = config(
        cohort_path, tmp_path / "run", method="supervised", train__steps=9, train__skips_in_a_row=3,
        checkpoint__every_steps=2,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(settings, Quiet(interrupt_at=3))
    start = loop.start_session

    def broken(*arguments: Any) -> Any:
        session = start(*arguments)
        session.feed._sampler._augmentation = BREAKS
        return session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "start_session", broken)
        with pytest.raises(
            NonFiniteLossError,
            match=r"^step 5: loss_supervised not finite on [a-f]\+[a-f](, [a-f]\+[a-f])?; 3 steps in a row",
        ):
            train_rank(settings, communicator=SingleProcess(), reporter=Quiet())
        with pytest.raises(NonFiniteLossError, match=r"^step 5: .*; 3 steps in a row"):  # 3 and 4 of before count
            train_rank(settings, communicator=SingleProcess(), reporter=Quiet())
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    kept = [load_checkpoint(folder) for folder in sorted((tmp_path / "run/checkpoints").glob("step_*"))]
    assert [checkpoint.step for checkpoint in kept] == [2, 4]
    assert all(torch.equal(kept[0].student[name], kept[1].student[name]) for name in kept[0].student)


def BREAKS(image: np.ndarray, label: Any, rng: Any) -> Any:  # noqa: N802  # in the place of an augmentation
    return np.full_like(image, np.inf), label


def load_newest_of(run: Path) -> Checkpoint:
    return load_checkpoint(newest(run))


def test_checkpoints_by_the_clock(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's clock alone decides, at every tenth step; a run resumed from such a one is the run."""
    more = {"train__steps": 25, "checkpoint__every_steps": 100, "checkpoint__keep": 9}
    train_on(2, config(cohort_path, tmp_path / "whole", **more, resources__workers=2), monkeypatch)
    assert [p.name for p in (tmp_path / "whole/checkpoints").iterdir()] == ["step_0000025"]
    settings = config(cohort_path, tmp_path / "run", **more, checkpoint__every_minutes=0.0, resources__workers=2)
    train_on(2, settings, monkeypatch)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "step_0000010", "step_0000020", "step_0000025",
    ]  # fmt: skip
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(tmp_path / "run/checkpoints/step_0000025")
    train_on(2, settings, monkeypatch)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_notes_reach_the_reporter(cohort_path: str, tmp_path: Path) -> None:
    """A patch larger than a scan is padded, and the run says so."""
    reporter = Quiet()
    train(config(cohort_path, tmp_path / "run", sampling__patch_zyx=[24, 8, 8], train__steps=1), reporter)
    assert "largest component alone of hip (one piece in 6 labelled scans), femur" in reporter.notes[0]
    assert reporter.notes[1] == "8 of 8 scans are smaller than a patch and are padded"
    assert reporter.notes[2].startswith("patches are read by ")


def test_a_patch_that_shrinks_to_one_voxel_is_refused(cohort_path: str, tmp_path: Path) -> None:
    """Instance norm of one voxel is nothing; two are enough."""
    with pytest.raises(ConfigError, match=r"sampling\.patch_zyx: .*\(got \[8, 8, 8\]\).*lower network\.levels"):
        config(cohort_path, tmp_path / "run", network__levels=4)
    train(config(cohort_path, tmp_path / "run", network__levels=4, sampling__patch_zyx=[16, 8, 8], train__steps=1))


def test_profile_leaves_a_trace_and_a_table(cohort_path: str, tmp_path: Path) -> None:
    train(config(cohort_path, tmp_path / "profiled", train__steps=7, train__profile=True))
    trace = json.loads((tmp_path / "profiled" / "profile" / "trace.json").read_text())
    assert any("conv" in str(event.get("name")) for event in trace["traceEvents"])
    table = (tmp_path / "profiled" / "profile" / "table.txt").read_text()
    assert "aten::" in table
    # The parts of a step, apart and together: all of its time.
    shares = {
        line[:26].strip(): float(line.split()[-1].rstrip("%")) for line in table.splitlines()[1:10] if "%" in line
    }
    assert list(shares) == [*PARTS.values(), "the rest", "whole"]
    assert sum(shares.values()) == pytest.approx(200, abs=1)
    assert min(shares.values()) >= 0


def test_a_run_in_a_folder_with_an_interpolation_in_its_name(cohort_path: str, tmp_path: Path) -> None:
    run = tmp_path / "${oc.env:HOME}"
    more = {"method": "supervised", "train__steps": 2}
    train(config(cohort_path, run, **more))
    stored = RunDirectory(run).stored()
    assert stored is not None
    assert stored.config.run == str(run)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.activation_checkpointing", True, r"train\.activation_checkpointing: .*false on a CPU"),
        ("network.dropout_rate", 0.0, r"network\.dropout_rate: .*its teacher's passes differ by dropout"),
        ("optimizer.betas", [2, 3], r"optimizer\.betas: .*two numbers in \[0, 1\)"),
        ("seed", -1, r"seed: .*at least 0"),
        ("data.subset_seed", -1, r"data\.subset_seed: .*at least 0"),
        ("logging.tensorboard_every_steps", 0, r"logging\.tensorboard_every_steps: .*at least 1"),
    ],
)
def test_what_cannot_train_is_refused_before_a_run_is_made(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_config(cohort="c", run="r", overrides={key: value})


def test_validation_is_in_no_step_time(cohort_path: str, tmp_path: Path) -> None:
    more = {"method": "supervised", "train__steps": 3, "train__validate_every_steps": 1}
    train(config(cohort_path, tmp_path / "run", **more, train__validation_patches=40))
    rows = RunDirectory(tmp_path / "run").metrics()
    assert all("val_dice" in row for row in rows)
    assert all(row["time_network_s"] < row["time_step_s"] for row in rows)


def test_only_rank_0_says_why_a_run_cannot_open(tmp_path: Path) -> None:
    """Two real processes, as torchrun starts them: both end with the error's exit code, neither waits for the other."""
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "distseg.cli", "train", f"cohort={tmp_path}/none.zarr", f"run={tmp_path}/run"]
    ranks = [
        subprocess.Popen(
            [*command, "launcher=local"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert "no cohort there" in said[0]
    assert "no cohort there" not in said[1]
    assert "internal error" not in "".join(said)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
