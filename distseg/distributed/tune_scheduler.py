"""ASHA and PBT of Ray Tune, knowing of earlier sessions what they would know had there been one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from distseg.work.tune_search import perturbed
from distseg.work.tune_sweep import Sweep
from distseg.work.tune_trials import Trials


def make_scheduler(sweep: Sweep, trials: Trials, mode: str) -> Any:
    """Tune's scheduler as `sweep` asks; None runs every trial to its end."""
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
