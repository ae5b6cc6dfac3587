"""What `distseg tune` tries: a YAML file that names keys of `distseg train` and their values, parsed strictly.

    description: one line
    parameters:
      method.threshold: {choice: [paper, fixed, quantile]}
      method.threshold_value: {uniform: [0.5, 1.0], when: {method.threshold: [fixed, quantile]}}
      method.weight_ua: {loguniform: [0.03, 3.0]}
      references.k: {uniform: [4, 32], step: 4}       bounds are part of it; whole where the key is
      augment.flip: {grid: [none, left_right]}        every value equally often, in turn

A key with `when` is tried only where the keys it names, further up, have one of those values; elsewhere it keeps the
command line's. Spaces that ship are conf/space/NAME.yaml.
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distseg.config.compose import flatten, to_plain
from distseg.config.schema import TrainRunConfig
from distseg.config.yaml_sections import Section, mapping_of, read_yaml
from distseg.errors import ConfigError

# Keys of `distseg train` that are not swept, and what to use instead.
_OWNED = {
    "cohort": "cohort=", "run": "run=", "launcher": "launcher=", "resources": "resources=", "logging": "logging=",
    "checkpoint": "checkpoint=", "preset": "preset=", "method.name": "distseg benchmark, which compares methods",
    "dry_run": "dry_run=", "postprocess": "postprocess=, which no look at validation patches sees",
    "data.memory_gib": "data.memory_gib=", "matching.device": "matching.device=",
    "matching.placement": "matching.placement=", "train.skips_in_a_row": "train.skips_in_a_row=",
    "train.worker_timeout_s": "train.worker_timeout_s=",
    "train.steps": "train.steps=", "train.init_from": "train.init_from= or tune.warmup_steps=",
    "train.select": "train.select=", "train.validate_every_steps": "tune.looks=",
    "train.validation_patches": "train.validation_patches=", "train.threads": "train.threads=",
    "train.profile": "train.profile=", "train.diagnostics": "train.diagnostics=",
}  # fmt: skip
_KINDS = ("uniform", "loguniform", "choice", "grid")
_DIGITS = 4  # significant ones of a drawn number
_DIGITS_OF_STEPS = 12  # of one on a grid: 3 x 0.1 is 0.3 again
_OFF_GRID = 1e-6  # of a step


@dataclass(frozen=True)
class Parameter:
    """One swept key. `values` of choice and grid; `low`, `high` (both possible) and `step` of the others."""

    key: str
    kind: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 1.0
    step: float | None = None
    whole: bool = False
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def is_listed(self) -> bool:
        return self.kind in ("choice", "grid")

    def at(self, unit: float) -> Any:
        """The value at `unit` in [0, 1): a uniform draw of it is a draw of the parameter."""
        if self.is_listed:
            return self.values[int(unit * len(self.values))]
        if self.kind == "loguniform":
            high = self.high + 1 if self.whole else self.high
            drawn = math.exp(math.log(self.low) + unit * (math.log(high) - math.log(self.low)))
            return self.nearest(math.floor(drawn) if self.whole else drawn)
        step = self.step or (1.0 if self.whole else None)
        if step is None:
            return self.nearest(self.low + unit * (self.high - self.low))
        return self.nearest(self.low + step * int(unit * (self._steps(step) + 1)))

    def nearest(self, value: float) -> float:
        """`value` within bounds, on the step's grid where there is one, in few digits elsewhere."""
        value = min(max(value, self.low), self.high)
        if self.step is not None:
            count = min(round((value - self.low) / self.step), self._steps(self.step))
            value = float(f"{self.low + self.step * count:.{_DIGITS_OF_STEPS}g}")
        elif not self.whole:
            value = float(f"{value:.{_DIGITS}g}")
        return round(value) if self.whole else float(min(max(value, self.low), self.high))

    def _steps(self, step: float) -> int:
        """How many of them fit between the bounds: the last value is so many above the first."""
        return math.floor((self.high - self.low) / step + _OFF_GRID)

    def unit(self, value: Any) -> float | None:
        """Where `value` lies between the ends: 0 to 1, outside them where a range does not reach it. None where it has
        no place: what a list does not have, and a default of null beside a range."""
        if self.is_listed:
            return self.values.index(value) / max(1, len(self.values) - 1) if self.holds(value) else None
        if not _is_number(value):
            return None
        if self.kind == "loguniform":
            return math.log(max(value, 1e-12) / self.low) / math.log(self.high / self.low)
        return (float(value) - self.low) / (self.high - self.low)

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of the parameter's: of a range with steps, on their grid."""
        if self.is_listed:
            return any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in self.values)
        if not _is_number(value) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step is not None else 0.0
        return bool(abs(steps - round(steps)) < _OFF_GRID)

    def ends(self) -> tuple[Any, ...]:
        """Its extreme values, or all of a list."""
        return self.values if self.is_listed else (self.nearest(self.low), self.nearest(self.high))

    def is_active(self, chosen: Mapping[str, Any]) -> bool:
        """Whether it is tried beside the values chosen for the parameters further up."""
        return all(key in chosen and chosen[key] in allowed for key, allowed in self.when.items())


