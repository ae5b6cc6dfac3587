"""From a sweep's trials to RUN/trials.csv, RUN/figures and RUN/report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distseg.config.spaces import Parameter
from distseg.evaluation.benchmark_grids import Grid
from distseg.evaluation.benchmark_tables import to_csv
from distseg.evaluation.figures import png_bytes
from distseg.evaluation.page import Picture
from distseg.evaluation.tune_figures import (
    TrialLine,
    ValueAxis,
    compute_figure,
    importance_figure,
    parallel_coordinates,
)
from distseg.evaluation.tune_importance import Importance, importance
from distseg.evaluation.tune_page import TunePage, render_tune_page
from distseg.training.run import write_atomic
from distseg.work.tune_sweep import DEFAULT
from distseg.work.tune_trials import FAILED, FINISHED, STOPPED, Trial, Trials

_TICKS = (0.25, 0.5, 0.75)  # between the ends


def write_report(trials: Trials, best: Trial | None) -> Path:
    """Write trials.csv, figures/ and report.html; returns the report's path."""
    run = trials.sweep.run
    write_atomic(run / "trials.csv", to_csv([_facts(trials, trial) for trial in trials.by_name.values()]))
    pictures = _pictures(trials, best)
    (run / "figures").mkdir(exist_ok=True)
    for file, picture in pictures:
        (run / "figures" / file).write_bytes(picture.png)
    page = TunePage(
        space=trials.sweep.space.name,
        description=trials.sweep.space.description,
        lead=_lead(trials),
        notes=_notes(trials),
        pictures=[picture for _, picture in pictures],
        best=_best_grid(trials, best),
        trials=_trials_grid(trials),
        failed=[(trial.name, trial.reason) for trial in trials.ended if trial.state == FAILED],
    )
    write_atomic(run / "report.html", render_tune_page(page))
    return run / "report.html"


def steps_spent(trials: Trials) -> int:
    """Optimiser steps of all trials together, without the warm-up."""
    return sum(trial.spent for trial in trials.by_name.values())


def found_importance(trials: Trials) -> tuple[int, list[Importance]]:
    """The last step that all trials which did not fail reached, and what each key explains of the objective there."""
    compared = [trial for trial in trials.ended if trial.state in (FINISHED, STOPPED) and trial.looks]
    common = set.intersection(*(set(trial.looks) for trial in compared)) if compared else set()
    if not common:
        return 0, []
    step = max(common)
    found = []
    for parameter in trials.sweep.space.parameters:
        key = parameter.key
        pairs = [(values[key], t.looks[step]) for t in compared if key in (values := trials.values_of(t))]
        pairs = [pair for pair in pairs if pair[0] is not None or parameter.holds(None)]  # a range's default of null
        one = importance(key, [value for value, _ in pairs], [look for _, look in pairs])
        found += [one] if one is not None else []
    return step, found


# --- tables --------------------------------------------------------------------------------------------------------


def _facts(trials: Trials, trial: Trial) -> dict[str, Any]:
    """A line of trials.csv. `value` is the finished model's objective, `last` the last look's, whatever came of it."""
    values = trials.values_of(trial)
    return {
        "trial": trial.name,
        "state": trial.state,
        "value": trials.value(trial),
        "last": trial.looks[trial.last_step] if trial.looks else None,
        "last_step": trial.last_step,
        "steps_spent": trial.spent,
        "seconds": trial.seconds,
        **{key: values.get(key) for key in trials.sweep.space.keys},
        "run": trial.run,
        "reason": trial.reason,
    }


def _trials_grid(trials: Trials) -> Grid:
    """Best first, then those stopped early by how far they came, then the failed."""
    sign = -1 if trials.sweep.best_is_max else 1
    order = {FINISHED: 0, STOPPED: 1, FAILED: 2}

    def rank(trial: Trial) -> tuple[int, int, float]:
        value = trials.value(trial)
        last = value if value is not None else trial.looks.get(trial.last_step, 0.0)
        return order.get(trial.state, 3), -trial.last_step, sign * last

    keys = trials.sweep.space.keys
    lines = []
    for trial in sorted(trials.by_name.values(), key=rank):
        values, shown = trials.values_of(trial), trial.looks.get(trial.last_step)
        figure = "\u2013" if shown is None else f"{shown:.4f}"
        told = [value_text(values[key]) if key in values else "" for key in keys]
        lines.append((trial.name, trial.state, figure, str(trial.spent), f"{trial.seconds:.0f}", *told))
    head = ("Trial", "State", trials.sweep.settings.objective, "Steps", "Seconds", *keys)
    return Grid("Every trial", head, tuple(lines), "The objective of a trial that was stopped is its last look's.")


