"""RUN/best: the best trial as a run directory of its own, swapped in whole.

best.yaml      what it sets: overrides of `distseg train`, and the command that trains it again
model/         what predict, evaluate and label need
config.yaml  metrics.jsonl  checkpoints/   as the trial left them: a run to branch from (train.init_from)
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distseg.config.compose import identity, train_config
from distseg.config.schema import TrainRunConfig
from distseg.work.evaluation_folder import swap_folder
from distseg.work.tune_trials import Trial, Trials

_COPIED = ("config.yaml", "metrics.jsonl", "checkpoints", "model", "bank")


def write_best(trials: Trials, best: Trial) -> Path:
    """Write RUN/best, unless it is this trial's already (evaluations of it then stay). Returns its folder."""
    sweep = trials.sweep
    folder, source = sweep.run / "best", sweep.folder(best.run)
    text = _best_yaml(trials, best)
    if (folder / "best.yaml").is_file() and (folder / "best.yaml").read_text(encoding="utf-8") == text:
        return folder
    partial = sweep.run / ".best.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in _COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, partial / name, ignore=shutil.ignore_patterns(".*"))
        elif (source / name).is_file():
            shutil.copy2(source / name, partial / name)
    (partial / "best.yaml").write_text(text, encoding="utf-8")
    swap_folder(partial, folder)
    return folder


def _best_yaml(trials: Trials, best: Trial) -> str:
    config = trials.sweep.config_of(best.run, best.values)
    overrides = overrides_of(config)
    head = [
        f"# Trial {best.name}: {trials.sweep.settings.objective} {trials.value(best):.4f}. Overrides of distseg train:",
        f"#   {command(config, overrides)}",
        f"# or distseg.train(cohort=, run=, method={config.method.name!r}, preset={config.preset!r}, overrides=these)",
    ]
    if best.run != best.name:
        head.append("# PBT changed its values on the way: these are the last ones, not all that made this model.")
    return "\n".join(head) + "\n" + yaml.safe_dump(overrides, sort_keys=False)


def overrides_of(config: TrainRunConfig) -> dict[str, Any]:
    """Dotted keys by which `config` differs from its method and preset, but for what decides nothing about a run."""
    start = identity(train_config(cohort="", run="", method=config.method.name, preset=config.preset))
    return {key: value for key, value in identity(config).items() if key != "cohort" and start[key] != value}


def command(config: TrainRunConfig, overrides: Mapping[str, Any]) -> str:
    words = [f"cohort={config.cohort}", f"method={config.method.name}", f"preset={config.preset}"]
    words += [f"{key}={_word(value)}" for key, value in overrides.items()]
    return " ".join(["distseg train run=...", *map(shlex.quote, words)])


def _word(value: Any) -> str:
    """As the command line's grammar has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_word, value))}]" if isinstance(value, list) else str(value)
