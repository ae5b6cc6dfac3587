"""The verbs as typed functions, one for each verb of the command line: `distseg.train(cohort=..., run=...)`.

Each builds its verb's config (whose dataclass owns defaults and rules) and hands it to `VERB_from_config`, which is
what the command line calls too. None of an optional argument means the schema's default. Imports are lazy: with
`launcher="local"` no Ray is imported. Relative paths are made absolute here, as Ray's workers live elsewhere; a URL
(`scheme://...`) is left alone where a cohort or a run may lie behind one. All raise InputError (bad input or config)
and FinishedWithFailures.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from distseg.config.schema import ResourcesConfig, TrainRunConfig
from distseg.config.verbs import (
    BenchmarkConfig,
    CohortConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    IngestConfig,
    IngestDataConfig,
    LabelConfig,
    LabelRuleConfig,
    LabelSectionConfig,
    PredictConfig,
    TuneRunConfig,
)
from distseg.data.place import absolute, as_place, is_url, look_at, not_in_store
from distseg.errors import ConfigError, FinishedWithFailures

if TYPE_CHECKING:
    from distseg.data.cohort import ScanRecord
    from distseg.inference.export_graph import ExportReport
    from distseg.training.dry_run import DryRun
    from distseg.training.loop import TrainResult
    from distseg.work.benchmark import BenchmarkResult
    from distseg.work.cohort_actions import CohortReport
    from distseg.work.doctor_checks import Finding
    from distseg.work.executor import Executor
    from distseg.work.ingest import IngestReport
    from distseg.work.label_cohort import LabelReport
    from distseg.work.label_estimate import LabelEstimate
    from distseg.work.predict import PredictReport
    from distseg.work.tune import TuneResult

Launcher = Literal["ray", "local"]
Config = TypeVar("Config")


def ingest(
    *,
    source: str | os.PathLike[str],
    cohort: str | os.PathLike[str],
    spacing_mm: Sequence[float] | None = None,
    split: Sequence[float] | None = None,
    structures: Sequence[str] | None = None,
    launcher: Launcher | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> IngestReport:
    """Read `source` (a folder of NIfTI or of DICOM series, nnU-Net raw, Medical Segmentation Decathlon,
    TotalSegmentator) into the cohort store `cohort`; scans already there stay.

    `spacing_mm` in Z, Y, X resamples; None keeps native spacing. `split` are the shares of train, val and test where
    the source names none. `structures` are the masks, segments or ROIs that become the classes 1, 2, ... Raises
    FinishedWithFailures with the scans that could not be read; the rest is in.
    """
    data = IngestDataConfig(
        spacing_mm=_list(spacing_mm), split=_list(split), structures=None if structures is None else list(structures)
    )
    return ingest_from_config(_config(IngestConfig, locals(), data=data))


def ingest_from_config(config: IngestConfig) -> IngestReport:
    from distseg.work.ingest import ingest_cohort

    config = absolute(config, "source", "cohort")
    not_in_store(as_place(config.cohort).parent, key="cohort")
    with _executor(config.launcher, config.resources) as executor:
        report = ingest_cohort(
            source=config.source,
            cohort=config.cohort,
            spacing_mm=config.data.spacing_mm,
            split=config.data.split,
            structures=config.data.structures,
            executor=executor,
            progress=config.logging.progress,
        )
    if report.failed:
        done = f"{report.cohort}: {len(report.added)} scans added, {len(report.skipped)} already there"
        raise FinishedWithFailures(done, report.failed)
    return report


def cohort(
    *,
    cohort: str | os.PathLike[str],
    action: Literal["list", "remove", "repair"] | None = None,
    scan: str | None = None,
) -> list[ScanRecord]:
    """List the scans of a cohort; "remove" takes `scan` out first, "repair" rebuilds the index from the store first.

    "repair" raises FinishedWithFailures, once done, with what in the store it could not read and left alone.
    """
    return cohort_from_config(_config(CohortConfig, locals())).records


def cohort_from_config(config: CohortConfig) -> CohortReport:
    from distseg.data.cohort import Cohort
    from distseg.work.cohort_actions import CohortReport, holds, remove_scan, repair_cohort

    config = absolute(config, "cohort")
    dropped: list[str] = []
    if config.action == "remove":
        if config.scan is None:
            raise ConfigError("key not given", where="scan", fix="name the scan to remove: scan=ID")
        remove_scan(config.cohort, scan=config.scan)
    elif config.action == "repair":
        report = repair_cohort(config.cohort)
        if report.left:
            raise FinishedWithFailures(holds(config.cohort, report.scans, report.dropped), report.left)
        dropped = report.dropped
    return CohortReport(list(Cohort.open(config.cohort).records), dropped)


def train(
    *,
    cohort: str | os.PathLike[str],
    run: str | os.PathLike[str],
    method: str | None = None,
    preset: str | None = None,
    matching: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TrainResult | DryRun:
    """Train one run, or resume it where it stands.

    `overrides` are dotted keys of TrainRunConfig: {"train.steps": 600, "launcher": "local", "data.labeled_scans": 4}.
    Without `preset` it is `full` if resources.gpus_per_worker > 0, else `small`. With {"dry_run": True} nothing is
    written to `run`, and what it would take comes back.
    """
    from distseg.config.compose import train_config

    choice = {"method": method} if method is not None else {}
    config = train_config(
        cohort=os.fspath(cohort), run=os.fspath(run), preset=preset, matching=matching, overrides=overrides, **choice
    )
    return train_from_config(config)


def train_from_config(config: TrainRunConfig) -> TrainResult | DryRun:
    config = absolute(config, "cohort", "run", urls=("cohort", "run"))
    config.train = absolute(config.train, "init_from", urls=("init_from",))
    config.data = absolute(config.data, "pseudo_labels", urls=("pseudo_labels",))
    if not is_url(config.run):
        not_in_store(config.run, key="run")
    if config.dry_run:
        look_at(config.run, key="run")
        return _dry_run(config)
    from distseg.work.url_owner import owning_run

    if config.launcher == "local":
        from distseg.training.local import train_local

        return train_local(config, claim=owning_run)
    from distseg.distributed.train import train_on_ray

    with owning_run(config.run) as claim:
        return train_on_ray(config, claim=claim)


def _dry_run(config: TrainRunConfig) -> DryRun:
    if config.launcher == "local":
        from distseg.training.dry_run import dry_run_local

        return dry_run_local(config)
    from distseg.distributed.train import dry_run_on_ray

    return dry_run_on_ray(config)


def evaluate(
    *,
    run: str | os.PathLike[str],
    cohort: str | os.PathLike[str],
    split: str | None = None,
    name: str | None = None,
    network: Literal["student", "teacher"] | None = None,
    overlap: float | None = None,
    components: Literal["model", "all"] | None = None,
    launcher: Launcher | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure a run on a split, in each scan's native grid; returns what RUN/evaluation/NAME/metrics.json holds."""
    return evaluate_from_config(_config(EvaluateConfig, locals()))


