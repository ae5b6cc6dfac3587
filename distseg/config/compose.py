"""From names and dotted keys to one typed `TrainRunConfig`; and from the config to hashes and YAML."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distseg.config.checks import one_of
from distseg.config.presets import MATCHINGS, METHODS, ON_GPU, PRESET_METHOD, PRESETS, default_preset
from distseg.config.quoting import omegaconf_escaped
from distseg.config.schema import TrainRunConfig
from distseg.config.verbs import SHORT_KEYS, TuneRunConfig
from distseg.errors import ConfigError

Config = TypeVar("Config")

# What decides nothing about the result of a run, and so is no part of its identity (DESIGN section 2).
NOT_IDENTITY = (
    "run",
    "resources",
    "launcher",
    "dry_run",
    "checkpoint",
    "logging",
    "data.memory_gib",
    "matching.device",
    "matching.placement",
    "train.profile",
    "train.threads",
    "train.skips_in_a_row",
    "train.worker_timeout_s",
)
# Nor do these, of a method that does not match.
ONLY_MATCHING = ("matching", "references")
# What every method of a table must share.
RECIPE = ("data", "network", "sampling", "augment", "optimizer", "train", "postprocess")


def train_config(
    *,
    cohort: str,
    run: str,
    method: str = "embedding_matching",
    preset: str | None = None,
    matching: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TrainRunConfig:
    """Compose the config of one run without Hydra.

    `overrides` maps dotted keys to values, e.g. {"train.steps": 600, "data.spacing_mm": [3, 4, 4]}; texts are taken
    as they are, `${` included.
    Raises ConfigError for an unknown name or key, or a value outside its rule.
    """
    paths = {"cohort": cohort, "run": run}
    return _composed(TrainRunConfig, paths, method=method, preset=preset, matching=matching, overrides=overrides)


def tune_config(
    *,
    cohort: str,
    run: str,
    space: str,
    method: str = "embedding_matching",
    preset: str | None = None,
    matching: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TuneRunConfig:
    """The same for a sweep; `overrides` may hold keys of `tune`. Raises ConfigError as `train_config` does."""
    paths = {"cohort": cohort, "run": run, "tune": {"space": space}}
    return _composed(TuneRunConfig, paths, method=method, preset=preset, matching=matching, overrides=overrides)


def _composed(
    schema: type[Config],
    paths: Mapping[str, Any],
    *,
    method: str,
    preset: str | None,
    matching: str | None,
    overrides: Mapping[str, Any] | None,
) -> Config:
    overrides = dict(overrides or {})
    gpus_per_worker = float(overrides.get("resources.gpus_per_worker", 0.0))
    preset = preset or default_preset(gpus_per_worker)
    one_of("method", method, tuple(METHODS))
    one_of("preset", preset, tuple(PRESETS))
    layers = [METHODS[method], PRESETS[preset], PRESET_METHOD.get((preset, method), {})]
    if gpus_per_worker > 0:
        layers.append(ON_GPU.get(preset, {}))
    if matching is not None:
        one_of("matching", matching, tuple(MATCHINGS))
        layers.append(MATCHINGS[matching])
    node = OmegaConf.structured(schema)
    try:
        for layer in (*layers, _literal(paths)):
            node = OmegaConf.merge(node, layer)
        for key, value in overrides.items():
            OmegaConf.update(node, key, _literal(value), force_add=False)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error), fix="distseg train --help lists the keys") from None
    return to_typed(node, schema)


def with_overrides(config: TrainRunConfig, overrides: Mapping[str, Any]) -> TrainRunConfig:
    """`config` with dotted keys set; a `matching.kind` brings the other keys of that matching with it.

    Raises ConfigError for an unknown key, or a value outside its rule.
    """
    chosen = MATCHINGS.get(str(overrides.get("matching.kind")), {})
    node = OmegaConf.merge(OmegaConf.structured(TrainRunConfig), _literal(to_plain(config)))
    try:
        for key, value in {**dict(flatten(chosen)), **overrides}.items():
            OmegaConf.update(node, key, _literal(value), force_add=False)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error), fix="distseg train --help lists the keys") from None
    return to_typed(node, TrainRunConfig)  # type: ignore[arg-type]  # merge of a structured node is a DictConfig


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def to_typed(node: DictConfig, kind: type[Config]) -> Config:
    """The dataclass behind a composed node; raises ConfigError for a missing or ill-typed value."""
    try:
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            shown = {key: short for short, key in SHORT_KEYS.items()}.get(missing[0], missing[0])
            raise ConfigError("key not given", where=shown, fix=f"add {shown}=...")
        typed = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error), where=getattr(error, "full_key", None)) from None
    if not isinstance(typed, kind):
        raise TypeError(f"expected {kind.__name__}, composed {type(typed).__name__}")
    return typed


def from_plain(values: Mapping[str, Any], kind: type[Config]) -> Config:
    """The dataclass of a plain mapping, e.g. read back from RUN/config.yaml. Unknown keys are refused."""
    try:
        node = OmegaConf.merge(OmegaConf.structured(kind), _literal(values))
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None
    return to_typed(node, kind)  # type: ignore[arg-type]  # merge of a structured node is a DictConfig


def _literal(value: Any) -> Any:
    """Stored strings are paths and names, never interpolations."""
    if isinstance(value, str | os.PathLike):
        return omegaconf_escaped(os.fspath(value))
    if isinstance(value, Mapping):
        return {key: _literal(v) for key, v in value.items()}
    return [_literal(v) for v in value] if isinstance(value, list) else value


def to_plain(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a nested mapping, in order."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def identity(config: TrainRunConfig) -> dict[str, Any]:
    """The dotted keys that make this run the run it is."""
    skipped = NOT_IDENTITY if config.method.name == "embedding_matching" else (*NOT_IDENTITY, *ONLY_MATCHING)
    return {
        key: value
        for key, value in flatten(to_plain(config))
        if not any(key == skip or key.startswith(f"{skip}.") for skip in skipped)
    }


def identity_hash(config: TrainRunConfig) -> str:
    return _digest(identity(config))


def recipe_hash(config: TrainRunConfig) -> str:
    """One hash for all runs that differ in `method`, `matching`, `references` and the branch's parent alone."""
    shared = {k: v for k, v in identity(config).items() if k.split(".")[0] in RECIPE and k != "train.init_from"}
    return _digest(shared)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
