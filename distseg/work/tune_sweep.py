"""A sweep that may run: what every trial starts from, how often it is looked at, and the config of each.

RUN/tune.yaml          what this directory was made with
RUN/trials.jsonl       what was tried and what came of it, see work/tune_trials.py: the truth a sweep goes on from
RUN/trials/NAME/       a run directory a trial
RUN/warmup/            the run all trials branch from, where there is one
RUN/best/              see work/tune_best.py
RUN/trials.csv  report.html  figures/
RUN/ray/               Ray's own; may be deleted
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distseg.config.compose import RECIPE, with_overrides
from distseg.config.schema import TrainRunConfig
from distseg.config.spaces import Space
from distseg.config.verbs import OBJECTIVES, TuneConfig, TuneRunConfig
from distseg.errors import ConfigError
from distseg.methods import passes_a_slot

DEFAULT = "default"  # the trial of the configuration as it stands
MIN_PATCHES = 8


@dataclass(frozen=True)
class Sweep:
    """Travels to workers, so it holds configs and no data. `base` is what a trial's values are set on."""

    run: Path
    space: Space
    base: TrainRunConfig
    settings: TuneConfig  # scheduler, runner and trials decided
    warmup: TrainRunConfig | None

    @property
    def steps(self) -> int:
        return self.base.train.steps

    @property
    def every(self) -> int:
        """Steps from look to look."""
        return self.base.train.validate_every_steps or self.steps

    @property
    def best_is_max(self) -> bool:
        return OBJECTIVES[self.settings.objective] == "max"

    @property
    def trials(self) -> int:
        assert self.settings.trials is not None, "decided when the sweep was prepared"
        return self.settings.trials

    def folder(self, run: str) -> Path:
        return self.run / "trials" / run

    def config_of(self, run: str, values: Mapping[str, Any]) -> TrainRunConfig:
        """The config of the run directory `run`. Raises ConfigError for values the schema does not allow."""
        return dataclasses.replace(with_overrides(self.base, values), run=str(self.folder(run)))

    def default_values(self) -> dict[str, Any]:
        """What the configuration as it stands has for the swept keys that count there."""
        values: dict[str, Any] = {}
        for parameter in self.space.parameters:
            node: Any = self.base
            for name in parameter.key.split("."):
                node = getattr(node, name)
            if parameter.is_active(values):
                values[parameter.key] = node
        return values


def train_part(config: TuneRunConfig) -> TrainRunConfig:
    """The configuration as `distseg train` would have it."""
    names = [field.name for field in dataclasses.fields(TrainRunConfig)]
    return TrainRunConfig(**{name: getattr(config, name) for name in names})


def make_base(config: TuneRunConfig, settings: TuneConfig, *, passes: float, warmup_steps: int) -> TrainRunConfig:
    """The command line's config with a trial's looks, checkpoints and start. `passes`: of the cheapest trial's step."""
    train, checkpoint, optimizer = config.train, config.checkpoint, config.optimizer
    every = math.ceil(train.steps / settings.looks)
    saved = min(every, checkpoint.every_steps)
    every = saved * (every // saved)  # a look is kept by a checkpoint at the same step
    looks = math.ceil(train.steps / every)
    patches = _patches(config, settings, looks=looks, passes=passes)
    if warmup_steps:
        train = dataclasses.replace(train, init_from=str(Path(config.run) / "warmup"))
        optimizer = _one_schedule(config, warmup_steps)
    keep = looks + 1 if settings.scheduler == "pbt" else checkpoint.keep  # any look may be taken over from
    return dataclasses.replace(
        train_part(config),
        run="",
        train=dataclasses.replace(train, validate_every_steps=every, validation_patches=patches),
        # None by the clock: it would push a look's out of those that are kept.
        checkpoint=dataclasses.replace(checkpoint, every_steps=saved, every_minutes=None, keep=keep),
        optimizer=optimizer,
        logging=dataclasses.replace(config.logging, progress=False),
    )


def make_warmup(config: TuneRunConfig, steps: int) -> TrainRunConfig | None:
    """The supervised run that all trials branch from; None where `steps` is 0."""
    if not steps:
        return None
    start = with_overrides(train_part(config), {"method.name": "supervised"})
    return dataclasses.replace(
        start,
        run=str(Path(config.run) / "warmup"),
        train=dataclasses.replace(start.train, steps=steps, select="last", init_from=None),
        optimizer=_one_schedule(config, steps),
    )


def warmup_steps_of(config: TuneRunConfig, space: Space) -> tuple[int, str | None]:
    """How many, and what to say of it where that was left to us. Raises ConfigError where the space rules it out."""
    asked, recipe = config.tune.warmup_steps, swept_recipe_keys(space)
    if config.train.init_from is not None:
        if asked:
            raise ConfigError(
                "trials cannot branch from two runs",
                where="tune.warmup_steps",
                value=asked,
                fix="leave it or train.init_from out",
            )
        return 0, None
    if asked and recipe:
        raise ConfigError(
            "a shared warm-up, and the space changes what it would be trained with",
            where="tune.warmup_steps",
            value=asked,
            rule=f"{recipe[0]} is part of the recipe",
            fix="set tune.warmup_steps=0, or take the key out of the space",
        )
    if asked is not None:
        return asked, None
    if config.method.name == "supervised":
        return 0, None
    if recipe:
        return 0, f"no shared warm-up: {recipe[0]} is part of the recipe, so every trial starts from scratch"
    steps = config.train.steps
    return steps, f"trials branch from {steps} supervised steps, trained once (tune.warmup_steps chooses)"


def swept_recipe_keys(space: Space) -> Sequence[str]:
    return [key for key in space.keys if key.split(".")[0] in RECIPE]


def _one_schedule(config: TuneRunConfig, warmup_steps: int) -> Any:
    """One learning-rate schedule over warm-up and trial."""
    length = config.optimizer.schedule_steps or warmup_steps + config.train.steps
    return dataclasses.replace(config.optimizer, schedule_steps=length)


def _patches(config: TuneRunConfig, settings: TuneConfig, *, looks: int, passes: float) -> int:
    """Validation patches of a look, as many as asked for or as tune.validation_share allows."""
    training = config.train.steps * config.train.batch_size * passes
    share = settings.validation_share
    most = math.floor(training * share / (1 - share) / looks) if share < 1 else config.train.validation_patches
    patches = min(config.train.validation_patches, most)
    if patches < min(MIN_PATCHES, config.train.validation_patches):
        raise ConfigError(
            "trials too short to look at",
            where="tune.validation_share",
            value=share,
            rule=f"{looks} looks of {MIN_PATCHES} patches are more than that share of {config.train.steps} steps",
            fix="raise tune.validation_share or train.steps, or lower tune.looks",
        )
    return patches


def cheapest_passes(configs: Sequence[TrainRunConfig]) -> float:
    return min(passes_a_slot(config) for config in configs)
