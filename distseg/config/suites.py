"""What `distseg benchmark` runs: a YAML file of methods x label counts x seeds under one recipe, parsed strictly.

    description: one line
    like: protocol_c                                a shipped suite's keys under these; common and subsets are joined
    preset: small
    common: {data.spacing_mm: [3, 4, 4], ...}       keys of `distseg train` that every row shares: the recipe
    phase_a: {method: supervised, steps: 600}       once per (seed, subset); every row branches from it
    phase_b: {steps: 400}                           of each row; the lr schedule is one over A + B
    rows: {NAME: {method: uamt, matching: ..., overrides: {method.passes: 4}}, ...}
    subsets: {4: [ids], 10: {subset_seed: 0}}       which labels train, see config/subsets.py
    labelled: [4]                                   which subsets run; default all
    seeds: [0, 1, 2]
    compare: [rows]  against: [rows]                the paired tests; default: the last row against all others, []: none
    evaluate: {split: val, overlap: 0.25, network: student, phase_a: false}

Suites that ship are conf/suites/NAME.yaml. A folder `suite` would be a Hydra group, and `suite=` no longer a key.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distseg.config.checks import one_of
from distseg.config.compose import flatten, to_plain
from distseg.config.presets import MATCHINGS, METHODS, PRESETS
from distseg.config.schema import TrainRunConfig
from distseg.config.subsets import Name, Subset, parse_subsets
from distseg.config.verbs import EvaluateConfig
from distseg.config.yaml_sections import Section, mapping_of, read_yaml
from distseg.errors import ConfigError

PHASE_A = "phase_a"  # its name among the rows

# Keys of `distseg train` that a suite sets by its own words, so neither `common` nor a row may.
_OWNED = {
    "cohort": "cohort=", "run": "run=", "launcher": "launcher=", "resources": "resources=", "logging": "logging=",
    "seed": "seeds", "preset": "preset", "method.name": "method", "train.steps": "phase_a.steps and phase_b.steps",
    "train.init_from": "phase_a", "optimizer.schedule_steps": "phase_a.steps + phase_b.steps",
    "data.labeled_scans": "subsets", "data.labeled_ids": "subsets", "data.subset_seed": "subsets",
    "data.labeled_patches": "subsets",
}  # fmt: skip
_ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-]*(_[A-Za-z0-9.\-]+)*")  # a folder's name; "__" parts its fields


@dataclass(frozen=True)
class Row:
    """One line of the table: a method and what it changes about itself. `overrides` are dotted keys."""

    name: str
    method: str
    matching: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A parsed suite. `labelled` names the `subsets` that run; `compare` and `against` name rows."""

    name: str
    description: str
    preset: str
    common: Mapping[str, Any]
    phase_a: Row
    phase_a_steps: int
    phase_b_steps: int
    rows: tuple[Row, ...]
    subsets: Mapping[Name, Subset]
    labelled: tuple[Name, ...]
    seeds: tuple[int, ...]
    compare: tuple[str, ...]
    against: tuple[str, ...]
    split: str
    overlap: float
    network: str
    evaluate_phase_a: bool

    def content(self) -> dict[str, Any]:
        """What the suite is, as plain values: its name and description decide nothing."""
        plain = {**dataclasses.asdict(self), "subsets": {name: one.content() for name, one in self.subsets.items()}}
        kept = {key: value for key, value in plain.items() if key not in ("name", "description")}
        plain_json: dict[str, Any] = json.loads(json.dumps(kept))
        return plain_json

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]

    def select(
        self, *, rows: Sequence[str] | None, labelled: Sequence[Name] | None, seeds: Sequence[int] | None
    ) -> Suite:
        """The part of the suite to run now; None keeps what the suite says. Order is the suite's; `seeds` are any.

        Raises ConfigError for a row or subset that the suite does not have, seeds that are none, or an empty selection.
        """
        names = _chosen("rows", rows, [row.name for row in self.rows], [row.name for row in self.rows])
        return dataclasses.replace(
            self,
            rows=tuple(row for row in self.rows if row.name in names),
            labelled=_chosen("labelled", labelled, list(self.subsets), self.labelled),
            seeds=self.seeds if seeds is None else _distinct_seeds(seeds),
            compare=tuple(name for name in self.compare if name in names),
            against=tuple(name for name in self.against if name in names),
        )