def _best_grid(trials: Trials, best: Trial | None) -> Grid | None:
    """A line a key, a column each for the best and the default."""
    if best is None:
        return None
    default = trials.by_name.get(DEFAULT)
    shown = [best, *([default] if default is not None and default is not best else [])]
    values = [trials.values_of(trial) for trial in shown]
    reached = [trials.value(trial) for trial in shown]
    figures = [trial.state if value is None else f"{value:.4f}" for trial, value in zip(shown, reached, strict=True)]
    told = [[value_text(one[key]) if key in one else "" for one in values] for key in trials.sweep.space.keys]
    lines = [(trials.sweep.settings.objective, *figures)]
    lines += [(key, *texts) for key, texts in zip(trials.sweep.space.keys, told, strict=True)]
    head = ("", f"Best, {best.name}" if best is not default else "Best, the default", *(["Default"] if default else []))
    return Grid("", head[: len(shown) + 1], tuple(lines))


def _lead(trials: Trials) -> list[str]:
    sweep, counts = trials.sweep, dict.fromkeys((FINISHED, STOPPED, FAILED), 0)
    for trial in trials.ended:
        counts[trial.state] += 1
    said = [f"{sweep.space.description[:1].upper()}{sweep.space.description[1:]}."] if sweep.space.description else []
    said.append(
        f"{len(trials.by_name)} trials of {sweep.steps} steps with {sweep.base.method.name}: {counts[FINISHED]} "
        f"finished, {counts[STOPPED]} stopped early, {counts[FAILED]} failed."
    )
    return said


def _notes(trials: Trials) -> list[str]:
    sweep, settings = trials.sweep, trials.sweep.settings
    whole = len(trials.by_name) * sweep.steps
    notes = [
        f"Cohort {Path(sweep.base.cohort).name}, seed {sweep.base.seed}; search {settings.search}, scheduler "
        f"{settings.scheduler}. {settings.objective} on {sweep.base.train.validation_patches} validation patches every "
        f"{sweep.every} steps. {steps_spent(trials)} steps were trained where {whole} would take every trial to its "
        f"end ({100 * steps_spent(trials) / max(1, whole):.0f} %)."
    ]
    if sweep.warmup is not None:
        notes.append(f"All branch from {sweep.warmup.train.steps} supervised steps, trained once.")
    elif sweep.base.train.init_from is not None:
        notes.append(f"All branch from the run {Path(sweep.base.train.init_from).name}.")
    return notes


# --- pictures ------------------------------------------------------------------------------------------------------


def _pictures(trials: Trials, best: Trial | None) -> list[tuple[str, Picture]]:
    """(file name, picture), as far as there is something to draw."""
    lines = [_line(trials, trial, best) for trial in trials.ended if trial.state in (FINISHED, STOPPED)]
    if not lines:
        return []
    sweep, objective = trials.sweep, trials.sweep.settings.objective
    axes = [_axis(parameter) for parameter in sweep.space.parameters]
    warmup = sweep.warmup.train.steps if sweep.warmup is not None else 0
    pictures = [
        (
            "parallel.png",
            "What was tried, and what it came to",
            "A line a trial, through the values it tried to its objective; lighter is better.",
            parallel_coordinates(axes, lines, objective=objective),
        ),
        (
            "compute.png",
            "The objective against compute",
            "Left: the looks of every trial. Right: the best look of the sweep by the steps spent on all of it.",
            compute_figure(lines, _best_so_far(trials, warmup), objective=objective, warmup_steps=warmup),
        ),
    ]
    step, found = found_importance(trials)
    if found:
        caption = (
            f"At step {step}, the last that all {max(f.trials for f in found)} trials reached. Black ticks: chance."
        )
        pictures.append(("importance.png", "Which keys matter", caption, importance_figure(found)))
    return [(file, Picture(title, caption, png_bytes(figure))) for file, title, caption, figure in pictures]


def _line(trials: Trials, trial: Trial, best: Trial | None) -> TrialLine:
    values = trials.values_of(trial)
    return TrialLine(
        name=trial.name,
        state=trial.state,
        places=[p.unit(values[p.key]) if p.key in values else None for p in trials.sweep.space.parameters],
        looks=sorted(trial.looks.items()),
        value=trials.value(trial),
        is_best=trial is best,
        is_default=trial.name == DEFAULT,
    )


def _axis(parameter: Parameter) -> ValueAxis:
    shown = list(parameter.values)
    if not parameter.is_listed:
        low, high = parameter.ends()
        shown = list(dict.fromkeys([low, *(parameter.at(place) for place in _TICKS), high]))
    placed = [(parameter.unit(value), value_text(value)) for value in shown]
    return ValueAxis(parameter.key, [(place, text) for place, text in placed if place is not None])


def _best_so_far(trials: Trials, warmup_steps: int) -> list[tuple[int, float]]:
    """(steps spent on everything, best look), a point for each look that is the best yet, and the end."""
    spent: dict[str, int] = {}
    points: list[tuple[int, float]] = []
    better = max if trials.sweep.best_is_max else min
    for name, _, value, steps in trials.history:
        spent[name] = steps
        best = value if not points else better(value, points[-1][1])
        points.append((warmup_steps + sum(spent.values()), best))
    return points


def value_text(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