@dataclass(frozen=True)
class Space:
    """A parsed space; a parameter comes after those its `when` names."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(parameter.key for parameter in self.parameters)

    def content(self) -> dict[str, Any]:
        """What decides which values are tried, as plain values."""
        return {
            p.key: {
                p.kind: list(p.values) if p.is_listed else [p.low, p.high],
                **({"step": p.step} if p.step is not None else {}),
                **({"when": {key: list(values) for key, values in p.when.items()}} if p.when else {}),
            }
            for p in self.parameters
        }

    def active(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """`chosen` without what its other values make moot."""
        kept: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.key in chosen and parameter.is_active(kept):
                kept[parameter.key] = chosen[parameter.key]
        return kept


def space_folder() -> Path:
    """conf/space as shipped in the wheel (distseg/conf), or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf" / "space", package.parent / "conf" / "space"):
        if folder.is_dir():
            return folder
    raise ConfigError("conf/space is not where it was installed", where=package, fix="install distseg again")


def load_space(space: str) -> Space:
    """A shipped space by name, or a YAML file by path. Raises ConfigError naming key, value and rule."""
    shipped = {file.stem: file for file in sorted(space_folder().glob("*.yaml"))}
    if space in shipped:
        return parse_space(space, read_yaml(shipped[space], key="space"))
    path = Path(space)
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(space, shipped, n=1)
        fix = f"did you mean space={near[0]}?" if near else "give one of these names or the path of a .yaml file"
        raise ConfigError("unknown space", where="space", value=space, rule=f"one of {', '.join(shipped)}", fix=fix)
    return parse_space(path.stem, read_yaml(path, key="space"))


def parse_space(name: str, content: object) -> Space:
    """Check the content of a space's YAML and give it types. Raises ConfigError."""
    where = f"space {name}"
    if content is None or content == {}:
        raise ConfigError("an empty space", where=where, rule="a space names at least one key under parameters")
    top = Section(content, where, ("description", "parameters"))
    parameters: list[Parameter] = []
    for key, entry in top.mapping("parameters").items():
        parameters.append(_parameter(str(key), entry, where, before=parameters))
    return Space(name, top.value("description", str, default=""), tuple(parameters))


def _parameter(key: str, content: object, where: str, *, before: Sequence[Parameter]) -> Parameter:
    kind_of_key = _type_of(key, where)
    where = f"{where}: {key}"
    section = Section(content, where, (*_KINDS, "step", "when"))
    given = [kind for kind in _KINDS if kind in mapping_of(content, where)]
    if len(given) != 1:
        rule = f"exactly one of {', '.join(_KINDS)}"
        raise ConfigError("says not which values", where=where, value=", ".join(given) or None, rule=rule)
    kind = given[0]
    when = _conditions(section, before)
    entries: list[Any] = section.value(kind, list, default=None)
    if kind in ("choice", "grid"):
        if section.value("step", (int, float, type(None)), default=None) is not None:
            raise ConfigError("a list has no step", where=where, fix="take step out")
        if len(entries) < 2 or any(entries.count(entry) > 1 for entry in entries):
            raise ConfigError("needs two values or more, each once", where=f"{where}: {kind}", value=entries)
        return Parameter(key, kind, values=tuple(_cast(entry, kind_of_key) for entry in entries), when=when)
    if kind_of_key not in (int, float):
        rule = f"a range needs a number, {key} is {getattr(kind_of_key, '__name__', 'no number')}"
        raise ConfigError("not a range", where=f"{where}: {kind}", value=entries, rule=rule, fix="list its values")
    low, high, step = _range(section, kind, entries, whole=kind_of_key is int)
    return Parameter(key, kind, low=low, high=high, step=step, whole=kind_of_key is int, when=when)


