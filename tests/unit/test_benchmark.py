"""`distseg benchmark`: scheduling, resuming, failures, refusals with fake training; tables against hand-made ones."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from distseg import api
from distseg.config.compose import recipe_hash
from distseg.config.schema import METHOD_NAMES, LoggingConfig, TrainRunConfig
from distseg.config.suites import Suite, load_suite, parse_suite, suite_folder
from distseg.config.verbs import BenchmarkConfig, EvaluateConfig
from distseg.errors import ConfigError, DataError, DistsegError, FinishedWithFailures, InputError, RunMismatchError
from distseg.evaluation.benchmark_curves import RunCurves, benchmark_curves
from distseg.evaluation.benchmark_grids import comparison_grid, markdown, summary_grid
from distseg.evaluation.benchmark_tables import RunScores, comparisons_csv, make_readings, summary_csv
from distseg.inference.model import ModelInfo, build_network, save_model
from distseg.methods import KINDS
from distseg.training.checkpoint import checkpoint_dir
from distseg.training.run import RunDirectory
from distseg.training.setup import open_run
from distseg.work import benchmark_report
from distseg.work.benchmark import run_benchmark, waves
from distseg.work.benchmark_cells import Cell, cell_name, make_cells
from distseg.work.benchmark_slices import pick_scans
from distseg.work.executor import LocalExecutor
from distseg.work.owner import owning

ROWS = ("supervised", "uamt", "embedding_matching")
DICE = {"phase_a": 0.2, "supervised": 0.5, "uamt": 0.6, "embedding_matching": 0.7}


def content(**changes: Any) -> dict[str, Any]:
    """A suite for the tiny cohort."""
    return {
        "common": {
            "network.levels": 2,
            "network.base_filters": 2,
            "sampling.patch_zyx": [8, 8, 8],
            "train.validation_patches": 2,
        },
        "phase_a": {"method": "supervised", "steps": 3},
        "phase_b": {"steps": 2},
        "rows": {name: {"method": name} for name in ROWS},
        "subsets": {2: ["a", "c"], 3: {"subset_seed": 5}},
        "labelled": [2],
        "seeds": [0, 1],
        **changes,
    }


class Fakes:
    """Training and evaluation that leave, at once, what a benchmark looks at. Calls are written down by cell.

    `whole`: a run directory that can also be identified and predicted with, at ten times the cost.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole
        self.trained: list[str] = []
        self.measured: list[str] = []
        self.configs: dict[str, TrainRunConfig] = {}
        self.break_training: dict[str, Exception] = {}
        self.break_evaluation: dict[str, Exception] = {}

    def train(self, config: TrainRunConfig) -> None:
        name = Path(config.run).name
        self.trained.append(name)
        self.configs[name] = config
        if config.train.init_from is not None:
            assert (Path(config.train.init_from) / "model" / "model.json").is_file(), "branched before phase A ended"
        run = Path(config.run)
        run.mkdir(parents=True, exist_ok=True)
        steps = range(1, config.train.steps + 1)
        rows = [{"step": step, "loss": 1.0, "loss_supervised": 1.0 / step, "time_step_s": 0.5} for step in steps]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if name in self.break_training:
            raise self.break_training[name]
        if self.whole:
            save_untrained(config)
        else:
            (run / "model").mkdir(exist_ok=True)
            (run / "model" / "model.json").write_text("{}")

    def evaluate(self, config: EvaluateConfig) -> None:
        name = Path(config.run).name
        self.measured.append(name)
        if name in self.break_evaluation:
            raise self.break_evaluation[name]
        folder = Path(config.run) / "evaluation" / config.split
        folder.mkdir(parents=True)
        lines = per_scan({"v": DICE[name.split("__")[0]]}, classes=("hip", "femur"))
        with (folder / "per_scan.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        (folder / "metrics.json").write_text(json.dumps({"scans_failed": 0}))


def save_untrained(config: TrainRunConfig) -> None:
    run, plan = open_run(config)
    checkpoint_dir(run.checkpoints, config.train.steps).mkdir(parents=True)
    network = build_network(config.network, num_classes=plan.num_classes)
    info = ModelInfo(
        plan.class_names, plan.modality, plan.spacing_mm, (8, 8, 8), config.network, plan.intensity,
        config.method.name, 0.5, config.train.steps, "last",
    )  # fmt: skip
    weights = network.state_dict()
    save_model(run.model, info, {"student": weights, "teacher": weights})


def per_scan(dice: dict[str, float | None], *, classes: tuple[str, ...] = ("hip",)) -> list[dict[str, str]]:
    """Lines of per_scan.csv: IoU = Dice / 2 and HD95 = 10 (1 - Dice); `None` is a miss. All readings are alike."""
    lines = []
    for scan, value in dice.items():
        for network in ("student", "teacher"):
            for component in ("all", "largest"):
                for name in classes:
                    got = 0.0 if value is None else value
                    lines.append(
                        {
                            "scan_id": scan,
                            "network": network,
                            "component": component,
                            "class": name,
                            "status": "missed" if value is None else "found",
                            "iou": str(got / 2),
                            "dice": str(got),
                            "hd95_mm": str(10 * (1 - got)),
                        }
                    )
    return lines


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of what a fake benchmark costs."""
    monkeypatch.setattr(benchmark_report, "_anatomy", lambda *_: ([], []))
    monkeypatch.setattr(benchmark_report, "_curves", lambda _: [])


@pytest.fixture
def start(tmp_path: Path, cohort_path: str, no_pictures: None) -> Callable[..., Any]:
    """Runs the suite of `content` with fakes in this process."""
    return starter(tmp_path, cohort_path)


def starter(tmp_path: Path, cohort_path: str) -> Callable[..., Any]:

    def run(fakes: Fakes, *, suite: dict[str, Any] | None = None, run: str = "run", **keys: Any) -> Any:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(suite or content(), sort_keys=False))
        config = BenchmarkConfig(
            cohort=keys.pop("cohort", cohort_path),
            run=str(tmp_path / run),
            suite=str(file),
            side_by_side=1,
            logging=LoggingConfig(progress=False),
            **keys,
        )
        return run_benchmark(config, executor=LocalExecutor(1), train=fakes.train, evaluate=fakes.evaluate)

    return run


def cells_csv(run: Path) -> dict[str, dict[str, str]]:
    return {line["cell"]: line for line in read_csv(run / "tables" / "cells.csv")}


def read_csv(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


# --- what runs -----------------------------------------------------------------------------------------------------


def test_all_methods_branch_from_one_phase_a(start: Callable[..., Any], tmp_path: Path) -> None:
    fakes = Fakes()
    result = start(fakes)
    branches = [cell_name(row, 2, seed) for seed in (0, 1) for row in ROWS]
    assert fakes.trained == ["phase_a__2__seed0", "phase_a__2__seed1", *branches]
    assert fakes.measured == branches
    assert result.failed == ()
    for name, config in fakes.configs.items():
        assert config.optimizer.schedule_steps == 5
        assert config.data.labeled_ids == ["a", "c"]
        assert config.seed == int(name[-1])
        parent = None if name.startswith("phase_a") else str(tmp_path / "run/cells" / f"phase_a__2__seed{name[-1]}")
        assert config.train.init_from == parent
        assert config.train.steps == (2 if parent else 3)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock", "benchmark.yaml", "cells", "figures", "report.html", "tables",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "run" / "tables").iterdir()} == {
        "summary.csv", "summary.md", "comparisons.csv", "cells.csv",
    }  # fmt: skip


def test_pictures(tmp_path: Path, cohort_path: str) -> None:
    """One validation scan, one label count; predicted slices are kept for the next time."""
    start = starter(tmp_path, cohort_path)
    start(Fakes(whole=True), suite=content(seeds=[0]))
    figures = {path.name: path.read_bytes() for path in (tmp_path / "run/figures").iterdir()}
    assert set(figures) == {"slice_worst.png", "curves_2_1.png"}
    assert (tmp_path / "run/report.html").read_text().count("data:image/png") == 2
    kept = tmp_path / "run/cells/uamt__2__seed0/slices.npz"
    assert not (tmp_path / "run/cells/phase_a__2__seed0/slices.npz").exists()
    before = kept.stat().st_mtime_ns
    start(Fakes(), suite=content(seeds=[0]))
    assert kept.stat().st_mtime_ns == before
    assert figures == {path.name: path.read_bytes() for path in (tmp_path / "run/figures").iterdir()}


def test_the_report_says_what_training_warned_of(start: Callable[..., Any], tmp_path: Path) -> None:
    start(Fakes())
    said = [(tmp_path / "run" / name).read_text() for name in ("report.html", "tables/summary.md")]
    assert not any("Warnings" in text for text in said)
    metrics = tmp_path / "run/cells/embedding_matching__2__seed1/metrics.jsonl"
    row = {"step": 2, "alarm_flood": 1, "foreground_unlabelled": 0.3, "foreground_target": 0.1}
    metrics.write_text(json.dumps({"step": 1}) + "\n" + json.dumps(row) + "\n")
    start(Fakes())
    for name in ("report.html", "tables/summary.md"):
        text = (tmp_path / "run" / name).read_text()
        assert "Warnings while they trained" in text
        assert "embedding_matching, 2 labelled scans" in text
        assert "flood: the student calls 30% of unlabelled patches foreground, labelled ones hold 10%" in text
        assert "Seed 1 at 1 of 2 steps, from 2 to 2." in text


def test_the_same_command_again_does_what_is_left(start: Callable[..., Any], tmp_path: Path) -> None:
    start(Fakes())
    shutil.rmtree(tmp_path / "run/cells/uamt__2__seed1/evaluation")
    shutil.rmtree(tmp_path / "run/cells/supervised__2__seed0")
    again = Fakes()
    start(again)
    assert again.trained == ["supervised__2__seed0"]
    assert sorted(again.measured) == ["supervised__2__seed0", "uamt__2__seed1"]
    idle = Fakes()
    start(idle)
    assert idle.trained == idle.measured == []


def test_a_failed_cell_is_named_and_the_others_finish(start: Callable[..., Any], tmp_path: Path) -> None:
    fakes = Fakes()
    fakes.break_training["uamt__2__seed1"] = DistsegError("step 2: loss is not finite")
    fakes.break_evaluation["supervised__2__seed0"] = FinishedWithFailures("run", [("v", "unreadable")])
    with pytest.raises(FinishedWithFailures) as caught:
        start(fakes)
    assert dict(caught.value.failures) == {
        "uamt__2__seed1": "step 2: loss is not finite",
        "supervised__2__seed0": "scans not measured: v (unreadable)",
    }
    cells = cells_csv(tmp_path / "run")
    assert {name for name, line in cells.items() if line["state"] == "failed"} == set(dict(caught.value.failures))
    assert cells["uamt__2__seed1"]["reason"] == "step 2: loss is not finite"
    assert "step 2: loss is not finite" in (tmp_path / "run/report.html").read_text()
    rows = read_csv(tmp_path / "run/tables/summary.csv")
    assert {(r["row"], r["seeds"]) for r in rows} == {("supervised", "1"), ("uamt", "1"), ("embedding_matching", "2")}
    assert (tmp_path / "run/tables/comparisons.csv").read_text() == ""  # nothing to compare with: seeds are missing
    again = Fakes()
    start(again)
    assert again.trained == ["uamt__2__seed1"]
    assert again.measured == ["supervised__2__seed0", "uamt__2__seed1"]
    rows = read_csv(tmp_path / "run/tables/comparisons.csv")
    assert {row["baseline"] for row in rows} == {"supervised", "uamt"}


def test_branches_of_a_failed_phase_a_do_not_run(start: Callable[..., Any]) -> None:
    fakes = Fakes()
    fakes.break_training["phase_a__2__seed0"] = RuntimeError("no")
    with pytest.raises(FinishedWithFailures) as caught:
        start(fakes)
    failures = dict(caught.value.failures)
    assert failures.pop("phase_a__2__seed0") == "RuntimeError: no"
    assert failures == {cell_name(row, 2, 0): "its phase A failed: RuntimeError: no" for row in ROWS}
    assert fakes.measured == [cell_name(row, 2, 1) for row in ROWS]


def test_a_part_of_the_suite(start: Callable[..., Any], tmp_path: Path) -> None:
    fakes = Fakes()
    start(fakes, rows=["supervised", "embedding_matching"], labelled=[3], seeds=[1])
    assert fakes.measured == ["supervised__3__seed1", "embedding_matching__3__seed1"]
    stored = yaml.safe_load((tmp_path / "run/benchmark.yaml").read_text())
    assert len(stored["subsets"][3]) == 3
    whole = Fakes()
    start(whole, labelled=[2, 3])  # the subset drawn before stays
    assert cell_name("supervised", 3, 1) not in whole.trained
    assert len(whole.measured) == 2 * 2 * 3 - 2


def test_cells_of_another_benchmark_are_not_trained_again(start: Callable[..., Any], tmp_path: Path) -> None:
    there = str(tmp_path / "run")
    start(Fakes(whole=True), rows=["supervised", "uamt"])
    idea = content(
        rows={
            "uamt_again": {"method": "uamt"},  # the same cell by another name
            "doubled": {"method": "uamt", "overrides": {"method.weight_consistency": 0.2}},
        }
    )
    fakes = Fakes()
    DICE["doubled"] = DICE["uamt_again"] = 0.65
    start(fakes, suite=idea, run="idea", cells_from=there)
    assert fakes.trained == ["doubled__2__seed0", "doubled__2__seed1"]
    assert fakes.configs["doubled__2__seed0"].train.init_from == f"{there}/cells/phase_a__2__seed0"
    dice = {r["row"]: float(r["mean"]) for r in read_csv(tmp_path / "idea/tables/summary.csv") if r["metric"] == "dice"}
    assert dice == {"uamt_again": DICE["uamt"], "doubled": 0.65}  # read where it was finished

    more = Fakes()
    start(more, suite={**idea, "seeds": [0, 2]}, run="more", cells_from=there)
    assert more.trained == [
        "phase_a__2__seed2", "doubled__2__seed0", "uamt_again__2__seed2", "doubled__2__seed2",
    ]  # fmt: skip


def test_what_cells_from_cannot_mean(start: Callable[..., Any], tmp_path: Path) -> None:
    there = str(tmp_path / "run")
    start(Fakes(whole=True), rows=["supervised"], seeds=[0])
    with pytest.raises(ConfigError, match=r"cells_from: no benchmark lives there"):
        start(Fakes(), run="none", cells_from=str(tmp_path / "nowhere"))
    (tmp_path / "young").mkdir()
    shutil.copy(tmp_path / "run/benchmark.yaml", tmp_path / "young")
    with pytest.raises(ConfigError, match=r"cells_from: no finished cell of this suite there"):
        start(Fakes(), run="none", cells_from=str(tmp_path / "young"))
    longer = content(phase_a={"method": "supervised", "steps": 4})
    with pytest.raises(ConfigError, match=r"cells_from: no finished cell of this suite there"):
        start(Fakes(), suite=longer, run="longer", cells_from=there)
    closer = content(evaluate={"overlap": 0.5})
    with pytest.raises(ConfigError, match=r"another evaluate\.overlap .*0\.25 there, 0\.5 here"):
        start(Fakes(), suite=closer, run="closer", cells_from=there)


def test_phase_a_is_measured_where_asked(start: Callable[..., Any], tmp_path: Path) -> None:
    fakes = Fakes()
    start(fakes, suite=content(evaluate={"phase_a": True}, seeds=[0]))
    assert fakes.measured[0] == "phase_a__2__seed0"
    rows = read_csv(tmp_path / "run/tables/summary.csv")
    assert [r["row"] for r in rows if r["metric"] == "dice"][:4] == ["phase_a", *ROWS]


def cell(row: str, seed: int, parent: str | None) -> Cell:
    return Cell(row, 2, seed, TrainRunConfig(cohort="", run=""), None, parent)


def test_a_branch_waits_for_its_phase_a_and_workers_for_nobody_else() -> None:
    starts = [cell("phase_a", seed, None) for seed in range(3)]
    branches = [cell("uamt", seed, starts[seed].name) for seed in range(3)]
    assert list(waves(starts, branches, 2)) == [starts[:2], [starts[2], *branches[:2]], [branches[2]]]
    assert list(waves(starts, branches, 3)) == [starts, branches]
    assert list(waves(starts[:1], branches[:1], 2)) == [starts[:1], branches[:1]]
    assert list(waves([], branches, 2)) == [branches]
    assert list(waves([], [], 2)) == []


# --- what is refused, before anything runs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sedes": [0]}, r"unknown key \(got sedes\).*did you mean seeds"),
        ({"rows": {"x": {"method": "uatm"}}}, r"rows\.x\.method.*did you mean .*uamt"),
        ({"rows": {"x": {}}}, r"rows\.x: method: key not given"),
        ({"rows": {}}, r"rows: needs at least one entry"),
        ({"rows": {"phase_a": {"method": "uamt"}}}, r"not a row's name"),
        ({"rows": {"a__b": {"method": "uamt"}}}, r"not a row's name"),
        ({"rows": {"x": {"method": "uamt", "overrides": {"method.pases": 3}}}}, r"no such key.*method\.passes"),
        ({"rows": {"x": {"method": "uamt", "overrides": {"method.passes": 0}}}}, r"row x: method\.passes.*1 to 64"),
        ({"common": {"seed": 3}}, r"common: seed: a suite sets this itself; use seeds"),
        ({"common": {"train.steps": 3}}, r"use phase_a\.steps and phase_b\.steps"),
        ({"common": {"resources.workers": 2}}, r"common: resources\.workers: a suite sets this itself"),
        ({"common": {"network.levls": 2}}, r"no such key; did you mean network\.levels"),
        ({"common": {"network.levels": "two"}}, r"row supervised|row phase_a"),
        ({"phase_b": {"steps": 0}}, r"phase_b: steps.*at least 1"),
        ({"phase_b": {"steps": "many"}}, r"phase_b: steps: value of another type \(got many\)"),
        ({"seeds": []}, r"seeds: must have entries"),
        ({"seeds": [0, 0]}, r"each once"),
        ({"seeds": [0.5]}, r"whole numbers"),
        ({"subsets": {0: {"subset_seed": 0}}}, r"too few labelled scans \(got 0\)"),
        ({"subsets": {2: ["a"]}}, r"subsets\.2: another number of scans"),
        ({"subsets": {2: ["a", "nobody"]}}, r"subsets\.2: not a labelled training scan.*nobody"),
        ({"subsets": {7: {"subset_seed": 0}}, "labelled": [7]}, r"more labelled scans asked for than.*got 7"),
        ({"labelled": [5]}, r"labelled: the suite has no such entry \(got \[5\]\)"),
        ({"subsets": {"a__b": "all"}}, r"subsets: not a subset's name \(got a__b\); a number of scans, or a word"),
        ({"subsets": {"some": {"subset_seed": 1}}}, r"subsets\.some: says not which scans.*name the subset by their"),
        ({"subsets": {2: ["a", "c"], "p": {"patches": 9, "of": 3}}}, r"subsets\.p\.of.*\(got 3\); one of 2"),
        ({"subsets": {"p": {"patches": 0}}}, r"subsets\.p: patches: value not allowed \(got 0\); at least 1"),
        ({"subsets": {"p": {"patches": 9999}}, "labelled": ["p"]},
         r"suite mine: subsets\.p\.patches: more labelled patches.*\(got 9999\); 6 labelled scans hold \d+ patches"),
        ({"common": {"data.labeled_patches": 4}}, r"labeled_patches: a suite sets this itself; use subsets"),
        ({"like": "protocol_d"}, r"like.*did you mean .*protocol_c"),
        ({"like": "table1"}, r"like: is itself like another suite \(got table1\); name protocol_c"),
        ({"compare": ["nobody"]}, r"compare, against.*nobody"),
        ({"preset": "tiny"}, r"preset.*small, full, xie2024"),
        ({"evaluate": {"split": "test"}}, r"evaluate\.split.*splits with annotated scans: train, val"),
        ({"evaluate": {"overlap": 0.95}}, r"overlap"),
    ],
)  # fmt: skip
def test_a_bad_suite_is_one_line(start: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    fakes = Fakes()
    with pytest.raises(ConfigError, match=says) as caught:
        start(fakes, suite=content(**changes))
    assert "\n" not in str(caught.value)
    assert fakes.trained == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"augment.flip": "all"}, r"rows\.x and rows\.supervised.*augment\.flip: all and none"),
        ({"network.base_filters": 4}, r"network\.base_filters: 4 and 2"),
        ({"train.ema_decay": 0.9}, r"train\.ema_decay"),
    ],
)
def test_differing_recipes_are_refused(start: Callable[..., Any], overrides: dict[str, Any], says: str) -> None:
    rows = {"supervised": {"method": "supervised"}, "x": {"method": "uamt", "overrides": overrides}}
    with pytest.raises(ConfigError, match=r"differing recipes in one table"):
        start(Fakes(), suite=content(rows=rows))
    with pytest.raises(ConfigError, match=says):
        start(Fakes(), suite=content(rows=rows))


def test_a_class_absent_from_the_labelled_scans_is_refused(
    start: Callable[..., Any], cohort_path: str, tmp_path: Path
) -> None:
    cohort = tmp_path / "absent.zarr"
    shutil.copytree(cohort_path, cohort)
    index = Path(cohort_path).with_suffix(".index.jsonl")
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for line in lines:
        line["voxels"]["femur"] = 0
    (tmp_path / "absent.index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="class femur has no voxel in any of the 2 labelled"):
        start(Fakes(), cohort=str(cohort))


def test_a_directory_keeps_its_suite_and_cohort(start: Callable[..., Any], cohort_path: str, tmp_path: Path) -> None:
    cohort = tmp_path / "mine.zarr"
    shutil.copytree(cohort_path, cohort)
    index, copied = Path(cohort_path).with_suffix(".index.jsonl"), tmp_path / "mine.index.jsonl"
    shutil.copy(index, copied)
    start(Fakes(), cohort=str(cohort))
    with pytest.raises(RunMismatchError, match=r"another suite \(mine\).*phase_b_steps: 2 there, 9 asked"):
        start(Fakes(), cohort=str(cohort), suite=content(phase_b={"steps": 9}))
    with pytest.raises(RunMismatchError, match="another cohort"):
        start(Fakes())
    copied.write_text(copied.read_text().replace('"val"', '"test"'))
    with pytest.raises(RunMismatchError, match="the cohort has changed"):
        start(Fakes(), cohort=str(cohort))


def test_a_second_benchmark_in_the_directory_is_refused(start: Callable[..., Any], tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match=r"run: another process writes this benchmark \(got host")
    with owning(tmp_path / "run/.lock", what="benchmark", name="run"), refused:
        start(Fakes())
    (tmp_path / "run/config.yaml").write_text("")
    with pytest.raises(RunMismatchError, match="a training run lives here"):
        start(Fakes())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rows: {}\nrows: {}\n", r"key rows is given twice, line 1"),
        ("rows: [", r"not readable YAML: .*line 1"),
        ("- a\n", r"must be a mapping"),
    ],
)
def test_a_file_that_is_no_suite(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_suite(str(tmp_path / "s.yaml"))


def test_unknown_suites_and_parts() -> None:
    with pytest.raises(ConfigError, match=r"unknown suite.*did you mean suite=protocol_c"):
        load_suite("protocol_d")
    with pytest.raises(ConfigError, match="No such file"):
        load_suite("/nowhere/mine.yaml")
    suite = parse_suite("mine", content())
    with pytest.raises(ConfigError, match=r"rows: the suite has no such entry \(got \['x'\]\); one or more of superv"):
        suite.select(rows=["x"], labelled=None, seeds=None)
    assert suite.select(rows=None, labelled=None, seeds=[5, 3]).seeds == (5, 3)  # the suite's are what it says itself
    for seeds in ([], [1, 1], [-1]):
        with pytest.raises(ConfigError, match="seeds: not seeds"):
            suite.select(rows=None, labelled=None, seeds=seeds)


def test_shipped_suites() -> None:
    protocol = load_suite("protocol_c")
    subsets = {count: set(subset.ids or ()) for count, subset in protocol.subsets.items()}
    assert {count: len(ids) for count, ids in subsets.items()} == {4: 4, 10: 10, 21: 21}
    assert subsets[4] < subsets[10] < subsets[21]
    assert [row.name for row in protocol.rows] == [
        "supervised", "mean_teacher", "uamt", "as_published", "embedding_matching",
    ]  # fmt: skip
    assert (protocol.phase_a_steps, protocol.phase_b_steps, protocol.seeds) == (600, 400, (0, 1, 2))
    assert (protocol.labelled, protocol.overlap) == ((4,), 0.25)
    assert protocol.against == ("supervised", "mean_teacher", "uamt", "as_published")
    assert load_suite("smoke").hash() != protocol.hash()


def test_a_suite_like_another() -> None:
    """Its own keys over the other's; common keys and subsets are joined; other rows have other comparisons."""
    base = load_suite("protocol_c")
    mine = parse_suite("m", {"like": "protocol_c", "rows": {"x": {"method": "cct"}}, "common": {"train.threads": 3}})
    assert [row.name for row in mine.rows] == ["x"]
    assert (mine.seeds, mine.phase_a, mine.subsets) == (base.seeds, base.phase_a, base.subsets)
    assert mine.common == {**base.common, "train.threads": 3}
    assert (mine.description, mine.compare, mine.against) == ("", ("x",), ())
    assert parse_suite("m", {"like": "protocol_c"}).compare == base.compare


def test_every_shipped_suite_parses_and_its_rows_compose() -> None:
    """With the keys of each row as `distseg train` would take them, and every ablation within one recipe."""
    names = {file.stem for file in suite_folder().glob("*.yaml")}
    assert {"table1", "label_counts", "tuning", "organs", "protocol_c", "smoke"} <= names
    assert {f"ablation_{of}" for of in ("terms", "similarity", "uncertainty", "threshold", "references")} <= names
    config = BenchmarkConfig(cohort="c", run="r")
    for name in names:
        suite = load_suite(name).select(rows=None, labelled=None, seeds=[0])
        for subset in suite.labelled[-1:]:  # one is enough: composing takes time
            one = suite.select(rows=None, labelled=[subset], seeds=None)
            cells = make_cells(one, config, subsets={subset: ("a",)}, taken=lambda cell: cell)[1]
            assert [cell.row for cell in cells] == [row.name for row in suite.rows]
            assert len({recipe_hash(cell.config) for cell in cells}) == 1
    assert [row.method for row in load_suite("table1").rows] == list(METHOD_NAMES)
    assert len(load_suite("table1").against) == 6
    assert len(load_suite("tuning").rows) == 3 * 6


def test_subsets_by_words(start: Callable[..., Any], tmp_path: Path) -> None:
    """All scans, and patches of a subset; the command line's `labelled=[all,2]` is text."""
    subsets = {2: ["a", "c"], "all": "all", "9_patches": {"patches": 9, "of": 2}, "many": {"patches": 40}}
    suite = content(subsets=subsets, labelled=[2], seeds=[0], rows={"x": {"method": "uamt"}}, compare=[])
    DICE["x"] = 0.5
    fakes = Fakes()
    start(fakes, suite=suite, labelled=["many", "9_patches", "2", "all"])
    branches = [f"x__{name}__seed0" for name in ("2", "all", "9_patches", "many")]
    assert fakes.measured == branches
    keys = {name: fakes.configs[f"x__{name}__seed0"].data for name in ("2", "all", "9_patches", "many")}
    assert {name: (len(data.labeled_ids), data.labeled_patches) for name, data in keys.items()} == {
        "2": (2, None), "all": (6, None), "9_patches": (2, 9), "many": (6, 40),
    }  # fmt: skip
    phase_a = fakes.configs["phase_a__9_patches__seed0"].data
    assert (phase_a.labeled_ids, phase_a.labeled_patches) == (["a", "c"], 9)
    report = (tmp_path / "run/tables/summary.md").read_text()
    titles = [
        "2 labelled scans",
        "all labelled scans",
        "9 labelled patches of 2 scans",
        "40 labelled patches of all scans",
    ]
    assert [line.removeprefix("## ") for line in report.splitlines() if line.startswith("## ")][:4] == titles
    assert f"Trained on {', '.join(titles[:3])} and {titles[3]} of the cohort" in report
    stored = yaml.safe_load((tmp_path / "run/benchmark.yaml").read_text())
    assert list(stored["subsets"]) == [2, "all", "9_patches", "many"]
    idle = Fakes()
    start(idle, suite=suite, labelled=["9_patches"])
    assert idle.trained == []


def test_older_suites_keep_their_hash() -> None:
    """What subsets have learned since stands in a suite's content only where it says something."""
    subsets = parse_suite("a", content(subsets={2: ["a", "c"], 3: {"subset_seed": 5}})).content()["subsets"]
    assert subsets == {"2": {"ids": ["a", "c"], "subset_seed": None}, "3": {"ids": None, "subset_seed": 5}}


def test_passes_stand_beside_the_times(start: Callable[..., Any], tmp_path: Path) -> None:
    rows = {name: {"method": name} for name in ("supervised", "cct")}
    DICE["cct"] = 0.5
    start(Fakes(), suite=content(rows=rows, seeds=[0]))
    line = cells_csv(tmp_path / "run")["cct__2__seed0"]
    assert (line["forward_passes"], line["backward_passes"], line["decoders_passes"]) == ("2", "2", "3")
    costs = (tmp_path / "run/tables/summary.md").read_text().split("## What it took")[1]
    assert "| cct, 2 labelled scans | 2 | 2 forward, 2 backward, 3 decoders |" in costs
    assert "| supervised, 2 labelled scans | 2 | 1 forward, 1 backward |" in costs


def test_a_method_with_too_few_classes_is_refused(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KINDS["uamt"], "max_classes", 2)
    fakes = Fakes()
    with pytest.raises(ConfigError, match=r"method: more classes than this method can serve \(got uamt\).*has 3"):
        start(fakes)
    assert fakes.trained == []


def test_the_hash_is_of_what_runs() -> None:
    def parsed(**changes: Any) -> Suite:
        return parse_suite("a", content(**changes))

    assert parse_suite("b", content()).hash() == parsed().hash() == parsed(description="words").hash()
    assert parsed(common={"network": {"levels": 2}}).hash() == parsed(common={"network.levels": 2}).hash()
    assert parsed(seeds=[0, 2]).hash() != parsed().hash()


# --- tables --------------------------------------------------------------------------------------------------------


def scores(row: str, seed: int, dice: dict[str, float | None]) -> RunScores:
    return RunScores(row, 4, seed, per_scan(dice))


def test_tables_are_the_hand_computed_ones() -> None:
    """Two seeds, five scans; the new row is better on each scan by the same order, so the exact p is 2 / 2^5."""
    old = {scan: 0.5 + 0.02 * i for i, scan in enumerate("abcde")}
    shifts = [0.05, 0.06, 0.07, 0.08, 0.09]
    new = {scan: value + shift for (scan, value), shift in zip(old.items(), shifts, strict=True)}
    runs = [scores("old", seed, {scan: value + 0.01 * seed for scan, value in old.items()}) for seed in (0, 1)]
    runs += [scores("new", seed, {scan: value + 0.03 * seed for scan, value in new.items()}) for seed in (0, 1)]
    readings = make_readings(runs, seeds=[0, 1], compared=["new"], against=["old"])
    assert [(r.network, r.component, r.class_name) for r in readings] == [
        (network, component, "hip") for network in ("student", "teacher") for component in ("all", "largest")
    ]
    before, after = readings[0].summaries["dice"]
    assert before.mean == pytest.approx(0.54 + 0.005)
    assert before.median == pytest.approx(0.54 + 0.005)
    assert before.seed_sd == pytest.approx(0.01 / np.sqrt(2))
    assert after.mean == pytest.approx(0.54 + 0.07 + 0.015)
    (verdict,) = readings[0].verdicts["dice"]
    # per scan, averaged over seeds: shifts + 0.015 - 0.005
    assert verdict.comparison.mean_difference == pytest.approx(0.08)
    assert verdict.comparison.p_wilcoxon == pytest.approx(2 / 2**5)
    assert verdict.reads == "not shown"
    assert 0.06 < verdict.comparison.difference_low < 0.08 < verdict.comparison.difference_high < 0.1
    # (z_{.975} + z_{.8}) / sqrt(5 x 3 / pi) standard deviations of the differences
    assert verdict.detectable == pytest.approx((1.959964 + 0.841621) / np.sqrt(15 / np.pi) * np.std(shifts, ddof=1))
    (distance,) = readings[0].verdicts["hd95_mm"]
    assert distance.comparison.mean_difference == pytest.approx(-0.8)
    medians = [10 * (1 - 0.545), 10 * (1 - 0.625)]
    assert distance.comparison.median_ratio == pytest.approx(medians[1] / medians[0])


def test_holm_runs_over_all_comparisons_of_a_metric_and_words_follow_the_better_side() -> None:
    scans = [f"s{i:02}" for i in range(10)]
    base = {scan: 0.4 + 0.01 * i for i, scan in enumerate(scans)}
    low = {scan: value - 0.05 - 0.001 * i for i, (scan, value) in enumerate(base.items())}
    runs = [scores("base", 0, base), scores("low", 0, low), scores("same", 0, base)]
    (reading, *_) = make_readings(runs, seeds=[0], compared=["base", "low"], against=["same", "low", "base"])
    p = 2 / 2**10
    found = {(v.comparison.method, v.comparison.baseline): v for v in reading.verdicts["hd95_mm"]}
    assert {key: v.comparison.p_wilcoxon for key, v in found.items()} == {
        ("base", "same"): 1.0, ("base", "low"): p, ("low", "same"): p, ("low", "base"): p,
    }  # fmt: skip
    assert {key: v.comparison.p_holm for key, v in found.items()} == {
        ("base", "same"): 1.0, ("base", "low"): 4 * p, ("low", "same"): 4 * p, ("low", "base"): 4 * p,
    }  # fmt: skip
    assert {key: v.reads for key, v in found.items()} == {
        ("base", "same"): "not shown", ("base", "low"): "better", ("low", "same"): "worse", ("low", "base"): "worse",
    }  # fmt: skip


def test_misses_cost_and_are_counted_and_structures_are_averaged_by_scan() -> None:
    lines = per_scan({"a": 0.8, "b": None}) + [{**line, "class": "femur"} for line in per_scan({"a": 0.4, "b": 0.6})]
    (mean, hip, femur, *_) = make_readings([RunScores("x", 4, 0, lines)], seeds=[0], compared=[], against=[])
    assert [r.class_name for r in (mean, hip, femur)] == ["mean", "hip", "femur"]
    assert mean.summaries["dice"][0].mean == pytest.approx((0.6 + 0.3) / 2)
    assert hip.summaries["dice"][0].mean == pytest.approx(0.4)
    assert [r.missed["x"] for r in (mean, hip, femur)] == [1, 1, 0]
    assert summary_grid(hip).lines[0][-2] == "1 of 2"


def test_a_structure_that_a_scan_lacks_is_left_out_and_one_that_all_lack_has_no_table() -> None:
    gone = [{**line, "dice": "", "iou": "", "hd95_mm": "", "status": "absent"} for line in per_scan({"a": 0.0})]
    lines = gone + per_scan({"b": 0.5}) + [{**line, "class": "rib"} for line in gone]
    readings = make_readings([RunScores("x", 4, 0, lines)], seeds=[0], compared=[], against=[])
    assert {r.class_name for r in readings} == {"mean", "hip"}
    assert {r.left_out for r in readings} == {("a",)}
    assert "left out: a" in summary_grid(readings[0]).note


def test_text_forms_agree_with_the_readings() -> None:
    runs = [scores("old", 0, {"a": 0.5, "b": 0.6, "c": 0.7}), scores("new", 0, {"a": 0.6, "b": 0.7, "c": 0.9})]
    readings = make_readings(runs, seeds=[0], compared=["new"], against=["old"])
    lines = list(csv.DictReader(io.StringIO(summary_csv(readings))))
    assert len(lines) == 4 * 3 * 2
    assert lines[2] == {
        "labelled": "4", "network": "student", "component": "all", "class": "hip", "metric": "dice", "seeds": "1",
        "row": "old", "scans": "3", "mean": "0.6", "median": "0.6", "sd": "0.1", "seed_means": "0.6", "seed_sd": "",
        "missed": "0",
    }  # fmt: skip
    compared = list(csv.DictReader(io.StringIO(comparisons_csv(readings))))
    assert len(compared) == 4 * 3
    assert (compared[1]["row"], compared[1]["baseline"], compared[1]["metric"]) == ("new", "old", "dice")
    assert float(compared[1]["mean_difference"]) == pytest.approx(0.4 / 3, rel=1e-5)
    grid = comparison_grid(readings[0])
    assert grid is not None
    assert grid.lines[1][:3] == ("new against old", "Dice", "+0.133")
    assert all(len(line) == len(grid.head) for line in grid.lines)
    first, rule, *rest = markdown(grid).split("\n\n")[1].splitlines()
    assert first.count("|") == rule.count("|") == rest[0].count("|") == len(grid.head) + 1


def test_scans_to_show() -> None:
    assert pick_scans({"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.4}) == {"best": "a", "median": "d", "worst": "b"}
    assert pick_scans({"a": 0.5}) == {"worst": "a"}
    assert pick_scans({}) == {}


def test_curves_have_a_column_a_row_and_figures_of_four() -> None:
    before = [{"step": s, "loss_supervised": 1.0, "val_dice": 0.1} for s in (1, 2)]
    after = [{"step": s, "loss_supervised": 0.5, "coverage_reliable": None if s == 1 else 0.4} for s in (1, 2)]
    runs = [RunCurves(f"row{i}", seed, before, after) for i in range(5) for seed in (0, 1)]
    first, second = benchmark_curves(runs)
    assert [axes.get_title() for axes in first.axes[:4]] == ["row0", "row1", "row2", "row3"]
    assert len(first.axes) == 3 * (4 + 1)  # loss, coverage, val Dice; the last column holds the legends
    assert len(second.axes) == 3 * (1 + 1)
    steps, values = first.axes[0].lines[-2].get_data()  # before the dotted line: the mean over seeds
    assert list(np.asarray(steps)) == [1, 2, 3, 4]
    assert list(np.asarray(values)) == [1.0, 1.0, 0.5, 0.5]
    assert benchmark_curves([RunCurves("a", 0, [], [])]) == []


def test_curves_of_matching() -> None:
    """What is reliable, what matching looks at, and who is right there, each with its legend."""
    keys = ("coverage_reliable", "coverage_matched", "coverage_rejected", "matched_accuracy", "teacher_accuracy")
    row = {"step": 1, **{key: 0.01 * (number + 1) for number, key in enumerate(keys)}}
    (figure,) = benchmark_curves([RunCurves("a", 0, [], [row])])
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes if axes.get_legend()]
    assert legends == [["reliable"], ["matched", "rejected"], ["matched", "teacher"]]
    reliable, matched = figure.axes[0], figure.axes[2]
    assert reliable.get_ylim() == (0, 1.05)
    assert matched.get_ylim()[1] == pytest.approx(0.03 * 1.1)  # a few hundredths fill their panel


# --- the real thing ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_cells_side_by_side_train_and_are_measured(tmp_path: Path, cohort_path: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content(seeds=[0]), sort_keys=False))
    threads = torch.get_num_threads()
    result = api.benchmark(cohort=cohort_path, run=tmp_path / "run", suite=file, side_by_side=2, progress=False)
    assert torch.get_num_threads() == threads
    assert len(result.finished) == 1 + len(ROWS)
    parent = RunDirectory(tmp_path / "run/cells/phase_a__2__seed0")
    assert len(parent.metrics()) == 3
    lines = read_csv(tmp_path / "run/tables/summary.csv")
    assert {line["row"] for line in lines} == set(ROWS)
    assert {line["network"] for line in lines} == {"student", "teacher"}
    cells = cells_csv(tmp_path / "run")
    assert all(line["state"] == "finished" and float(line["train_s"]) > 0 for line in cells.values())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/cells").rglob("*") if path.is_file()}
    api.benchmark(cohort=cohort_path, run=tmp_path / "run", suite=file, side_by_side=2, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in before}
