"""The demo: its order and resuming with fakes for the verbs, and the real thing on Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distseg import api
from distseg.config.schema import ResourcesConfig, TrainRunConfig
from distseg.config.verbs import DemoConfig
from distseg.errors import RunMismatchError
from distseg.work import demo

VALUES = {"dice": {"mean": 0.5}, "iou": {"mean": 0.4}, "hd95_mm": {"mean": 9.0}, "missed": 1}


class Verbs:
    """Fakes that write down what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def ingest(self, config: Any) -> None:
        self.asked.append(("ingest", config))

    def train(self, config: Any) -> None:
        self.asked.append(("train", config))

    def evaluate(self, config: Any) -> dict[str, Any]:
        self.asked.append(("evaluate", config))
        return {"classes": {"hip_bone": VALUES}}


@pytest.fixture
def phantoms_made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders for which phantoms were asked, without the seconds that drawing them takes."""
    folders: list[Path] = []

    def write(folder: Path, **counts: int) -> None:
        folders.append(folder)
        folder.mkdir()
        (folder / "splits.json").write_text("{}")

    monkeypatch.setattr(demo, "write_phantoms", write)
    return folders


def tiny(run: Path, **values: Any) -> DemoConfig:
    return DemoConfig(**{"run": str(run), "scans": 2, "labelled": 1, "validation": 1, **values})


def call(config: DemoConfig) -> tuple[Verbs, dict[str, Any]]:
    verbs = Verbs()
    return verbs, demo.run_demo(config, ingest=verbs.ingest, train=verbs.train, evaluate=verbs.evaluate)


def test_both_methods_branch_from_one_warmup(
    phantoms_made: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "${odd} run"
    verbs, metrics = call(tiny(run, warmup_steps=30, steps=20, seed=3))
    assert [verb for verb, _ in verbs.asked] == ["ingest", "train", "train", "train", "evaluate", "evaluate"]
    trained: list[TrainRunConfig] = [config for verb, config in verbs.asked if verb == "train"]
    told = [(config.method.name, config.run, config.train.steps, config.train.init_from) for config in trained]
    assert told == [
        ("supervised", str(run / "warmup"), 30, None),
        ("supervised", str(run / "supervised"), 20, str(run / "warmup")),
        ("embedding_matching", str(run / "embedding_matching"), 20, str(run / "warmup")),
    ]
    assert {(config.seed, config.resources.workers, config.launcher) for config in trained} == {(3, 2, "ray")}
    assert set(metrics) == {"supervised", "embedding_matching"}
    said = capsys.readouterr().out
    assert all(f"report: {run / method / 'evaluation' / 'val' / 'report.html'}" in said for method in metrics)
    assert "0.500" in said
    assert "no comparison" in said


def test_again_it_keeps_its_scans(phantoms_made: list[Path], tmp_path: Path) -> None:
    call(tiny(tmp_path))
    call(tiny(tmp_path, steps=5))
    assert phantoms_made == [tmp_path / "source"]


def test_other_scans_in_the_same_folder_are_refused(phantoms_made: list[Path], tmp_path: Path) -> None:
    call(tiny(tmp_path))
    with pytest.raises(RunMismatchError, match=r"holds a demo of other scans \(got seed=0\); choose another run="):
        call(tiny(tmp_path, seed=1))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_real_thing_on_two_workers(tmp_path: Path) -> None:
    config = DemoConfig(
        run=str(tmp_path / "demo"), scans=4, labelled=2, validation=1, warmup_steps=8, steps=4,
        resources=ResourcesConfig(workers=2),
    )  # fmt: skip
    metrics = api.demo_from_config(config)
    for method in demo.METHODS:
        folder = tmp_path / "demo" / method
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        report = folder / "evaluation" / "val" / "report.html"
        assert "<html" in report.read_text()
        assert json.loads((folder / "evaluation" / "val" / "metrics.json").read_text()) == metrics[method]
        assert 0 <= metrics[method]["classes"]["hip_bone"]["dice"]["mean"] <= 1
    again = api.demo_from_config(config)
    assert {method: values["classes"] for method, values in again.items()} == {
        method: values["classes"] for method, values in metrics.items()
    }
