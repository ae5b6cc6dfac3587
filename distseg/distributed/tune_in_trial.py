"""In a trial's process: the training loop there, or a Ray Train run of its own; and what Tune is told of it."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.tune

from distseg.config.schema import TrainRunConfig
from distseg.distributed.train import train_on_ray
from distseg.training.loop import set_threads, train_rank
from distseg.training.reduce import SingleProcess
from distseg.training.setup import open_run
from distseg.work.executor import attempt
from distseg.work.tune_sweep import Sweep
from distseg.work.tune_trial import TrialJob, fork_run, looks_of, run_trial

_POLL_S = 0.5


def trial_in_tune(config: dict[str, Any], *, sweep: Sweep, cpus: int) -> None:
    """What Tune runs for a trial, again after a death or a pause; the run directory says from where."""
    given = config["trial"]
    reports = _Reports(sweep, given["run"])
    train = (lambda c: _train_nested(c, cpus, reports.tell)) if sweep.settings.runner == "train" else (
        lambda c: _train_inline(c, cpus, reports.tell)
    )  # fmt: skip

    def whole(values: dict[str, Any]) -> None:
        """All of it, so that whatever fails is told as it is: Tune itself would try it again, and say that it died."""
        reports.begin(values)
        run_trial(TrialJob(sweep, reports.name, reports.run, values, train, threads=cpus))
        reports.tell()

    outcome = attempt(whole, given["values"], reports.name)
    if outcome.error is not None:
        reports.fail(outcome.error)


class _Reports:
    """What the trial tells Tune. Under PBT every report hands over a pointer to where it stands, as a checkpoint."""

    def __init__(self, sweep: Sweep, run: str) -> None:
        self._sweep, self._pbt = sweep, sweep.settings.scheduler == "pbt"
        self.name: str = ray.tune.get_context().get_trial_name()
        self.run = run
        self._taken: dict[str, Any] = {}
        self._told = 0

    def begin(self, values: Mapping[str, Any]) -> None:
        """Find or make the run directory to go on in."""
        pointer = _pointer()
        if pointer is not None:
            self._place(pointer, values)
        if self._pbt:  # ASHA hears all looks again, so that its rungs have them; PBT would act on them anew
            self._told = max(looks_of(self._sweep, self.run), default=0)

    def _place(self, pointer: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Our own, or a new one that goes on as the donor's did, told of once it is whole."""
        if pointer["name"] == self.name:
            self.run = pointer["run"]
            return
        run = f"{self.name}.s{pointer['step']:07d}"
        fork_run(self._sweep, pointer["run"], pointer["step"], self._sweep.config_of(run, values))
        self.run = run
        self._taken = {"taken_from": pointer["name"], "taken_step": pointer["step"]}

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
