"""The verbs of the command line as data: summary, schema, what to call, what to print; and checks of `key=value` words.

Knows neither Hydra nor OmegaConf: `cli` hands it parsed overrides. Path values are taken verbatim, whatever they hold.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distseg.config.quoting import omegaconf_escaped
from distseg.config.verbs import SHORT_KEYS
from distseg.errors import ConfigError, InputError

# Values that are paths or ids: taken as typed, never parsed as numbers, lists, sweeps or interpolations.
VERBATIM_KEYS = frozenset(
    (
        "cohort", "run", "source", "input", "output", "train.init_from", "data.pseudo_labels",
        "scan", "name",
        "suite", "cells_from", "storage", "tune.space", "logging.mlflow", "logging.wandb",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Override:
    """One parsed `key=value`; `values` has one entry, several in a sweep, None for a sweep over a range."""

    key: str
    values: Sequence[Any] | None
    is_sweep: bool = False
    is_delete: bool = False


@dataclass(frozen=True)
class Verb:
    name: str
    summary: str
    schema_name: str
    show: Callable[[Any, Any], None]

    @property
    def takes_groups(self) -> bool:
        """Whether method=, preset= and matching= choose values for it."""
        return self.name in ("train", "tune")

    def schema(self) -> type[Any]:
        from distseg.config import verbs  # train's own among them

        kind: type[Any] = getattr(verbs, self.schema_name)
        return kind

    def call(self, config: Any) -> None:
        from distseg import api

        self.show(config, getattr(api, f"{self.name}_from_config")(config))

    def all_keys(self) -> list[str]:
        """Dotted keys of the schema, and the names of their sections."""
        from distseg.config.compose import flatten, to_plain

        leaves = [key for key, _ in flatten(to_plain(self.schema()()))]
        sections = {key[:end] for key in leaves for end in range(len(key)) if key[end] == "."}
        return [*leaves, *sorted(sections)]

    @staticmethod
    def named(name: str) -> Verb:
        if name in VERBS:
            return VERBS[name]
        near = difflib.get_close_matches(name, VERBS, n=1)
        fix = f"did you mean distseg {near[0]}?" if near else "distseg --help describes them"
        raise ConfigError("unknown verb", where=name, rule=f"one of {', '.join(VERBS)}", fix=fix)


def usage() -> str:
    lines = ["distseg VERB [key=value ...]", ""]
    lines += [f"  {verb.name:<10} {verb.summary}" for verb in VERBS.values()]
    lines += [
        "",
        "distseg VERB --help lists a verb's keys, --cfg job the composed configuration, --multirun sweeps key=a,b.",
        'Completion: eval "$(distseg -sc install=bash)". Full tracebacks: DISTSEG_TRACEBACK=1.',
    ]
    return "\n".join(lines)


def help_template(verb: Verb) -> str:
    """What `distseg VERB --help` prints; Hydra fills in $CONFIG."""
    groups = _choices() if verb.takes_groups else {}
    chooses = [f"  {group}={'|'.join(names)}" for group, names in groups.items()]
    lines = [f"distseg {verb.name} [key=value ...]: {verb.summary}", ""]
    lines += ["Groups, each a set of values for the keys below", *chooses, ""] if chooses else []
    lines += [
        "Keys and their defaults (??? must be given)",
        "",
        "$CONFIG",
        "Set any of them with key=value, lists as key=[3,4,4]. Paths are taken as they are.",
        "--cfg job shows the composed configuration, --multirun sweeps key=a,b, --hydra-help explains the rest.",
    ]
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


# --- what was typed ------------------------------------------------------------------------------------------------


def literal_override(argument: str) -> str:
    """Quote the value of a verbatim key, so that Hydra's grammar and OmegaConf's interpolation leave it alone; and
    write a short key out."""
    key, equals, value = argument.partition("=")
    if equals and key in SHORT_KEYS:
        key = SHORT_KEYS[key]
    if not equals or key.lstrip("+") not in VERBATIM_KEYS:
        return argument
    return f"{key}='{_hydra_quoted(omegaconf_escaped(value))}'"


def _hydra_quoted(value: str) -> str:
    """Backslashes count only before a quote, the closing one included: doubled there, the quote escaped."""
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    return re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)


def check_overrides(verb: Verb, overrides: Sequence[Override]) -> Sequence[Override]:
    """Raise ConfigError for a key the verb does not have, or a group's choice that does not exist."""
    keys = verb.all_keys()
    choices = _choices() if verb.takes_groups else {}
    for override in overrides:
        if re.match(r"hydra[./]|hydra$", override.key):
            continue
        if override.key in choices and override.values is not None and not override.is_delete:
            _check_choices(override.key, override.values, choices[override.key])
        elif override.key not in keys:
            near = nearest_key(override.key, keys)
            fix = f"did you mean {near}=...?" if near else f"distseg {verb.name} --help lists the keys"
            raise ConfigError(f"distseg {verb.name} has no such key", where=override.key, fix=fix)
    return overrides


