"""Ray Tune around a sweep's trials: it starts them as there is room, and its schedulers stop or perturb them.

Two runners. `inline`: a trial is one Tune function, the training loop in its process. `train`: a trial is a Tune
function that starts a Ray Train run of its own and reports what it reads in the run directory. Tune is told of looks
that are safe on disk, each once, by their own step. Nothing is read back from RUN/ray: each launch takes a fresh name
there, and which trials there are, where they stand and what ASHA has seen comes from RUN/trials.jsonl.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray.tune
import ray.util.state

from distseg.config.schema import ResourcesConfig
from distseg.distributed.cluster import connect, wait_for_nodes
from distseg.distributed.tune_callbacks import MAX_DEATHS, Source, Teller, payload, trial_name
from distseg.distributed.tune_in_trial import trial_in_tune
from distseg.distributed.tune_scheduler import make_scheduler
from distseg.errors import DistsegError, InputError
from distseg.work.tune_progress import TuneProgress
from distseg.work.tune_sweep import Sweep
from distseg.work.tune_trials import OPEN, Trials

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no second set of logs beside the run directories
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep; the same command goes on
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed reports why and no objective
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of its own state, which nobody reads
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_DASHBOARD_S = 60  # to answer; it is up after 3 to 20 s, on a machine full of other work after more
_ASK_EVERY_S = 1.0
# Tune refuses a trial that asks for nothing. The CPUs are its workers', so it asks for a little memory.
_NESTED_TRIAL = {"memory": float(2**20)}


class RayTrials:
    """`distseg.work.tune.TrialRunner` on Ray: as many trials at once as there is room for, the others wait."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self._resources = resources

    @contextmanager
    def ready(self, sweep: Sweep) -> Iterator[None]:
        """Raises InputError where the cluster is too small for one trial, or lacks what the runner needs.

        A cluster that grows is asked for the workers of `tune.concurrent` trials: it has room for them before Tune
        counts how many fit. Left open, it stays at what one trial needs.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        nested = sweep.settings.runner == "train"
        with connect(
            workers=self._resources.workers,
            gpus_per_worker=self._resources.gpus_per_worker,
            include_dashboard=nested,
        ):
            if sweep.settings.concurrent is not None:
                wait_for_nodes(
                    workers=min(sweep.settings.concurrent, sweep.trials) * self._resources.workers,
                    gpus_per_worker=self._resources.gpus_per_worker,
                )
            if nested:
                _check_dashboard()
            if nested and sweep.settings.scheduler == "pbt":
                _check_population(sweep, self._room(sweep)[0], self._resources.workers)
            yield

    def _room(self, sweep: Sweep) -> tuple[int, int]:
        return room_for_trials(_nodes(), self._resources, wanted=sweep.settings.concurrent or sweep.trials)

    def run(self, sweep: Sweep, trials: Trials, progress: TuneProgress) -> None:
        room, cpus = self._room(sweep)
        mode = "max" if sweep.best_is_max else "min"
        nested, pbt = sweep.settings.runner == "train", sweep.settings.scheduler == "pbt"
        share = {"CPU": float(cpus), "GPU": self._resources.gpus_per_worker}
        space: dict[str, Any] = {}
        if pbt:  # Ray allows it no searcher: the population is known from the start
            space = {"trial": ray.tune.grid_search([payload(trial) for trial in iter(trials.next, None)])}
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(
                ray.tune.with_parameters(trial_in_tune, sweep=sweep, cpus=cpus), _NESTED_TRIAL if nested else share
            ),
            param_space=space,
            tune_config=ray.tune.TuneConfig(
                search_alg=None if pbt else Source(trials),
                scheduler=make_scheduler(sweep, trials, mode),
                num_samples=1 if pbt else trials.left(),
                max_concurrent_trials=None if pbt else room,
                trial_name_creator=trial_name,
                trial_dirname_creator=trial_name,
            ),
            run_config=ray.tune.RunConfig(
                name=f"launch-{time.time_ns()}",
                storage_path=str(sweep.run / "ray"),
                callbacks=[Teller(trials, progress)],
                verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=MAX_DEATHS),
            ),
        )
        with warnings.catch_warnings():  # it advises what a function cannot do
            warnings.filterwarnings("ignore", "Consider boosting PBT", UserWarning)
            tuner.fit()
        left = [trial.name for trial in trials.by_name.values() if trial.state == OPEN]
        if left:
            raise DistsegError(f"Ray Tune ended with trials unfinished: {', '.join(left)}; the same command goes on")


def room_for_trials(nodes: list[Mapping[str, float]], resources: ResourcesConfig, *, wanted: int) -> tuple[int, int]:
    """(trials at once, CPUs a worker): as many trials as wanted and fit, then all the CPUs that leaves each worker."""
    gpus = resources.gpus_per_worker

    def fit(cpus: int) -> int:
        """Trials whose workers fit, each worker on one node."""
        workers = 0
        for node in nodes:
            by_cpu = int(node.get("CPU", 0.0) // cpus)
            workers += min(by_cpu, int(node.get("GPU", 0.0) / gpus + 1e-9)) if gpus > 0 else by_cpu
        return workers // resources.workers

    trials = max(1, min(wanted, fit(1)))
    cpus = 1
    while fit(cpus + 1) >= trials:
        cpus += 1
    return trials, cpus


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray's


def _check_population(sweep: Sweep, room: int, workers: int) -> None:
    """PBT pauses trials to let others in, which for a Ray Train run is a start of its own each time."""
    if room < sweep.trials:
        raise InputError(
            "a population that does not fit the cluster at once",
            where="tune.trials",
            value=sweep.trials,
            rule=f"{room} trials of {workers} workers fit",
            fix="set tune.runner=inline, or lower tune.trials",
        )


def _check_dashboard() -> None:
    """Ray Train frees a stopped run's CPUs through it: without, a sweep with ASHA would wait for them for ever."""
    address = ray.get_runtime_context().gcs_address  # ours: without it, a second Ray on this machine is an error
    deadline = time.monotonic() + _DASHBOARD_S
    while True:
        try:
            ray.util.state.list_nodes(address=address, limit=1, timeout=_DASHBOARD_S)
            return
        except (ray.util.state.exception.RayStateApiException, ConnectionError) as error:
            if time.monotonic() >= deadline:  # one that is on its way up refuses at once: it is asked again
                raise InputError(
                    "Ray's dashboard does not answer",
                    where="tune.runner",
                    value="train",
                    rule="it frees the CPUs of trials that were stopped",
                    fix="start the cluster with ray[default] and its dashboard, or set tune.runner=inline",
                ) from error
        time.sleep(_ASK_EVERY_S)