def _range(section: Section, kind: str, entries: Sequence[Any], *, whole: bool) -> tuple[float, float, float | None]:
    where = f"{section.where}: {kind}"
    number = int if whole else (int, float)
    for entry in entries:
        if not isinstance(entry, number) or isinstance(entry, bool):
            rule = "whole numbers" if whole else "numbers; YAML reads 1.0e-3 as one, 1e-3 as text"
            raise ConfigError("bounds of something else", where=where, value=entry, rule=rule)
    if len(entries) != 2 or not entries[0] < entries[1]:
        raise ConfigError("not two bounds, the lower first", where=where, value=list(entries))
    if kind == "loguniform" and entries[0] <= 0:
        rule = "above 0: a logarithm is taken"
        raise ConfigError("bound not allowed", where=where, value=entries[0], rule=rule, fix="use uniform or choice")
    step = section.value("step", (int, float, type(None)), default=None)
    if step is None:
        return entries[0], entries[1], None
    if kind == "loguniform":
        raise ConfigError("steps are of uniform", where=f"{section.where}: step", value=step, fix="take step out")
    if not 0 < step <= entries[1] - entries[0] or (whole and not isinstance(step, int)):
        rule = "above 0, no more than the range, whole where the key is"
        raise ConfigError("step not allowed", where=f"{section.where}: step", value=step, rule=rule)
    return entries[0], entries[1], step


def _conditions(section: Section, before: Sequence[Parameter]) -> dict[str, tuple[Any, ...]]:
    """`when`, whose keys are listed parameters further up and whose values are theirs."""
    listed = {parameter.key: parameter for parameter in before if parameter.is_listed}
    conditions = {}
    for key, value in section.mapping("when", optional=True).items():
        where = f"{section.where}: when.{key}"
        if key not in listed:
            rule = "a key further up in this space with choice or grid"
            raise ConfigError("depends on what is not chosen", where=where, rule=rule)
        is_one = listed[key].holds(value) or not isinstance(value, list)  # a list may be a value itself
        allowed = (value,) if is_one else tuple(value)
        unknown = [entry for entry in allowed if not listed[key].holds(entry)]
        if unknown or not allowed:
            rule = f"one or more of {', '.join(map(str, listed[key].values))}"
            raise ConfigError("not a value of that key", where=where, value=unknown, rule=rule)
        conditions[key] = allowed
    return conditions


def _type_of(key: str, where: str) -> Any:
    """The schema's type of a dotted key of `distseg train`, without its None. Raises ConfigError."""
    owned = next((word for owner, word in _OWNED.items() if key == owner or key.startswith(f"{owner}.")), None)
    if owned is not None:
        raise ConfigError("not swept", where=f"{where}: {key}", fix=f"use {owned}")
    known = [name for name, _ in flatten(to_plain(TrainRunConfig()))]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        fix = f"did you mean {near[0]}?" if near else "distseg train --help lists the keys"
        raise ConfigError("distseg train has no such key", where=f"{where}: {key}", fix=fix)
    kind: Any = TrainRunConfig
    for name in key.split("."):
        kind = typing.get_type_hints(kind)[name]
    choices = [option for option in typing.get_args(kind) if option is not type(None)]
    return choices[0] if type(None) in typing.get_args(kind) and len(choices) == 1 else kind


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cast(value: Any, kind: Any) -> Any:
    """A whole number given for a float is that float, as the schema would make it."""
    if isinstance(value, list):
        entry = next(iter(typing.get_args(kind)), None)
        return [_cast(one, entry) for one in value]
    return float(value) if kind is float and _is_number(value) else value
