"""Ray Tune around a sweep's trials: it starts them as there is room, and its schedulers stop or perturb them.

Two runners. `inline`: a trial is one Tune function, the training loop in its process. `train`: a trial is a Tune
function that starts a Ray Train run of its own and reports what it reads in the run directory. Tune is told of looks
that are safe on disk, each once, by their own step. Nothing is read back from RUN/ray: each launch takes a fresh name
there, and which trials there are, where they stand and what ASHA has seen comes from RUN/trials.jsonl.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import ray.tune
import ray.util.state
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import Searcher

from distseg.config.schema import ResourcesConfig, TrainRunConfig
from distseg.distributed.cluster import connect
from distseg.distributed.train import train_on_ray
from distseg.errors import DistsegError, InputError
from distseg.training.loop import set_threads, train_rank
from distseg.training.reduce import SingleProcess
from distseg.training.setup import open_run
from distseg.work.executor import attempt
from distseg.work.tune_progress import TuneProgress
from distseg.work.tune_search import perturbed
from distseg.work.tune_sweep import Sweep
from distseg.work.tune_trial import TrialJob, fork_run, looks_of, run_trial
from distseg.work.tune_trials import OPEN, Trial, Trials

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no second set of logs beside the run directories
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep; the same command goes on
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed reports why and no objective
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of its own state, which nobody reads
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}
MAX_DEATHS = 2  # of a trial's process, in a row with what it does: then it has failed
_POLL_S = 0.5
_DASHBOARD_S = 60  # to answer; it is up after 3 to 20 s
# Tune refuses a trial that asks for nothing. The CPUs are its workers', so it asks for a little memory.
_NESTED_TRIAL = {"memory": float(2**20)}


class RayTrials:
    """`distseg.work.tune.TrialRunner` on Ray: as many trials at once as there is room for, the others wait."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self._resources = resources

    @contextmanager
    def ready(self, sweep: Sweep) -> Iterator[None]:
        """Raises InputError where the cluster is too small for one trial, or lacks what the runner needs."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        nested = sweep.settings.runner == "train"
        with connect(
            workers=self._resources.workers,
            gpus_per_worker=self._resources.gpus_per_worker,
            include_dashboard=nested,
        ):
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
            space = {"trial": ray.tune.grid_search([_payload(trial) for trial in iter(trials.next, None)])}
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(
                ray.tune.with_parameters(trial_in_tune, sweep=sweep, cpus=cpus), _NESTED_TRIAL if nested else share
            ),
            param_space=space,
            tune_config=ray.tune.TuneConfig(
                search_alg=None if pbt else _Source(trials),
                scheduler=_scheduler(sweep, trials, mode),
                num_samples=1 if pbt else trials.left(),
                max_concurrent_trials=None if pbt else room,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=ray.tune.RunConfig(
                name=f"launch-{time.time_ns()}",
                storage_path=str(sweep.run / "ray"),
                callbacks=[_Teller(trials, progress)],
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
    try:
        ray.util.state.list_nodes(limit=1, timeout=_DASHBOARD_S)
    except (ray.util.state.exception.RayStateApiException, ConnectionError) as error:
        raise InputError(
            "Ray's dashboard does not answer",
            where="tune.runner",
            value="train",
            rule="it frees the CPUs of trials that were stopped",
            fix="start the cluster with ray[default] and its dashboard, or set tune.runner=inline",
        ) from error


# --- on the driver -------------------------------------------------------------------------------------------------


def _payload(trial: Trial) -> dict[str, Any]:
    return {"name": trial.name, "run": trial.run, "values": trial.values}


def _name(trial: Any) -> str:
    """Asked once, when Tune makes its trial."""
    name: str = trial.config["trial"]["name"]
    return name


class _NotKept:
    """Tune pickles what it is given into its own state, which nobody reads; what belongs to this process stays out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Source(_NotKept, Searcher):
    """Tune's next trial is ours."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self._trials = trials

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **_: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        trial = self._trials.next()
        return Searcher.FINISHED if trial is None else {"trial": _payload(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # _Teller hears of it, with the trial's name

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Tune renames it; the truth is trials.jsonl

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep is never restored from Ray's state")


class _Teller(_NotKept, ray.tune.Callback):
    """Writes down what Tune's trials report and how they end."""

    def __init__(self, trials: Trials, progress: TuneProgress) -> None:
        self._trials, self._progress = trials, progress
        self._begun: dict[str, float] = {}
        self._errors: dict[str, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._begun.setdefault(str(trial), time.monotonic())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        name = str(trial)
        if "taken_from" in result and result["run"] != self._trials.by_name[name].run:
            self._trials.took_over(
                name,
                run=result["run"],
                values=trial.config["trial"]["values"],
                donor=result["taken_from"],
                step=result["taken_step"],
            )
        if "error" in result:
            self._errors[name] = result["error"]
        else:
            self._trials.looked(name)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(str(trial), self._errors.get(str(trial)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(str(trial), f"its process died {MAX_DEATHS + 1} times, most often for want of memory")

    def _end(self, name: str, error: str | None) -> None:
        seconds = time.monotonic() - self._begun.get(name, time.monotonic())
        self._progress.ended(self._trials.end(name, seconds=seconds, error=error, stopped=True))


def _scheduler(sweep: Sweep, trials: Trials, mode: str) -> Any:
    settings = sweep.settings
    shared: dict[str, Any] = {"time_attr": "step", "metric": settings.objective, "mode": mode}
    if settings.scheduler == "pbt":

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            """`config` is the donor's; the trial that takes over knows its own name."""
            donor = config["trial"]
            values = perturbed(
                sweep.space, donor["values"] or sweep.default_values(), seed=sweep.base.seed, name=donor["name"],
                step=len(trials.history),
            )  # fmt: skip
            return {"trial": {**donor, "values": values}}

        return PopulationBasedTraining(
            **shared,
            perturbation_interval=sweep.every,
            custom_explore_fn=explore,
            require_attrs=False,
            log_config=False,
        )
    if settings.scheduler != "asha":
        return None
    scheduler = ASHAScheduler(
        **shared,
        max_t=sweep.steps,
        grace_period=sweep.every,
        reduction_factor=settings.reduction,
        stop_last_trials=False,
    )
    controller: Any = None  # ASHA asks nothing of it
    for trial in trials.ended:  # its rungs know of earlier sessions what they would know had there been one
        past: Any = SimpleNamespace(trial_id=trial.name)
        scheduler.on_trial_add(controller, past)
        for step, value in sorted(trial.looks.items()):
            scheduler.on_trial_result(controller, past, {"step": step, settings.objective: value})
    return scheduler


# --- in a trial's process ------------------------------------------------------------------------------------------


def trial_in_tune(config: dict[str, Any], *, sweep: Sweep, cpus: int) -> None:
    """What Tune runs for a trial, again after a death or a pause; the run directory says from where."""
    given = config["trial"]
    reports = _Reports(sweep, given)
    train = (lambda c: _train_nested(c, cpus, reports.tell)) if sweep.settings.runner == "train" else (
        lambda c: _train_inline(c, cpus, reports.tell)
    )  # fmt: skip
    job = TrialJob(sweep, reports.name, reports.run, given["values"], train, threads=cpus)
    outcome = attempt(run_trial, job, reports.name)
    if outcome.error is None:
        reports.tell()
    else:
        reports.fail(outcome.error)


class _Reports:
    """What the trial tells Tune. Under PBT every report hands over a pointer to where it stands, as a checkpoint."""

    def __init__(self, sweep: Sweep, given: Mapping[str, Any]) -> None:
        self._sweep, self._pbt = sweep, sweep.settings.scheduler == "pbt"
        self.name: str = ray.tune.get_context().get_trial_name()
        self.run: str = given["run"]
        self._taken: dict[str, Any] = {}
        self._told = 0
        pointer = _pointer()
        if pointer is not None:
            self._place(pointer, given["values"])
        if self._pbt:  # ASHA hears all looks again, so that its rungs have them; PBT would act on them anew
            self._told = max(looks_of(sweep, self.run), default=0)

    def _place(self, pointer: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """The run directory to go on in: our own, or a new one that goes on as the donor's did."""
        self.run = pointer["run"]
        if pointer["name"] == self.name:
            return
        self.run = f"{self.name}.s{pointer['step']:07d}"
        self._taken = {"taken_from": pointer["name"], "taken_step": pointer["step"]}
        fork_run(self._sweep, pointer["run"], pointer["step"], self._sweep.config_of(self.run, values))

    def tell(self) -> None:
        """Every look that is on disk and was not told yet."""
        for step, value in sorted(looks_of(self._sweep, self.run).items()):
            if step <= self._told:
                continue
            self._told = step
            # A trial at its end is not to be exploited, nor to exploit: PBT looks away where the objective is missing.
            shown = {} if self._pbt and step >= self._sweep.steps else {self._sweep.settings.objective: value}
            self._report({"step": step, **shown})

    def fail(self, error: str) -> None:
        ray.tune.report({"step": max(1, self._told), "run": self.run, "error": error})

    def _report(self, metrics: dict[str, Any]) -> None:
        metrics |= {"run": self.run, **self._taken}
        if not self._pbt:
            ray.tune.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            pointer = {"name": self.name, "run": self.run, "step": metrics["step"]}
            (Path(folder) / "pointer.json").write_text(json.dumps(pointer))
            ray.tune.report(metrics, checkpoint=ray.tune.Checkpoint.from_directory(folder))


def _pointer() -> dict[str, Any] | None:
    checkpoint = ray.tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        content: dict[str, Any] = json.loads((Path(folder) / "pointer.json").read_text())
    return content


def _train_inline(config: TrainRunConfig, cpus: int, tell: Callable[[], None]) -> None:
    """The loop in this process."""
    set_threads(config, cpus)
    open_run(config)
    train_rank(config, communicator=SingleProcess(), reporter=_TellsLooks(tell))


class _TellsLooks:
    """The loop's reporter: a look is told once its checkpoint is on disk, the last one once the model is."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def step(self, row: Mapping[str, Any], total_steps: int) -> None:
        pass

    def checkpoint(self, step: int) -> None:
        self._tell()

    def note(self, text: str) -> None:
        pass


def _train_nested(config: TrainRunConfig, cpus: int, tell: Callable[[], None]) -> None:
    """A Ray Train run of its own, in another thread: this one is Tune's, the only one that may report."""
    errors: list[Exception] = []

    def fit() -> None:
        try:
            train_on_ray(config, cpus_per_worker=cpus)
        except Exception as error:  # carried to Tune's thread, whatever it is
            errors.append(error)

    # A daemon: when Tune stops the trial, its process must not wait for the run to end.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        tell()
    if errors:
        raise errors[0]
