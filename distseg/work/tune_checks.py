"""Everything that can be wrong with a sweep is found here, before anything runs.

RUN/tune.yaml records what the directory was made with: space, default configuration, how it is swept, the cohort's
digest. Anything else there is refused. More trials, another runner or other resources are the same sweep.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distseg.config.compose import flatten, identity, recipe_hash, with_overrides
from distseg.config.schema import TrainRunConfig
from distseg.config.spaces import Space, load_space
from distseg.config.verbs import OBJECTIVES, TuneConfig, TuneRunConfig
from distseg.data.cohort import Cohort
from distseg.errors import ConfigError, DataError, RunMismatchError
from distseg.methods import why_unread
from distseg.training.branch import parent_plan
from distseg.training.plan import make_plan
from distseg.training.run import write_atomic
from distseg.work.benchmark_checks import cohort_digest
from distseg.work.owner import owning
from distseg.work.tune_search import GridSearch, Search, make_search
from distseg.work.tune_sweep import (
    Sweep,
    cheapest_passes,
    make_base,
    make_warmup,
    train_part,
    warmup_steps_of,
)

FORMAT = 1
TRIALS = 16
_HEAD = "# What this directory was made with: `distseg tune` refuses another sweep or a changed cohort here.\n"
# PBT changes values while a trial runs, so only keys that nothing on disk depends on.
_PBT_SECTIONS = ("method", "optimizer", "augment")
_PBT_LEAST = 4  # a quarter of the population is replaced


@dataclass(frozen=True)
class Prepared:
    """`notes`: what was decided for the user. `planned`: the values of all trials, None where Optuna chooses them."""

    sweep: Sweep
    search: Search
    planned: list[dict[str, Any]] | None
    notes: tuple[str, ...]
    record: Mapping[str, Any]  # of tune.yaml


def prepare(config: TuneRunConfig) -> Prepared:
    """Parse and check; writes nothing. Raises ConfigError, DataError or RunMismatchError."""
    space = load_space(config.tune.space)
    cohort = Cohort.open(config.cohort)
    _check_validation(cohort, config.cohort)
    search = make_search(
        config.tune.search, space, seed=config.seed, maximise=OBJECTIVES[config.tune.objective] == "max"
    )
    settings, notes = _decided(config, space, search)
    default = train_part(config)
    planned = _planned(settings, search)
    tried = _composed(default, space, planned)
    _check_read(space, tried)
    warmup_steps, said = warmup_steps_of(config, space)
    passes = cheapest_passes([default, *tried])
    base = make_base(config, settings, passes=passes, warmup_steps=warmup_steps)
    warmup = make_warmup(config, warmup_steps)
    _check_data(cohort, [default, *([warmup] if warmup else []), *tried])
    sweep = Sweep(Path(config.run), space, base, settings, warmup)
    record = _record(config, sweep, cohort)
    _check_stored(sweep.run, record)
    patches = base.train.validation_patches
    if patches < config.train.validation_patches:
        notes.append(f"looks at {patches} validation patches, for tune.validation_share={settings.validation_share}")
    return Prepared(sweep, search, planned, (*notes, *([said] if said else [])), record)


@contextlib.contextmanager
def claimed(prepared: Prepared) -> Iterator[Path]:
    """Write RUN/tune.yaml and hold the directory: a second `distseg tune` in it is refused meanwhile."""
    folder = prepared.sweep.run
    with owning(folder / ".lock", what="sweep", name=folder):
        (folder / "trials").mkdir(exist_ok=True)
        write_atomic(folder / "tune.yaml", _HEAD + yaml.safe_dump(dict(prepared.record), sort_keys=False))
        yield folder


def _check_validation(cohort: Cohort, path: str) -> None:
    if not any(record.split == "val" and record.labelled for record in cohort.records):
        raise ConfigError(
            "no validation split, so nothing to choose by",
            where=path,
            rule="trials are compared on annotated scans of the val split; test scans are never looked at",
            fix="ingest with data.split=[.8,.1,.1], or a source with splits.json",
        )


def _decided(config: TuneRunConfig, space: Space, search: Search) -> tuple[TuneConfig, list[str]]:
    """The settings with nothing left open, and what to say of it."""
    asked, local, notes = config.tune, config.launcher == "local", []
    scheduler = asked.scheduler or ("none" if local else "asha")
    runner = asked.runner or ("inline" if local or config.resources.workers == 1 else "train")
    if asked.scheduler is None:
        notes.append(f"tune.scheduler={scheduler} (default with launcher={config.launcher})")
    for key, value, plain in (("tune.scheduler", scheduler, "none"), ("tune.runner", runner, "inline")):
        if local and value != plain:
            raise ConfigError("needs Ray", where=key, value=value, fix=f"set launcher=ray or {key}={plain}")
    if runner == "inline" and config.resources.workers > 1:
        raise ConfigError(
            "a trial of one process",
            where="resources.workers",
            value=config.resources.workers,
            rule="1 with tune.runner=inline",
            fix="set tune.runner=train, or tune.concurrent for more trials at once",
        )
    trials = _count(asked, search)
    if scheduler == "pbt":
        _check_pbt(space, trials)
    return dataclasses.replace(asked, scheduler=scheduler, runner=runner, trials=trials), notes


def _count(asked: TuneConfig, search: Search) -> int:
    if not isinstance(search, GridSearch):
        return asked.trials or TRIALS
    points = len(search.points) + int(asked.default_first)
    if asked.trials is not None and asked.trials < points:
        raise ConfigError(
            "fewer trials than the grid has points",
            where="tune.trials",
            value=asked.trials,
            rule=f"the grid takes {points}, the default among them",
            fix=f"set tune.trials={points} or leave it out, or set tune.search=random",
        )
    return points


def _check_pbt(space: Space, trials: int) -> None:
    fixed = [key for key in space.keys if key.split(".")[0] not in _PBT_SECTIONS]
    if fixed:
        raise ConfigError(
            "cannot change while a trial runs",
            where=f"space {space.name}: {fixed[0]}",
            rule=f"tune.scheduler=pbt takes keys of {', '.join(_PBT_SECTIONS)}",
            fix="set tune.scheduler=asha",
        )
    if trials < _PBT_LEAST:
        raise ConfigError("too small a population", where="tune.trials", value=trials, rule=f"at least {_PBT_LEAST}")


def _planned(settings: TuneConfig, search: Search) -> list[dict[str, Any]] | None:
    """The values of all trials, the default's first; None where they depend on results."""
    if settings.search == "optuna":
        return None
    assert settings.trials is not None
    first: list[dict[str, Any]] = [{}] if settings.default_first else []
    asked = [search.ask(number) for number in range(settings.trials - len(first))]
    return first + [values for values in asked if values is not None]


