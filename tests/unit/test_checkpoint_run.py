"""What is on disk: checkpoints whole or passed over, the run directory, the plan, and the model artefact."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from distseg.config.compose import identity_hash, recipe_hash, train_config
from distseg.config.schema import NetworkConfig, TrainRunConfig
from distseg.data.cohort import Cohort, ScanRecord
from distseg.data.intensity import Intensity
from distseg.errors import ConfigError, DataError
from distseg.inference.model import ModelInfo, build_network, load_model, save_model
from distseg.training import checkpoint as checkpoint_module
from distseg.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    newest_step,
    prune_checkpoints,
    save_checkpoint,
)
from distseg.training.plan import Plan, make_plan
from distseg.training.run import RunDirectory, write_atomic


def checkpoint(step: int) -> Checkpoint:
    random = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(2, 3, generator=random), "a.bias": torch.randn(2, generator=random)}
    parameters = [torch.nn.Parameter(value.clone()) for value in weights.values()]
    adam = torch.optim.Adam(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    return Checkpoint(step, 100 + step, weights, {k: v + 1 for k, v in weights.items()}, adam.state_dict())


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert (ours.step, ours.schedule_step) == (theirs.step, theirs.schedule_step)
    for name in ("student", "teacher"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert ours.optimizer["param_groups"] == theirs.optimizer["param_groups"]
    for index, state in theirs.optimizer["state"].items():
        assert all(torch.equal(ours.optimizer["state"][index][key], value) for key, value in state.items())


# Checkpoints


def test_round_trip(tmp_path: Path) -> None:
    assert (load_newest(tmp_path), newest_step(tmp_path), list_checkpoints(tmp_path)) == (None, 0, [])
    folder = save_checkpoint(tmp_path, checkpoint(3))
    assert folder.name == "step_0000003"
    assert_same(load_checkpoint(folder), checkpoint(3))
    assert sorted(p.name for p in folder.iterdir()) == [
        "optimizer.pt",
        "state.json",
        "student.safetensors",
        "teacher.safetensors",
    ]
    save_checkpoint(tmp_path, checkpoint(3))  # again, over itself
    save_checkpoint(tmp_path, checkpoint(20))
    assert newest_step(tmp_path) == 20
    assert_same(load_newest(tmp_path), checkpoint(20))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["student.safetensors", "teacher.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_newest_falls_back(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    newest = save_checkpoint(tmp_path, checkpoint(2))
    harm(newest / name)
    with pytest.raises(DataError, match="step_0000002"):
        load_checkpoint(newest)
    with pytest.warns(
        UserWarning, match=r"passing over a damaged checkpoint, going on from the one before: .*step_0000002"
    ):
        assert_same(load_newest(tmp_path), checkpoint(1))


@pytest.mark.parametrize("content", ["[]", '"x"', "{}", '{"format": 1}', '{"format": 2}', ""])
def test_a_state_of_another_make_is_refused(tmp_path: Path, content: str) -> None:
    folder = save_checkpoint(tmp_path, checkpoint(1))
    (folder / "state.json").write_text(content)
    with pytest.raises(DataError, match=r"unreadable checkpoint|another format"):
        load_checkpoint(folder)


def test_an_optimizer_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """Even under a fitting checksum: weights_only."""
    folder = save_checkpoint(tmp_path, checkpoint(1))
    marker = tmp_path / "ran"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({"state": Harm()}, folder / "optimizer.pt")
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["optimizer.pt"] = checkpoint_module._sha256(folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="unreadable checkpoint"):
        load_checkpoint(folder)
    assert not marker.exists()


def test_prune(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, checkpoint(step))
    prune_checkpoints(tmp_path, keep=2, spare={2})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000002", "step_0000004", "step_0000005"]
    prune_checkpoints(tmp_path, keep=9, spare=set())
    assert len(list_checkpoints(tmp_path)) == 3


# The run directory


def config(cohort: str = "c", run: str = "r", *, method: str = "supervised", **overrides: Any) -> TrainRunConfig:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return train_config(cohort=cohort, run=run, method=method, overrides=keys)


def test_config_yaml_round_trip(cohort_path: str, tmp_path: Path) -> None:
    flips = {"augment__flip": "left_right", "data__mirror_pairs": [["hip", "femur"]]}
    settings = config(cohort_path, str(tmp_path), method="embedding_matching", **flips)
    plan = make_plan(settings, Cohort.open(cohort_path))
    run = RunDirectory(tmp_path)
    assert run.stored() is None
    run.create(settings, plan)
    stored = run.stored()
    assert (stored.config, stored.plan) == (settings, plan)
    content = yaml.safe_load(run.config_file.read_text())
    assert (content["identity"], content["recipe"]) == (identity_hash(settings), recipe_hash(settings))
    assert {"distseg", "python", "torch", "zarr"} <= set(content["versions"])
    assert list(tmp_path.iterdir()) == [run.config_file]


@pytest.mark.parametrize("content", ["", "- 1", "format: 2", "format: 1", "format: 1\nconfig: {}\nplan: {}", "a: ["])
def test_a_run_that_cannot_be_read_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises((DataError, ConfigError)) as caught:
        RunDirectory(tmp_path).stored()
    assert "\n" not in str(caught.value)


def test_metrics_are_cut(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.cut_metrics(5)  # nothing there: nothing done
    assert (run.metrics(), run.last_metrics()) == ([], None)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 1 / step, "share": None, "bad": float("nan")})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert run.last_metrics()["step"] == 3
    run.cut_metrics(2)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1] == {"step": 2, "loss": 0.5, "share": None, "bad": None}  # JSON has no NaN
    run.append_metrics({"step": 3})
    assert run.last_metrics() == {"step": 3}


def test_a_cut_that_cuts_nothing_leaves_the_file(tmp_path: Path) -> None:
    """Who follows it would read all of it again."""
    run = RunDirectory(tmp_path)
    for step in (1, 2):
        run.append_metrics({"step": step})
    _, position = run.metrics_from(None)
    run.cut_metrics(2)
    assert run.metrics_from(position) == ([], position)


def test_metrics_are_followed(tmp_path: Path) -> None:
    """New lines once each; all of a file that was cut back and has grown past where the old one was read."""
    run = RunDirectory(tmp_path)
    assert run.metrics_from(None) == ([], None)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    rows, position = run.metrics_from(None)
    assert [row["step"] for row in rows] == [1, 2, 3]
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4')
    assert run.metrics_from(position) == ([], position)
    run.cut_metrics(1)
    for step in (2, 3, 4):
        run.append_metrics({"step": step, "more": step})
    assert [row["step"] for row in run.metrics_from(position)[0]] == [1, 2, 3, 4]


def test_last_metrics_of_a_long_file(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in range(400):
        run.append_metrics({"step": step, "loss": 0.123456789, "text": "x" * 100})
    assert run.last_metrics()["step"] == 399


def test_write_atomic_leaves_the_old_file_if_it_fails(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_atomic(file, "old")
    with pytest.raises(TypeError):
        write_atomic(file, 3)
    assert file.read_text() == "old"


def test_a_run_directory_that_cannot_be_made(tmp_path: Path, cohort_path: str) -> None:
    (tmp_path / "file").write_text("")
    plan = make_plan(config(cohort_path), Cohort.open(cohort_path))
    with pytest.raises(DataError, match="cannot make the run directory"):
        RunDirectory(tmp_path / "file" / "run").create(config(cohort_path), plan)


# The plan


def test_plan_of_the_tiny_cohort(cohort_path: str) -> None:
    cohort = Cohort.open(cohort_path)
    plan = make_plan(config(cohort_path), cohort)
    assert (plan.labelled, plan.unlabelled, plan.validation) == (tuple("abcdef"), ("u", "w"), ("v",))
    assert (plan.class_names, plan.spacing_mm) == (("background", "hip", "femur"), (3.0, 2.0, 2.0))
    values = np.concatenate([f.values for s in "abcdef" for f in cohort.scan(s).foreground.values()]).astype(np.float64)
    low, high = np.percentile(values, (0.5, 99.5))
    assert (plan.intensity.low, plan.intensity.high) == (low, high)
    assert plan.intensity.mean == pytest.approx(np.clip(values, low, high).mean())
    assert Plan.from_plain(json.loads(json.dumps(plan.to_plain()))) == plan


def test_labelled_subsets_are_nested_and_independent_of_the_seed(cohort_path: str) -> None:
    cohort = Cohort.open(cohort_path)
    subsets = [set(make_plan(config(cohort_path, data__labeled_scans=n), cohort).labelled) for n in range(1, 7)]
    assert [len(subset) for subset in subsets] == [1, 2, 3, 4, 5, 6]
    assert all(small < large for small, large in itertools.pairwise(subsets))
    assert set(make_plan(config(cohort_path, data__labeled_scans=2, seed=9), cohort).labelled) == subsets[1]
    drawn = {
        make_plan(config(cohort_path, data__labeled_scans=2, data__subset_seed=s), cohort).labelled for s in range(9)
    }
    assert len(drawn) > 1
    rest = make_plan(config(cohort_path, data__labeled_scans=2), cohort)
    assert set(rest.labelled) | set(rest.unlabelled) == set("abcdefuw")
    assert not set(rest.labelled) & set(rest.unlabelled)
    named = make_plan(config(cohort_path, data__labeled_ids=["d", "b"]), cohort)
    assert named.labelled == ("b", "d")


def without(cohort: Cohort, change: Callable[[ScanRecord], ScanRecord | None]) -> Cohort:
    records = [changed for record in cohort.records if (changed := change(record)) is not None]
    return dataclasses.replace(cohort, records=records)


def test_what_a_cohort_cannot_serve_is_one_clear_line(cohort_path: str) -> None:
    cohort = Cohort.open(cohort_path)
    bare = without(cohort, lambda r: dataclasses.replace(r, labelled=False))
    no_val = without(cohort, lambda r: r if r.split == "train" else None)
    no_femur = without(cohort, lambda r: dataclasses.replace(r, voxels={"hip": 9}) if r.scan_id in "ab" else r)
    cases = [
        (
            cohort,
            {"data__labeled_scans": 7},
            ConfigError,
            r"^data\.labeled_scans: more labelled scans asked for than there are \(got 7\); "
            r"the cohort has 6 labelled training scans; set data\.labeled_scans=6 or less$",
        ),
        (
            cohort,
            {"data__labeled_ids": ["a", "v"]},
            ConfigError,
            r"^data\.labeled_ids: not a labelled training scan.*got v\)",
        ),
        (bare, {}, DataError, r"the cohort has no labelled training scan; training needs at least one; ingest"),
        (
            no_val,
            {"train__select": "val"},
            ConfigError,
            r"^train\.select: no validation scans to select on \(got val\); set train\.select=last",
        ),
        (
            no_femur,
            {"data__labeled_ids": ["a", "b"]},
            DataError,
            r"class femur has no voxel in any of the 2 labelled training scans; every class must occur",
        ),
    ]
    for which, overrides, kind, text in cases:
        with pytest.raises(kind, match=text) as caught:
            make_plan(config(cohort_path, **overrides), which)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_cohort_without_unlabelled_scans_uses_the_labelled_ones(cohort_path: str) -> None:
    plan = make_plan(config(cohort_path), without(Cohort.open(cohort_path), lambda r: r if r.labelled else None))
    assert plan.unlabelled == plan.labelled
    assert plan.notes[0].startswith("no unlabelled scan is left")


def test_held_out_scans_never_train(cohort_path: str) -> None:
    cohort = without(
        Cohort.open(cohort_path), lambda r: dataclasses.replace(r, split="test") if r.scan_id in "fw" else r
    )
    plan = make_plan(config(cohort_path), cohort)
    used = {*plan.labelled, *plan.unlabelled, *plan.validation}
    assert used == set("abcdeuv")


# The model artefact

NETWORK = NetworkConfig(base_filters=2, levels=2)
INFO = ModelInfo(
    class_names=("background", "bone"),
    modality="CT",
    spacing_mm=(3.0, 2.0, 1.0),
    patch_zyx=(16, 8, 8),
    network=NETWORK,
    intensity=Intensity("ct", -100.0, 900.0, 300.0, 200.0),
    method="supervised",
    threshold_nats=0.5,
    step=7,
    checkpoint="last",
)


@pytest.fixture
def model_run(tmp_path: Path) -> Path:
    weights = {name: build_network(NETWORK, num_classes=2).double().state_dict() for name in ("student", "teacher")}
    save_model(tmp_path / "model", INFO, weights)
    return tmp_path


def test_model_round_trip(model_run: Path) -> None:
    for folder in (model_run, model_run / "model", str(model_run)):
        model = load_model(folder)
        assert model.info == INFO
        assert set(model.networks) == {"student", "teacher"}
        output = model.networks["teacher"](torch.zeros(1, 1, 16, 8, 8))
        assert output.logits.shape == (1, 2, 16, 8, 8)
        assert output.logits.dtype == torch.float32  # whatever it was trained in
    saved = load_file(model_run / "model/student.safetensors")
    assert all(torch.equal(load_model(model_run).networks["student"].state_dict()[k], v) for k, v in saved.items())
    assert [p.name for p in model_run.iterdir()] == ["model"]


def test_a_model_is_replaced_whole(model_run: Path) -> None:
    weights = {name: build_network(NETWORK, num_classes=2).state_dict() for name in ("student", "teacher")}
    save_model(model_run / "model", dataclasses.replace(INFO, step=8), weights)
    assert load_model(model_run).info.step == 8
    assert [p.name for p in model_run.iterdir()] == ["model"]


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps({**content, **changes}))

    return edit


def other_weights(folder: Path) -> None:
    """Whole and of the right shapes, but not the ones that were saved."""
    state = load_file(folder / "student.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, folder / "student.safetensors")


@pytest.mark.parametrize(
    ("tamper", "text"),
    [
        (edited(format=2), r"model\.json: model of another format \(got 2\); must be 1"),
        (edited(network={"base_filters": 2, "layers": 3}), "unreadable model"),
        (edited(network={"base_filters": 0}), "unreadable model"),
        (edited(network=None), "unreadable model"),
        (edited(network={"base_filters": 3, "levels": 2}), "unreadable model"),
        (edited(class_names=["background", "a", "b"]), "unreadable model"),
        (edited(sha256=None), "unreadable model"),
        (edited(intensity={"kind": "ct", "code": "1"}), "unreadable model"),
        (lambda folder: (folder / "model.json").write_text("{"), "unreadable model"),
        (lambda folder: (folder / "model.json").write_text("[]"), "unreadable model"),
        (lambda folder: (folder / "student.safetensors").unlink(), "unreadable model"),
        (lambda folder: truncate(folder / "student.safetensors"), r"student\.safetensors: .*checksum"),
        (lambda folder: (folder / "teacher.safetensors").write_bytes(b"no"), r"teacher\.safetensors: .*checksum"),
        (other_weights, r"student\.safetensors.*checksum"),
    ],
)
def test_a_tampered_model_is_refused(model_run: Path, tamper: Callable[[Path], Any], text: str) -> None:
    tamper(model_run / "model")
    with pytest.raises(DataError, match=text) as caught:
        load_model(model_run)
    assert "\n" not in str(caught.value)


def test_no_model_yet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no trained model here.*run distseg train first"):
        load_model(tmp_path)
