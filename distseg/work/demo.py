"""The main job end to end on synthetic hips, small enough for two CPU cores: what a newcomer runs first.

    RUN/source/              nnU-Net raw: `scans` training scans, `labelled` of them with labels, `validation` held out
    RUN/cohort.zarr          the cohort store
    RUN/warmup/              `supervised`, the start that both methods share
    RUN/supervised/  RUN/embedding_matching/     a branch each, with evaluation/val/report.html
    RUN/demo.json            what the folder was made with; another choice in the same folder is refused

Prints what it measures and claims nothing: a few scans and minutes do not rank methods. Called again it resumes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distseg.config.compose import train_config
from distseg.config.schema import TrainRunConfig
from distseg.config.verbs import DemoConfig, EvaluateConfig, IngestConfig
from distseg.data.phantom import write_phantoms
from distseg.errors import RunMismatchError
from distseg.evaluation.report import number

METHODS = ("supervised", "embedding_matching")
SPLIT = "val"
_DATA_KEYS = ("scans", "labelled", "validation", "seed")


def run_demo(
    config: DemoConfig,
    *,
    ingest: Callable[[IngestConfig], Any],
    train: Callable[[TrainRunConfig], Any],
    evaluate: Callable[[EvaluateConfig], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Run or resume the demo in `config.run` (absolute) through the verbs given; returns each method's metrics.

    Raises RunMismatchError where the folder holds a demo of other scans.
    """
    started = time.monotonic()
    run = Path(config.run)
    _claim(run, config)
    _say(f"1/4 {config.scans} synthetic scans, {config.labelled} labelled, and {config.validation} for validation")
    source = run / "source"
    if not (source / "splits.json").is_file():  # written last
        write_phantoms(source, scans=config.scans, labelled=config.labelled, seed=config.seed, val=config.validation)
    _say("2/4 ingest")
    cohort = str(run / "cohort.zarr")
    ingest(
        IngestConfig(
            source=str(source),
            cohort=cohort,
            launcher=config.launcher,
            resources=config.resources,
            logging=config.logging,
        )
    )
    _say(f"3/4 train: {config.warmup_steps} shared steps, then {config.steps} for each of {', '.join(METHODS)}")
    warmup = run / "warmup"
    train(_training(config, cohort=cohort, run=warmup, method="supervised", steps=config.warmup_steps))
    for method in METHODS:
        train(_training(config, cohort=cohort, run=run / method, method=method, steps=config.steps, parent=warmup))
    _say(f"4/4 evaluate on the {config.validation} validation scans")
    metrics = {method: evaluate(_evaluation(config, cohort=cohort, run=run / method)) for method in METHODS}
    _print_table(metrics)
    for method in METHODS:
        print(f"report: {run / method / 'evaluation' / SPLIT / 'report.html'}")
    print(
        f"{time.monotonic() - started:.0f} s. Synthetic data, few scans: a check that everything runs, no comparison."
    )
    return metrics


def _claim(run: Path, config: DemoConfig) -> None:
    """Record what this folder is made with, or check that it is the same."""
    made_with = {key: getattr(config, key) for key in _DATA_KEYS}
    record = run / "demo.json"
    if record.is_file():
        before = json.loads(record.read_text())
        if before != made_with:
            different = ", ".join(f"{key}={before.get(key)}" for key in _DATA_KEYS if before.get(key) != made_with[key])
            raise RunMismatchError("holds a demo of other scans", where=run, value=different, fix="choose another run=")
        return
    run.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(made_with) + "\n")


def _training(
    config: DemoConfig, *, cohort: str, run: Path, method: str, steps: int, parent: Path | None = None
) -> TrainRunConfig:
    composed = train_config(
        cohort=cohort,
        run=str(run),
        method=method,
        preset="small",
        overrides={
            "launcher": config.launcher,
            "seed": config.seed,
            "train.steps": steps,
            "train.validation_patches": 16,
            "train.init_from": None if parent is None else str(parent),
            "optimizer.schedule_steps": config.warmup_steps + config.steps,
        },
    )
    return dataclasses.replace(composed, resources=config.resources, logging=config.logging)


def _evaluation(config: DemoConfig, *, cohort: str, run: Path) -> EvaluateConfig:
    return EvaluateConfig(
        run=str(run),
        cohort=cohort,
        split=SPLIT,
        overlap=0.25,
        launcher=config.launcher,
        resources=config.resources,
        logging=config.logging,
    )


def _print_table(metrics: dict[str, dict[str, Any]]) -> None:
    table = Table(title="validation scans, native grid")
    table.add_column("method")
    for column in ("Dice", "IoU", "HD95 mm", "missed"):
        table.add_column(column, justify="right")
    for method, measured in metrics.items():
        for values in measured["classes"].values():
            table.add_row(
                method,
                *(number(values[key]["mean"], digits) for key, digits in (("dice", 3), ("iou", 3), ("hd95_mm", 1))),
                str(values["missed"]),
            )
    Console().print(table)


def _say(line: str) -> None:
    print(line, flush=True)