def _choices() -> dict[str, list[str]]:
    from distseg.config.presets import MATCHINGS, METHODS, PRESETS

    return {"method": list(METHODS), "preset": list(PRESETS), "matching": list(MATCHINGS)}


def _check_choices(group: str, values: Iterable[Any], choices: list[str]) -> None:
    from distseg.config.checks import one_of

    for value in values:
        if (value is None and group == "matching") or isinstance(value, dict):
            continue  # matching=null leaves it to the method; a mapping sets keys of the section
        one_of(group, str(value), choices)


def nearest_key(key: str, keys: Sequence[str]) -> str | None:
    """The key meant: one that ends the same (`steps` for `train.steps`), else the most alike."""
    last = key.rsplit(".", 1)[-1]
    same = [candidate for candidate in keys if candidate.rsplit(".", 1)[-1] == last]
    if same:
        return same[0]
    close = difflib.get_close_matches(key, keys, n=1)
    if close:
        return close[0]
    by_last = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(keys)}
    close = difflib.get_close_matches(last, by_last, n=1)
    return by_last[close[0]] if close else None


def complete_verb(line: str) -> list[str] | None:
    """The verbs that continue the command line, or None once the verb is complete."""
    words = line.split(" ")
    if len(words) > 2:
        return None
    begun = words[1] if len(words) == 2 else ""
    return [name for name in VERBS if name.startswith(begun)]


# --- what is printed -----------------------------------------------------------------------------------------------


def _show_nothing(_config: Any, _result: Any) -> None:
    """The verb prints its own results as they come."""


def _show_ingest(_config: Any, report: Any) -> None:
    print(f"{report.cohort}: {len(report.added)} scans added, {len(report.skipped)} already there")


def _show_cohort(config: Any, report: Any) -> None:
    from distseg.work.cohort_actions import holds, list_cohort

    if config.action != "list":
        print(holds(config.cohort, len(report.records), report.dropped))
        return
    print(list_cohort(config.cohort), end="")


def _show_train(config: Any, result: Any) -> None:
    if config.dry_run:
        print("\n".join(result.lines()))
        return
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks
        print(f"{result.run}: trained to step {result.steps}")


def _show_evaluate(config: Any, metrics: Any) -> None:
    print(f"{config.run}: {metrics['split']}, {metrics['scans']} scans")
    for name, values in metrics["classes"].items():
        means = "  ".join(
            f"{label} {_figure(values[key]['mean'])}"
            for key, label in (("iou", "IoU"), ("dice", "Dice"), ("hd95_mm", "HD95 mm"), ("asd_mm", "ASD mm"))
        )
        print(f"{name}: {means}  missed {values['missed']}")
    print(f"report: {config.run}/evaluation/{config.name or config.split}/report.html")


def _figure(mean: float | None) -> str:
    """A dash where no scan of the split counts for the class."""
    return "-" if mean is None else f"{mean:.3f}"


def _show_label(config: Any, report: Any) -> None:
    if config.dry_run:
        print(report)
        return
    print(f"{report.output}: {report.labelled} scans labelled, {report.done_before} done before")
    print(f"review: {report.output}/review.html")


def _show_predict(config: Any, report: Any) -> None:
    print(f"{config.output}: {len(report.written)} masks written")


def _show_export(_config: Any, report: Any) -> None:
    print(f"{report.path}: logits read back differ by {report.largest_difference:.1g} at most")


def _show_doctor(_config: Any, findings: Any) -> None:
    """A line as each check ends; failures make the exit code 2."""
    failed = []
    for finding in findings:
        print(finding.line(), flush=True)
        failed += [finding.check] if finding.level == "fail" else []
    if failed:
        raise InputError(f"{len(failed)} checks failed", where="doctor", value=", ".join(failed))


VERBS = {
    verb.name: verb
    for verb in (
        Verb("demo", "the main job on synthetic hips: ingest, train on 2 Ray workers, evaluate, report", "DemoConfig",
             _show_nothing),
        Verb("ingest", "images (+ labels) -> cohort store, in parallel", "IngestConfig", _show_ingest),
        Verb("cohort", "list, remove, repair", "CohortConfig", _show_cohort),
        Verb("train", "one run; the same command again resumes", "TrainRunConfig", _show_train),
        Verb("evaluate", "IoU, Dice, HD95 and ASD on a split, and a report", "EvaluateConfig", _show_evaluate),
        Verb("predict", "one file or folder -> masks in the input's own grid", "PredictConfig", _show_predict),
        Verb("tune", "a sweep of thresholds, weights or any key of train -> the best model, a table, a report",
             "TuneRunConfig", _show_nothing),
        Verb("label", "masks for every scan of a cohort, once, and which to distrust", "LabelConfig", _show_label),
        Verb("benchmark", "a suite of methods x label counts x seeds -> tables and figure", "BenchmarkConfig",
             _show_nothing),
        Verb("export", "a run -> MONAI bundle, ONNX or TorchScript", "ExportConfig", _show_export),
        Verb("doctor", "checks this machine or cluster: ok, warn or fail, one line each", "DoctorConfig", _show_doctor),
    )
}  # fmt: skip
