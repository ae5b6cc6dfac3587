"""The label counts of a suite: which labels train, under a name.

4: [ids]                        these scans
10: {subset_seed: 0}            as many as the name says, drawn from the cohort
all: all                        every labelled training scan
50_patches: {patches: 50, of: 4}    of the scans of another subset (default: of all), that many labelled patches
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distseg.config.yaml_sections import Section
from distseg.errors import ConfigError

Name = int | str  # a number of scans, or a word
ALL = "all"
_WORD = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9]+([_\-][A-Za-z0-9]+)*")  # in a folder's name "__" parts the fields


@dataclass(frozen=True)
class Subset:
    """Labelled training scans: `ids`; or as many as its name says, drawn with `subset_seed`; or `every` one; or those
    `of` another subset. `patches`: how many patches of them are labelled, None: all of it."""

    ids: tuple[str, ...] | None = None
    subset_seed: int | None = None
    every: bool = False
    of: Name | None = None
    patches: int | None = None

    def content(self) -> dict[str, Any]:
        """As plain values; the last three only where they say something, so that older suites keep their hash."""
        plain: dict[str, Any] = {"ids": self.ids, "subset_seed": self.subset_seed}
        more = {"every": self.every, "of": self.of, "patches": self.patches}
        return {**plain, **{key: value for key, value in more.items() if value}}

    def title(self, name: Name) -> str:
        """In words, e.g. "4 labelled scans"."""
        if self.patches is not None:
            scans = (
                f"{self.of} scan{'s' if self.of != 1 else ''}"
                if isinstance(self.of, int)
                else f"{self.of or ALL} scans"
            )
            return f"{self.patches} labelled patches of {scans}"
        return f"{name} labelled scan{'s' if name != 1 else ''}"


def parse_subsets(content: Mapping[Any, Any], where: str) -> dict[Name, Subset]:
    """By name. Raises ConfigError."""
    subsets = {_name(name, where): _subset(name, value, where) for name, value in content.items()}
    for name, subset in subsets.items():
        if subset.of is not None and (subset.of not in subsets or subsets[subset.of].patches is not None):
            raise ConfigError(
                "names no subset of whole scans",
                where=f"{where}: subsets.{name}.of",
                value=subset.of,
                rule=f"one of {', '.join(str(n) for n, s in subsets.items() if s.patches is None)}",
            )
    return subsets


def _name(name: object, where: str) -> Name:
    if isinstance(name, int) and not isinstance(name, bool):
        if name < 1:
            rule = "a subset is named by its number of labelled scans, at least 1"
            raise ConfigError("too few labelled scans", where=f"{where}: subsets", value=name, rule=rule)
        return name
    if isinstance(name, str) and _WORD.fullmatch(name):
        return name
    rule = "a number of scans, or a word of letters, digits and single _ or - between them"
    raise ConfigError("not a subset's name", where=f"{where}: subsets", value=name, rule=rule)


def _subset(name: object, content: object, where: str) -> Subset:
    where = f"{where}: subsets.{name}"
    if content == ALL:
        return Subset(every=True)
    if isinstance(content, list):
        ids = tuple(str(scan) for scan in content)
        if isinstance(name, int) and len(set(ids)) != name:
            raise ConfigError("another number of scans than its name says", where=where, value=len(set(ids)))
        return Subset(ids=ids)
    section = Section(content, where, ("subset_seed", "patches", "of"))
    patches = section.value("patches", (int, type(None)), default=None)
    if patches is not None:
        return Subset(patches=section.positive("patches"), of=section.value("of", (int, str, type(None)), default=None))
    if not isinstance(name, int):
        rule = f"a list of ids, {ALL}, or patches: N; to draw scans, name the subset by their number"
        raise ConfigError("says not which scans are labelled", where=where, rule=rule)
    return Subset(subset_seed=section.value("subset_seed", int, default=0))
