"""Where a run starts from: nothing, its own newest checkpoint, or that of the run it branches from."""

from __future__ import annotations

import dataclasses

from distseg.config.schema import TrainRunConfig
from distseg.data.cohort import Cohort
from distseg.data.place import is_url, reachable
from distseg.errors import ConfigError
from distseg.training.checkpoint import Checkpoint, load_newest
from distseg.training.plan import Plan
from distseg.training.remote_run import readable_run, run_directory
from distseg.training.run import RunDirectory


def parent_plan(config: TrainRunConfig) -> Plan | None:
    """The plan of the run to branch from, if its network and classes fit."""
    if config.train.init_from is None:
        return None
    if is_url(config.train.init_from):
        reachable(config.train.init_from, key="train.init_from")  # told at once, not waited for
    with readable_run(config.train.init_from) as directory:
        parent = directory.stored()
    if parent is None:
        raise ConfigError(
            "no run to branch from", where="train.init_from", value=config.train.init_from, fix="train that run first"
        )
    theirs, ours = (dataclasses.asdict(c.network) for c in (parent.config, config))
    differences = [f"network.{key}: {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if differences:
        raise ConfigError(
            "the run to branch from has another network",
            where="train.init_from",
            value=config.train.init_from,
            rule=", ".join(differences),
            fix="use the same preset and network keys",
        )
    if run_directory(config.train.init_from).newest_step() == 0:
        raise _no_checkpoint(config)
    classes = tuple(Cohort.open(config.cohort).class_names)
    if parent.plan.class_names != classes:
        raise ConfigError(
            "the run to branch from has other classes",
            where="train.init_from",
            value=", ".join(parent.plan.class_names),
            rule=f"the cohort has {', '.join(classes)}",
        )
    wanted = config.data.spacing_mm
    if wanted is not None and tuple(wanted) != parent.plan.spacing_mm:
        raise ConfigError(
            "the run to branch from has another spacing",
            where="data.spacing_mm",
            value=wanted,
            rule=f"the parent's is {list(parent.plan.spacing_mm)}",
            fix="leave data.spacing_mm out",
        )
    return parent.plan


def where_it_left_off(config: TrainRunConfig, run: RunDirectory) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to start from and whether it is another run's (a branch), not this one's."""
    own = load_newest(run.checkpoints)
    if own is not None or config.train.init_from is None:
        return own, False
    with readable_run(config.train.init_from, checkpoint=True) as directory:
        parent = load_newest(directory.checkpoints)
    if parent is None:
        raise _no_checkpoint(config)
    return parent, True


def _no_checkpoint(config: TrainRunConfig) -> ConfigError:
    return ConfigError(
        "the run to branch from has no checkpoint",
        where="train.init_from",
        value=config.train.init_from,
        fix="let that run reach its end first",
    )