def evaluate_from_config(config: EvaluateConfig) -> dict[str, Any]:
    from distseg.work.evaluate import evaluate_run

    config = absolute(config, "run", "cohort", urls=("run", "cohort"))
    look_at(config.run, key="run")
    with _executor(config.launcher, config.resources) as executor:
        return evaluate_run(
            run=config.run,
            cohort=config.cohort,
            split=config.split,
            name=config.name or config.split,
            network=config.network,
            overlap=config.overlap,
            components=config.components,
            executor=executor,
            progress=config.logging.progress,
        )


def predict(
    *,
    run: str | os.PathLike[str],
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    by: Literal["network", "label"] | None = None,
    network: Literal["student", "teacher"] | None = None,
    overlap: float | None = None,
    components: Literal["model", "all"] | None = None,
    label: LabelRuleConfig | None = None,
    format: Literal["nifti", "dicom_seg"] | None = None,
    launcher: Launcher | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> PredictReport:
    """Segment one file, a folder of NIfTI or the DICOM series below a folder; each mask lies in its input's own grid.

    `by="label"` gives what `distseg label` would, by the rule `label`, in place of the network's argmax;
    `format="dicom_seg"` a DICOM-SEG that refers to its series (distseg[io]). Raises FinishedWithFailures with the files
    that could not be segmented; the other masks are written.
    """
    return predict_from_config(_config(PredictConfig, locals()))


def predict_from_config(config: PredictConfig) -> PredictReport:
    from distseg.work.predict import predict_files

    config = absolute(config, "run", "input", "output", urls=("run",))
    look_at(config.run, key="run")
    not_in_store(config.output, key="output")
    with _executor(config.launcher, config.resources) as executor:
        report = predict_files(
            run=config.run,
            input=config.input,
            output=config.output,
            network=config.network,
            overlap=config.overlap,
            components=config.components,
            label=config.label if config.by == "label" else None,
            format=config.format,
            executor=executor,
            progress=config.logging.progress,
        )
    if report.failed:
        raise FinishedWithFailures(f"{config.output}: {len(report.written)} masks written", report.failed)
    return report


def label(
    *,
    run: str | os.PathLike[str],
    cohort: str | os.PathLike[str],
    output: str | os.PathLike[str],
    only: Literal["all", "unlabelled"] | None = None,
    threshold: float | None = None,
    quantile: float | None = None,
    min_similarity: float | None = None,
    passes: int | None = None,
    overlap: float | None = None,
    seed: int | None = None,
    attempts: int | None = None,
    review_scans: int | None = None,
    next_scans: int | None = None,
    dry_run: bool | None = None,
    launcher: Launcher | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> LabelReport | LabelEstimate:
    """Pseudo-label every scan of a cohort, or of a folder of images, once: masks, trust maps, and which to distrust.

    The same call again goes on where it stands. `threshold` is in nats of entropy; None is the run's. `dry_run` writes
    nothing and returns what it would take. Raises FinishedWithFailures with the scans that were set aside.
    """
    arguments = locals()
    section = _config(LabelSectionConfig, {k: v for k, v in arguments.items() if k not in ("workers", "progress")})
    return label_from_config(_config(LabelConfig, arguments, label=section))


def label_from_config(config: LabelConfig) -> LabelReport | LabelEstimate:
    config = absolute(config, "run", "cohort", "output", urls=("run", "cohort", "output"))
    look_at(config.run, key="run")
    look_at(config.output, key="output")
    not_in_store(config.output, key="output")
    if config.dry_run:
        from distseg.work.label_estimate import estimate_label

        return estimate_label(config)
    from distseg.work.label_cohort import label_cohort

    with _pool(config.launcher, config.resources) as executor:
        report = label_cohort(
            run=config.run,
            cohort=config.cohort,
            output=config.output,
            settings=config.label,
            executor=executor,
            progress=config.logging.progress,
        )
    if report.set_aside:
        done = f"{report.output}: {report.labelled} scans labelled, {report.done_before} done before"
        raise FinishedWithFailures(done, report.set_aside)
    return report


def demo(
    *,
    run: str | os.PathLike[str] | None = None,
    scans: int | None = None,
    labelled: int | None = None,
    validation: int | None = None,
    warmup_steps: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    launcher: Launcher | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """The main job on synthetic hips, end to end; returns each method's metrics. Resumes when called again."""
    return demo_from_config(_config(DemoConfig, locals()))


def demo_from_config(config: DemoConfig) -> dict[str, dict[str, Any]]:
    from distseg.work.demo import run_demo

    config = absolute(config, "run")
    with _one_ray(config.launcher, config.resources):
        return run_demo(config, ingest=ingest_from_config, train=train_from_config, evaluate=evaluate_from_config)


def benchmark(
    *,
    cohort: str | os.PathLike[str],
    run: str | os.PathLike[str],
    suite: str | os.PathLike[str] | None = None,
    rows: Sequence[str] | None = None,
    labelled: Sequence[int | str] | None = None,
    seeds: Sequence[int] | None = None,
    cells_from: str | os.PathLike[str] | None = None,
    side_by_side: int | None = None,
    gpus_per_cell: float | None = None,
    launcher: Launcher | None = None,
    progress: bool | None = None,
) -> BenchmarkResult:
    """Run a suite of methods x label counts x seeds on a cohort; tables, curves and figures in `run`. Resumes.

    `suite` is a name of conf/suites or a YAML file; `rows`, `labelled` and `seeds` run a part of it. `cells_from` is
    another benchmark's directory: what it finished with the same configuration is read there, not trained again.
    Raises ConfigError before anything runs, and FinishedWithFailures with the cells that failed, when the others are in
    the tables.
    """
    config = _config(BenchmarkConfig, locals())
    if gpus_per_cell is not None:
        config.resources = ResourcesConfig(gpus_per_worker=gpus_per_cell)
    return benchmark_from_config(config)


def benchmark_from_config(config: BenchmarkConfig) -> BenchmarkResult:
    from distseg.work.benchmark import run_benchmark

    config = absolute(config, "cohort", "run", "cells_from")
    not_in_store(config.run, key="run")
    cells = ResourcesConfig(workers=config.side_by_side, gpus_per_worker=config.resources.gpus_per_worker)
    with _executor(config.launcher, cells) as executor:
        return run_benchmark(config, executor=executor)


def tune(
    *,
    cohort: str | os.PathLike[str],
    run: str | os.PathLike[str],
    space: str | os.PathLike[str],
    trials: int | None = None,
    runner: Literal["inline", "train"] | None = None,
    method: str | None = None,
    preset: str | None = None,
    matching: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> TuneResult:
    """Sweep a search space; the best model in RUN/best, trials.csv and report.html beside it. Resumes.

    `space` is a name of conf/space or a YAML file; `overrides` are dotted keys of TuneRunConfig: those of `train` that
    every trial shares, and {"tune.search": "optuna", "tune.scheduler": "none"}. Raises ConfigError before anything
    runs, and FinishedWithFailures with the trials that failed, when the others are in the table.
    """
    from distseg.config.compose import tune_config

    keys = {"tune.trials": trials, "tune.runner": runner}
    given = {**(overrides or {}), **{key: value for key, value in keys.items() if value is not None}}
    choice = {"method": method} if method is not None else {}
    config = tune_config(
        cohort=os.fspath(cohort), run=os.fspath(run), space=os.fspath(space), preset=preset, matching=matching,
        overrides={**given, "dry_run": dry_run}, **choice,
    )  # fmt: skip
    return tune_from_config(config)


def tune_from_config(config: TuneRunConfig) -> TuneResult:
    from distseg.work.tune import LocalTrials, run_tune

    config = absolute(config, "cohort", "run")
    not_in_store(config.run, key="run")
    config.train = absolute(config.train, "init_from", urls=("init_from",))
    if config.launcher == "local":
        with _executor("local", ResourcesConfig(workers=config.tune.concurrent or 1)) as executor:
            return run_tune(config, runner=LocalTrials(executor), train=train_from_config)
    from distseg.distributed.tune import RayTrials

    return run_tune(config, runner=RayTrials(config.resources), train=train_from_config)


def export(
    *,
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: Literal["monai_bundle", "onnx", "torchscript"] | None = None,
    network: Literal["student", "teacher"] | None = None,
    overlap: float | None = None,
) -> ExportReport:
    """Write a run's network for use without distseg; what is written is read back and compared.

    Raises InputError where `output` exists, is a run or cannot be written, ConfigError where format="onnx" lacks its
    packages (distseg[onnx]).
    """
    return export_from_config(_config(ExportConfig, locals()))


def export_from_config(config: ExportConfig) -> ExportReport:
    from distseg.inference.model import load_model

    config = absolute(config, "run", "output", urls=("run",))
    look_at(config.run, key="run")
    not_in_store(config.output, key="output")
    model = load_model(config.run)
    if config.format == "monai_bundle":
        from distseg.inference.export_bundle import export_bundle

        return export_bundle(model, network=config.network, overlap=config.overlap, output=config.output)
    from distseg.inference.export_graph import export_graph

    return export_graph(model, format=config.format, network=config.network, output=config.output)


def doctor(
    *,
    storage: str | os.PathLike[str] | None = None,
    storage_mib: int | None = None,
    launcher: Launcher | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
) -> list[Finding]:
    """Check this machine, or every node of the cluster that RAY_ADDRESS names; one finding a check.

    `storage` is a folder or a URL that every node should reach; `workers` and `gpus_per_worker` are those of the job to
    come.
    """
    resources = ResourcesConfig(workers=workers or 1, gpus_per_worker=gpus_per_worker or 0.0)
    return list(doctor_from_config(_config(DoctorConfig, locals(), resources=resources)))


def doctor_from_config(config: DoctorConfig) -> Iterator[Finding]:
    """Findings as they are made."""
    config = absolute(config, "storage", urls=("storage",))
    if config.launcher == "local":
        from distseg.work.doctor import examine_machine

        return examine_machine(config)
    from distseg.distributed.doctor import examine_cluster

    return examine_cluster(config)


def _config(kind: type[Config], arguments: Mapping[str, Any], **sections: Any) -> Config:
    """The verb's config of a function's arguments; None leaves the schema's default. Rules are checked on building."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass by contract
    given = {name: value for name, value in arguments.items() if value is not None and name in names}
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    config = kind(**{**plain, **sections})
    settings: Any = config
    if arguments.get("workers") is not None:
        settings.resources = dataclasses.replace(settings.resources, workers=arguments["workers"])
    if arguments.get("progress") is not None:
        settings.logging = dataclasses.replace(settings.logging, progress=arguments["progress"])
    return config


def _list(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


@contextmanager
def _executor(launcher: str, resources: ResourcesConfig) -> Iterator[Executor]:
    """This machine's processes, or Ray tasks on the cluster at hand (started when first used if there is none)."""
    executor: Executor
    if launcher == "local":
        from distseg.work.executor import LocalExecutor

        executor = LocalExecutor(resources.workers)
    else:
        from distseg.distributed.executor import RayExecutor

        executor = RayExecutor(resources.workers, gpus_per_task=resources.gpus_per_worker)
    try:
        yield executor
    finally:
        executor.close()


@contextmanager
def _pool(launcher: str, resources: ResourcesConfig) -> Iterator[Executor]:
    """Like `_executor`, for items that share something costly: each worker lives on, and reads and packs beside the
    network."""
    executor: Executor
    if launcher == "local":
        from distseg.work.executor import LocalExecutor

        executor = LocalExecutor(resources.workers, at_once=2)
    else:
        from distseg.distributed.actor_pool import ActorPool

        executor = ActorPool(resources.workers, gpus_per_actor=resources.gpus_per_worker, at_once=2)
    try:
        yield executor
    finally:
        executor.close()


@contextmanager
def _one_ray(launcher: str, resources: ResourcesConfig) -> Iterator[None]:
    """Several verbs in one process share one Ray instead of starting it for each."""
    if launcher == "local":
        yield
        return
    from distseg.distributed.cluster import connect

    with connect(workers=resources.workers, gpus_per_worker=resources.gpus_per_worker):
        yield