def _composed(default: TrainRunConfig, space: Space, planned: list[dict[str, Any]] | None) -> list[TrainRunConfig]:
    """Configs at the ends of every parameter, and of all trials that are known. Raises ConfigError naming the key."""
    configs = []
    lowest: dict[str, Any] = {}
    for parameter in space.parameters:
        needed = {key: allowed[0] for key, allowed in parameter.when.items()}
        configs += [_compose(default, space, space.active({**lowest, **needed, parameter.key: end}), parameter.key)
                    for end in parameter.ends()]  # fmt: skip
        lowest[parameter.key] = parameter.ends()[0]
    highest = space.active({parameter.key: parameter.ends()[-1] for parameter in space.parameters})
    configs.append(_compose(default, space, highest, "the last values together"))
    configs += [_compose(default, space, values, f"trial {n}") for n, values in enumerate(planned or []) if values]
    return configs


def _compose(default: TrainRunConfig, space: Space, values: Mapping[str, Any], what: str) -> TrainRunConfig:
    try:
        return with_overrides(default, values)
    except ConfigError as error:
        where = f"space {space.name}: {error.where or what}"
        raise ConfigError(error.what, where=where, value=error.value, rule=error.rule) from None


def _check_read(space: Space, tried: list[TrainRunConfig]) -> None:
    """Raises ConfigError naming every key that no trial would read: those that differ in it alone would be the same."""
    unread = {}
    for key in space.keys:
        reasons = [why_unread(config, key) for config in tried]
        if all(reasons):
            unread[key] = reasons[0]
    if unread:
        raise ConfigError(
            "swept, and nothing depends on it",
            where=f"space {space.name}: {', '.join(unread)}",
            rule="; ".join(dict.fromkeys(str(reason) for reason in unread.values())),
            fix="take it out of the space, or choose a method and values that read it",
        )


def _check_data(cohort: Cohort, configs: list[TrainRunConfig]) -> None:
    """Scans, classes, spacing and the run to branch from fit, for each recipe once. Raises what `train` would."""
    seen = set()
    for config in configs:
        recipe = recipe_hash(config)
        if recipe not in seen:
            seen.add(recipe)
            make_plan(config, cohort, parent=parent_plan(config))


def _record(config: TuneRunConfig, sweep: Sweep, cohort: Cohort) -> dict[str, Any]:
    """The content of tune.yaml. Keys under `sweep` and `default` make this sweep the sweep it is."""
    settings = sweep.settings
    names = ("search", "scheduler", "objective", "looks", "reduction", "validation_share", "default_first")
    return {
        "format": FORMAT,
        "space": sweep.space.name,
        "cohort": config.cohort,
        "cohort_digest": cohort_digest(cohort),
        "trials": sweep.trials,
        "sweep": {
            **{name: getattr(settings, name) for name in names},
            "warmup_steps": sweep.warmup.train.steps if sweep.warmup else 0,
            "parameters": sweep.space.content(),
        },
        "default": identity(train_part(config)),
    }


def _check_stored(run: Path, record: Mapping[str, Any]) -> None:
    """Raises RunMismatchError, with the difference, if something else lives in `run`."""
    if (run / "config.yaml").exists():
        raise RunMismatchError("a training run lives here", where=run, fix="choose another run=")
    file = run / "tune.yaml"
    if not file.is_file():
        return
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError("sweep of another format", where=file, value=content["format"])
        if content["cohort"] != record["cohort"]:
            raise RunMismatchError(
                "holds a sweep of another cohort", where=run, value=content["cohort"], fix="choose another run="
            )
        if content["cohort_digest"] != record["cohort_digest"]:
            raise RunMismatchError(
                "the cohort has changed since this sweep began",
                where=record["cohort"],
                rule="its trials would not be compared on the same scans",
                fix="choose another run=",
            )
        there, asked = (dict(flatten({"tune": c["sweep"], **c["default"]})) for c in (content, record))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"unreadable: {type(error).__name__} {error}", where=file) from error
    different = [key for key in sorted(there | asked) if there.get(key) != asked.get(key)]
    if different:
        raise RunMismatchError(
            "another sweep lives here",
            where=run,
            value="; ".join(f"{key}: {there.get(key)} there, {asked.get(key)} asked" for key in different[:3]),
            fix="take another run= directory, or repeat the command it was made with",
        )
