"""Reading a user's YAML strictly: unknown keys, keys given twice and values of another type are one clear error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distseg.errors import ConfigError


class Section:
    """A mapping of the YAML whose keys are known; each getter checks the type of what it returns."""

    def __init__(self, content: object, where: str, keys: Sequence[str]) -> None:
        self.where = where
        self._values = mapping_of(content, where)
        for key in self._values:
            if key not in keys:
                near = difflib.get_close_matches(str(key), keys, n=1)
                fix = f"did you mean {near[0]}?" if near else None
                raise ConfigError("unknown key", where=where, value=key, rule=f"one of {', '.join(keys)}", fix=fix)

    def value(self, key: str, kind: type | tuple[type, ...], *, default: Any) -> Any:
        value = self._values.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            what = "key not given" if key not in self._values else "value of another type"
            rule = f"must be {' or '.join(k.__name__ for k in kinds)}"
            raise ConfigError(what, where=f"{self.where}: {key}", value=self._values.get(key), rule=rule)
        return value

    def positive(self, key: str) -> int:
        value: int = self.value(key, int, default=None)
        if value < 1:
            raise ConfigError("value not allowed", where=f"{self.where}: {key}", value=value, rule="at least 1")
        return value

    def mapping(self, key: str, *, optional: bool = False) -> Mapping[Any, Any]:
        found = mapping_of(self._values.get(key, {}), f"{self.where}: {key}")
        if not found and not optional:
            raise ConfigError("needs at least one entry", where=f"{self.where}: {key}")
        return found

    def section(self, key: str, keys: Sequence[str], *, optional: bool = False) -> Section:
        return Section(self.mapping(key, optional=optional), f"{self.where}: {key}", keys)

    def integers(self, key: str, *, default: list[int] | None) -> list[int]:
        return self._list(key, int, default)

    def strings(self, key: str, *, default: list[str] | None, may_be_empty: bool = False) -> list[str]:
        return self._list(key, str, default, may_be_empty=may_be_empty)

    def names(self, key: str, *, default: list[int | str]) -> list[int | str]:
        """Numbers and words."""
        return self._list(key, (int, str), default)

    def _list(
        self, key: str, kind: type | tuple[type, ...], default: list[Any] | None, *, may_be_empty: bool = False
    ) -> list[Any]:
        values: list[Any] = self.value(key, list, default=default)
        for value in values:
            typed = isinstance(value, kind) and not isinstance(value, bool)
            if not typed or (isinstance(value, int) and value < 0):
                rule = "whole numbers from 0" if kind is int else "names"
                raise ConfigError("list of something else", where=f"{self.where}: {key}", value=value, rule=rule)
        if len(set(values)) < len(values) or (not values and key in self._values and not may_be_empty):
            raise ConfigError("must have entries, each once", where=f"{self.where}: {key}", value=values)
        return values


def mapping_of(content: object, where: str) -> Mapping[Any, Any]:
    """`content`, if it is a mapping; else raises ConfigError."""
    if not isinstance(content, Mapping):
        raise ConfigError("must be a mapping of keys to values", where=where, value=content)
    return content


class _UniqueKeys(yaml.SafeLoader):
    """A key given twice is an error, not the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path, *, key: str) -> object:
    """The content of a YAML file; raises ConfigError, which names the config key `key` that led here."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot be read: {reason}", where=key, value=file) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"not readable YAML: {problem}{line}", where=key, value=file) from None
