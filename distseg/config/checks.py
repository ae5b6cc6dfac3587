"""Rules that schema fields share; each failure names key, value, rule and fix."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from distseg.errors import ConfigError


def require(condition: bool, key: str, value: object, rule: str, fix: str) -> None:
    if not condition:
        raise ConfigError("value not allowed", where=key, value=value, rule=f"must be {rule}", fix=fix)


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        fix = f"did you mean {key}={near[0]}?" if near else f"set {key}={allowed[0]}"
        raise ConfigError("unknown value", where=key, value=value, rule=f"one of {', '.join(allowed)}", fix=fix)


def at_least(key: str, value: float, least: float) -> None:
    require(value >= least, key, value, f"at least {least}", f"set {key}={least}")


def between(key: str, value: float, low: float, high: float) -> None:
    require(low <= value <= high, key, value, f"from {low} to {high}", f"set {key} within the range")


def at_least_one_of(key: str, value: int, total: int) -> None:
    require(1 <= value <= total, key, value, f"from 1 to {total}", f"set {key} within the range")
