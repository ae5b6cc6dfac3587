"""Where curves go beside metrics.jsonl: TensorBoard by default, MLflow and Weights & Biases by config.

RUN/trackers.json keeps the ids that MLflow and Weights & Biases gave the run, so that a resumed run is one run there
too. Both are optional packages, looked for before a run is made.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from distseg.config.compose import flatten, to_plain
from distseg.config.schema import LoggingConfig, TrainRunConfig
from distseg.errors import ConfigError
from distseg.training.run import RunDirectory, write_atomic

_EXTRAS = {"mlflow": "pip install 'distseg[mlflow]'", "wandb": "pip install wandb"}
_MLFLOW_TEXT = 500  # characters of a parameter's value that every MLflow server takes


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def require_trackers(config: LoggingConfig) -> None:
    """Raises ConfigError for a tracker that is asked for and not installed."""
    for name, extra in _EXTRAS.items():
        if getattr(config, name) is not None:
            try:
                importlib.import_module(name)
            except ImportError:
                value = getattr(config, name)
                fix = f"{extra}, or leave logging.{name} out"
                raise ConfigError(f"{name} is not installed", where=f"logging.{name}", value=value, fix=fix) from None


def open_trackers(run: RunDirectory, config: LoggingConfig, first_step: int) -> list[Tracker]:
    """Those that `config` names. Rank 0 only."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(_TensorBoard(run.path / "tensorboard", first_step))
    stored = run.stored()
    if config.mlflow is not None and stored is not None:
        trackers.append(_MLflow(run, stored.config, config.mlflow))
    if config.wandb is not None and stored is not None:
        trackers.append(_WandB(run, stored.config, config.wandb))
    return trackers


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        # What a run that was cut back had written after its checkpoint is purged.
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """One MLflow run, named after the run's folder, in the experiment `distseg` of the server at `uri`."""

    def __init__(self, run: RunDirectory, config: TrainRunConfig, uri: str) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        self._run_id = _ids(run).get("mlflow")
        if self._run_id is None:
            found = self._client.get_experiment_by_name("distseg")
            experiment = self._client.create_experiment("distseg") if found is None else found.experiment_id
            self._run_id = str(self._client.create_run(experiment, run_name=run.path.name).info.run_id)
            for key, value in flatten(to_plain(config)):
                self._client.log_param(self._run_id, key, str(value)[:_MLFLOW_TEXT])
            _remember(run, mlflow=self._run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _WandB:
    def __init__(self, run: RunDirectory, config: TrainRunConfig, project: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project=project,
            id=_ids(run).get("wandb"),
            name=run.path.name,
            dir=str(run.path),
            config=to_plain(config),
            resume="allow",
        )
        _remember(run, wandb=str(self._run.id))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _file(run: RunDirectory) -> Path:
    return run.path / "trackers.json"


def _ids(run: RunDirectory) -> dict[str, str]:
    file = _file(run)
    found: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _remember(run: RunDirectory, **ids: str) -> None:
    write_atomic(_file(run), json.dumps({**_ids(run), **ids}) + "\n")