def suite_folder() -> Path:
    """conf/suites as shipped in the wheel (distseg/conf), or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf" / "suites", package.parent / "conf" / "suites"):
        if folder.is_dir():
            return folder
    raise ConfigError("conf/suites is not where it was installed", where=package, fix="install distseg again")


def load_suite(suite: str) -> Suite:
    """A shipped suite by name, or a YAML file by path. Raises ConfigError naming key, value and rule."""
    shipped = _shipped()
    if suite in shipped:
        return parse_suite(suite, read_yaml(shipped[suite], key="suite"))
    path = Path(suite)
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(suite, shipped, n=1)
        fix = f"did you mean suite={near[0]}?" if near else "give one of these names or the path of a .yaml file"
        raise ConfigError("unknown suite", where="suite", value=suite, rule=f"one of {', '.join(shipped)}", fix=fix)
    return parse_suite(path.stem, read_yaml(path, key="suite"))


def _shipped() -> dict[str, Path]:
    return {file.stem: file for file in sorted(suite_folder().glob("*.yaml"))}


def parse_suite(name: str, content: object) -> Suite:
    """Check the content of a suite's YAML and give it types. Raises ConfigError."""
    top = Section(_with_base(content, f"suite {name}"), f"suite {name}", _TOP_KEYS)
    phase_a = top.section("phase_a", ("method", "matching", "overrides", "steps"))
    phase_b = top.section("phase_b", ("steps",))
    rows = tuple(_row(key, value, top.where) for key, value in top.mapping("rows").items())
    subsets = parse_subsets(top.mapping("subsets"), top.where)
    names = [row.name for row in rows]
    compare = top.strings("compare", default=names[-1:], may_be_empty=True)
    against = top.strings("against", default=[name for name in names if name not in compare], may_be_empty=True)
    for row_name in (*compare, *against):
        one_of(f"{top.where}: compare, against", row_name, names)
    evaluate = top.section("evaluate", ("split", "overlap", "network", "phase_a"), optional=True)
    checked = EvaluateConfig(  # its rules for network and overlap are ours
        run="",
        cohort="",
        split=evaluate.value("split", str, default="val"),
        overlap=float(evaluate.value("overlap", (float, int), default=0.25)),
        network=evaluate.value("network", str, default="student"),
    )
    preset = top.value("preset", str, default="small")
    one_of(f"{top.where}: preset", preset, tuple(PRESETS))
    labelled = top.names("labelled", default=list(subsets))
    return Suite(
        name=name,
        description=top.value("description", str, default=""),
        preset=preset,
        common=_train_keys(top.mapping("common", optional=True), f"{top.where}: common"),
        phase_a=_parsed_row(PHASE_A, phase_a),
        phase_a_steps=phase_a.positive("steps"),
        phase_b_steps=phase_b.positive("steps"),
        rows=rows,
        subsets=subsets,
        labelled=_chosen(f"{top.where}: labelled", labelled, list(subsets), ()),
        seeds=tuple(top.integers("seeds", default=None)),
        compare=tuple(compare),
        against=tuple(against),
        split=checked.split,
        overlap=checked.overlap,
        network=checked.network,
        evaluate_phase_a=evaluate.value("phase_a", bool, default=False),
    )


def _with_base(content: object, where: str) -> object:
    """`content` over the keys of the shipped suite that it names under `like`."""
    if not isinstance(content, Mapping) or "like" not in content:
        return content
    shipped = _shipped()
    base = content["like"]
    one_of(f"{where}: like", base, tuple(shipped))
    keys = mapping_of(read_yaml(shipped[base], key="suite"), f"suite {base}")
    if "like" in keys:
        raise ConfigError(
            "is itself like another suite", where=f"{where}: like", value=base, fix=f"name {keys['like']}"
        )
    own = {key: value for key, value in content.items() if key != "like"}
    for key in ("common", "subsets"):
        own[key] = {**mapping_of(keys.get(key, {}), f"suite {base}: {key}"), **_given(own, key, where)}
    dropped = ("description", *(("compare", "against") if "rows" in own else ()))  # those are about the other's rows
    return {**{key: value for key, value in keys.items() if key not in dropped}, **own}


def _given(content: Mapping[Any, Any], key: str, where: str) -> Mapping[Any, Any]:
    return mapping_of(content.get(key, {}), f"{where}: {key}")


_TOP_KEYS = (
    "description", "preset", "common", "phase_a", "phase_b", "rows", "subsets", "labelled", "seeds", "compare",
    "against", "evaluate",
)  # fmt: skip


def _row(name: object, content: object, where: str) -> Row:
    if not isinstance(name, str) or not _ROW_NAME.fullmatch(name) or name == PHASE_A:
        rule = f"letters, digits and single - . _ between them, not {PHASE_A}"
        raise ConfigError("not a row's name", where=f"{where}: rows", value=name, rule=rule)
    return _parsed_row(name, Section(content, f"{where}: rows.{name}", ("method", "matching", "overrides")))


def _parsed_row(name: str, section: Section) -> Row:
    method = section.value("method", str, default=None)
    one_of(f"{section.where}.method", method, tuple(METHODS))
    matching = section.value("matching", (str, type(None)), default=None)
    if matching is not None:
        one_of(f"{section.where}.matching", matching, tuple(MATCHINGS))
    overrides = _train_keys(section.mapping("overrides", optional=True), f"{section.where}.overrides")
    return Row(name, method, matching, overrides)


def _train_keys(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Dotted keys of `distseg train`; a nested mapping is taken for its dotted keys."""
    known = [key for key, _ in flatten(to_plain(TrainRunConfig()))]
    keys = dict(flatten(values))
    for key in keys:
        owned = next((word for owner, word in _OWNED.items() if key == owner or key.startswith(f"{owner}.")), None)
        if owned is not None:
            raise ConfigError("a suite sets this itself", where=f"{where}: {key}", fix=f"use {owned}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "distseg train --help lists the keys"
            raise ConfigError("distseg train has no such key", where=f"{where}: {key}", fix=fix)
    return keys


def _distinct_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError("not seeds", where="seeds", value=list(seeds), rule="one or more of 0, 1, 2, ..., each once")
    return tuple(seeds)


def _chosen(where: str, asked: Sequence[Any] | None, known: Iterable[Any], default: Sequence[Any]) -> tuple[Any, ...]:
    """`asked` in the order of `known`; the command line gives numbers as text."""
    if asked is None:
        return tuple(default)
    known, words = list(known), {str(value) for value in asked}
    unknown = [value for value in asked if str(value) not in {str(one) for one in known}]
    if unknown or not asked:
        rule = f"one or more of {', '.join(map(str, known))}"
        raise ConfigError("the suite has no such entry", where=where, value=unknown or "[]", rule=rule)
    return tuple(value for value in known if str(value) in words)
