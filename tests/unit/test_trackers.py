"""MLflow and Weights & Biases, with fakes that write down what they are told; MLflow itself where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distseg import api
from distseg.config.compose import train_config
from distseg.config.schema import TrainRunConfig
from distseg.errors import ConfigError
from distseg.training.run import RunDirectory

TINY: dict[str, Any] = {
    "launcher": "local",
    "network.base_filters": 2,
    "network.levels": 2,
    "sampling.patch_zyx": [8, 8, 8],
    "train.steps": 4,
    "train.threads": 1,
    "train.validation_patches": 4,
    "logging.progress": False,
    "logging.tensorboard": False,
    "logging.tensorboard_every_steps": 2,
}


def config(cohort: str, run: Path, **more: Any) -> TrainRunConfig:
    return train_config(cohort=cohort, run=str(run), method="supervised", overrides={**TINY, **more})


class FakeClient:
    """MlflowClient as far as it is used; `told` is shared by all clients of one URI."""

    servers: dict[str, dict[str, Any]] = {}  # noqa: RUF012  # the server, which outlives a client

    def __init__(self, tracking_uri: str) -> None:
        self.told = self.servers.setdefault(tracking_uri, {"runs": [], "params": {}, "metrics": [], "ended": 0})

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="7") if self.told["runs"] else None

    def create_experiment(self, name: str) -> str:
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.told["runs"].append((experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"id{len(self.told['runs'])}"))

    def log_param(self, run_id: str, key: str, value: str) -> None:
        self.told["params"][key] = value

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.told["metrics"] += [(run_id, m.step, m.key, m.value) for m in metrics]

    def set_terminated(self, run_id: str) -> None:
        self.told["ended"] += 1


def metric(key: str, value: float, timestamp: int, step: int) -> Any:
    return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient, entities.Metric = FakeClient, metric  # type: ignore[attr-defined]  # a fake
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(FakeClient, "servers", {})
    return FakeClient.servers


def test_mlflow_gets_the_runs_curves_and_a_resumed_run_is_one_run(
    cohort_path: str, tmp_path: Path, mlflow: dict[str, dict[str, Any]]
) -> None:
    wanted = config(cohort_path, tmp_path / "em", **{"logging.mlflow": "http://server", "checkpoint.every_steps": 2})
    api.train_from_config(wanted)
    told = mlflow["http://server"]
    rows = {row["step"]: row for row in RunDirectory(wanted.run).metrics()}
    losses = {step: value for _, step, key, value in told["metrics"] if key == "loss"}
    assert losses.keys() >= {2, 4}
    assert losses == {step: rows[step]["loss"] for step in losses}
    assert told["runs"] == [("7", "em")]
    assert told["params"]["train.steps"] == "4"
    assert json.loads((tmp_path / "em" / "trackers.json").read_text()) == {"mlflow": "id1"}
    last = tmp_path / "em" / "checkpoints" / "step_0000004"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    api.train_from_config(wanted)
    assert told["runs"] == [("7", "em")]
    assert {run_id for run_id, *_ in told["metrics"]} == {"id1"}
    assert told["ended"] == 2


def test_weights_and_biases_get_the_same(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    logged: list[tuple[int, float]] = []

    def init(**options: Any) -> Any:
        asked.append(options)
        log = lambda values, step: logged.append((step, values["loss"]))  # noqa: E731  # a fake's method
        return SimpleNamespace(id="w1", log=log, finish=lambda: logged.append((-1, 0.0)))

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]  # a fake
    monkeypatch.setitem(sys.modules, "wandb", module)
    api.train_from_config(config(cohort_path, tmp_path / "em", **{"logging.wandb": "hips"}))
    rows = {row["step"]: row["loss"] for row in RunDirectory(tmp_path / "em").metrics()}
    assert {(step, rows[step]) for step in (2, 4)} <= set(logged)
    assert logged[-1][0] == -1
    assert (asked[0]["project"], asked[0]["id"], asked[0]["name"], asked[0]["resume"]) == ("hips", None, "em", "allow")
    assert json.loads((tmp_path / "em" / "trackers.json").read_text()) == {"wandb": "w1"}


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_one_that_is_not_installed_is_one_line_before_a_run_is_made(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"logging.{name}: {name} is not installed \(got x\); pip install .*{name}"):
        api.train_from_config(config(cohort_path, tmp_path / "r", **{f"logging.{name}": "x"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_mlflow_itself(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pytest.importorskip("mlflow", reason="distseg[mlflow] is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    api.train_from_config(config(cohort_path, tmp_path / "em", **{"logging.mlflow": uri}))
    client = real.MlflowClient(tracking_uri=uri)
    run_id = json.loads((tmp_path / "em" / "trackers.json").read_text())["mlflow"]
    history = {metric.step: metric.value for metric in client.get_metric_history(run_id, "loss")}
    assert history[4] == pytest.approx(RunDirectory(tmp_path / "em").metrics()[-1]["loss"])
    assert client.get_run(run_id).info.status == "FINISHED"
