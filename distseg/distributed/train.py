"""Ray Train V2 around the training loop. The loop, its checkpoints and where it resumes are the run directory's; Ray
starts the workers, joins them in a process group and starts them again when one dies.

RUN/ray/ is Ray's own scratch: each launch takes a fresh name there, so Ray never resumes anything by itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch

from distseg.config.compose import from_plain, to_plain
from distseg.config.schema import TrainRunConfig
from distseg.distributed.cluster import connect
from distseg.distributed.faults import FaultLog, controller_lost, why_training_failed
from distseg.distributed.index_service import RayReferences, start_owner
from distseg.errors import DistsegError
from distseg.methods import uses_bank
from distseg.training.bank import version_serving
from distseg.training.dry_run import DryRun, steps_of_same_run, trial
from distseg.training.loop import TrainResult, set_threads, train_rank
from distseg.training.progress import TerminalReporter
from distseg.training.reduce import TorchDistributed
from distseg.training.run import RunDirectory
from distseg.training.setup import check_run, make_directory

# Ray's report() waits for the controller's next poll, 2 s apart by default (DESIGN section 6).
_ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25", "RAY_TRAIN_V2_ENABLED": "1"}
MAX_WORKER_FAILURES = 3
MAX_CONTROLLER_FAILURES = 3  # by default Ray tries for ever to find resources
_POLL_S = 0.5


def train_on_ray(
    config: TrainRunConfig, *, cpus_per_worker: int | None = None, claim: str | None = None
) -> TrainResult:
    """Train on `resources.workers` Ray Train workers, from the newest checkpoint of the run directory.

    `cpus_per_worker`: None shares out all that the cluster has. `claim`: of a run behind a URL, held by the caller.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    resources = config.resources
    run, plan = check_run(config)  # bad input is told before Ray starts
    with connect(workers=resources.workers, gpus_per_worker=resources.gpus_per_worker):
        make_directory(run, config, plan)  # not for a cluster too small
        resumed_from = run.newest_step()
        cpus = cpus_per_worker or _cpus_per_worker(resources.workers)
        # Held: the actor lives as long as its handle.
        owner = start_owner(config, num_classes=plan.num_classes, scan_ids=plan.labelled) if uses_bank(config) else None
        launch = f"launch-{time.time_ns()}"
        faults = run.path / "ray" / f"{launch}.faults"
        faults.parent.mkdir(exist_ok=True)  # behind a URL too: Ray's own is this machine's
        trainer = ray.train.torch.TorchTrainer(
            train_fn_per_worker,
            train_loop_config={"config": to_plain(config), "claim": claim},
            torch_config=ray.train.torch.TorchConfig(timeout_s=config.train.worker_timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=_share(cpus, resources.gpus_per_worker),
            ),
            run_config=ray.train.RunConfig(
                name=launch,
                storage_path=str(run.path / "ray"),
                callbacks=[FaultLog(faults)],  # type: ignore[list-item]  # V2's; the types are V1's
                failure_config=ray.train.FailureConfig(
                    max_failures=MAX_WORKER_FAILURES,
                    controller_failure_limit=MAX_CONTROLLER_FAILURES,  # type: ignore[call-arg]  # V2's; the types are V1's
                ),
            ),
        )
        with _watched(run, config, plan.notes, owner, faults, resumed_from):
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise why_training_failed(error, MAX_WORKER_FAILURES) from error
            except ray.exceptions.RayActorError as error:
                raise controller_lost(error) from error
        run.fetch_metrics()  # rank 0 may have been elsewhere
        return TrainResult(config.run, config.train.steps, resumed_from, run.last_metrics() or {})


def dry_run_on_ray(config: TrainRunConfig) -> DryRun:
    """One worker's trial, as a task with a worker's share of CPUs and GPUs. Nothing is written to the run directory."""
    resources = config.resources
    steps_done = steps_of_same_run(config)
    with connect(workers=resources.workers, gpus_per_worker=resources.gpus_per_worker):
        cpus = _cpus_per_worker(resources.workers)
        task = ray.remote(cast(Any, trial)).options(num_cpus=cpus, num_gpus=resources.gpus_per_worker, max_retries=0)
        try:
            found: DryRun = ray.get(task.remote(to_plain(config), threads=cpus, steps_done=steps_done))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, DistsegError) else error from error
    return found


def _cpus_per_worker(workers: int) -> int:
    """This machine's cores, or the cluster's where it has fewer, over the workers."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(ray.cluster_resources().get("CPU", cores))) // workers)  # type: ignore[no-untyped-call]  # Ray has no hints


def train_fn_per_worker(given: dict[str, Any]) -> None:
    """Runs in each Ray Train worker."""
    config = from_plain(given["config"], TrainRunConfig)
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)  # type: ignore[no-untyped-call]  # Ray's
    set_threads(config, int(cpus) * config.resources.workers)
    communicator = TorchDistributed()
    if config.resources.gpus_per_worker > 0:
        torch.cuda.set_device(ray.train.torch.get_device())
    train_rank(
        config,
        communicator=communicator,
        reporter=_RayReporter(),
        make_service=RayReferences,
        claim=given["claim"],
    )


class _RayReporter:
    """Tells Ray Train of checkpoints, and of nothing else: a report blocks, and the driver reads metrics.jsonl."""

    def step(self, row: Mapping[str, Any], total_steps: int) -> None:
        pass

    def checkpoint(self, step: int) -> None:
        """A collective in Ray Train: all ranks report."""
        ray.train.report({"step": step})

    def note(self, text: str) -> None:
        pass


def _share(cpus: int, gpus: float) -> dict[str, float]:
    return {"CPU": float(cpus), **({"GPU": gpus} if gpus > 0 else {})}


@contextmanager
def _watched(
    run: RunDirectory, config: TrainRunConfig, notes: tuple[str, ...], owner: Any, faults: Path, resumed_from: int
) -> Iterator[None]:
    """The driver's progress bar: follows RUN/metrics.jsonl and `faults` as they are written. `owner`: of the bank, or
    None."""
    done = threading.Event()
    with TerminalReporter(title=Path(config.run).name, enabled=config.logging.progress) as reporter:
        for note in notes:
            reporter.note(note)
        follower = threading.Thread(target=_follow, args=(run, config, reporter, done, owner, faults, resumed_from))
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()


def _follow(
    run: RunDirectory,
    config: TrainRunConfig,
    reporter: TerminalReporter,
    done: threading.Event,
    owner: Any,
    faults: Path,
    resumed_from: int,
) -> None:
    _, position = run.metrics_from(None)
    told = 0
    while True:
        finishing = done.wait(_POLL_S)
        rows, position = run.metrics_from(position)
        for row in rows:
            if row["step"] <= resumed_from:  # no news: a file that is cut back is read anew
                continue
            if owner is not None:  # once: which index serves, and why
                version = version_serving(row["step"], config.references.every_steps)
                chosen = ray.get(owner.chosen.remote(version))
                if chosen is not None:
                    reporter.note(f"bank: {chosen}")
                    owner = None
            reporter.step(row, config.train.steps)
        lines = faults.read_text().splitlines() if faults.exists() else []
        for line in lines[told:]:
            again = f"all workers start again from the newest checkpoint, {MAX_WORKER_FAILURES} times at most"
            reporter.note(f"{line}; {again}")
        told = len(lines)
        if finishing:
            return
