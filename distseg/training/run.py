"""The run directory: what a run is, where it stands, and whether the same command may go on with it.

RUN/
  config.yaml      resolved config and plan, its identity hash, versions of what ran
  metrics.jsonl    one line a step; cut back to the checkpoint on resume
  checkpoints/     see training/checkpoint.py
  bank/            with matching=index, see training/bank.py
  model/           see inference/model.py
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distseg import __version__
from distseg.config.compose import from_plain, identity, identity_hash, recipe_hash, to_plain
from distseg.config.schema import TrainRunConfig
from distseg.config.untrusted import read_yaml
from distseg.errors import DataError, InputError, RunMismatchError
from distseg.training.checkpoint import newest_step
from distseg.training.plan import Plan

# libyaml's where PyYAML was built with it, for plans of 100 000 scans. Not to read with: deep nesting ends the process.
_DUMPER = yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper
FORMAT = 1
_TAIL_NBYTES = 16_384  # holds several lines


class StoredRun(NamedTuple):
    config: TrainRunConfig
    plan: Plan


class Position(NamedTuple):
    """Of a reader in metrics.jsonl. Cutting replaces the file, so a byte of it says nothing without its inode."""

    inode: int
    offset: int


class RunDirectory:
    """Paths and small files of one run. Rank 0 writes. `where`: what a user knows it by."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.where: str | Path = self.path
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    def stored(self) -> StoredRun | None:
        """The run that lives here, or None. Raises DataError where config.yaml cannot be read."""
        if not self.config_file.exists():
            return None
        try:
            content = read_yaml(self.config_file, "run")
            if content["format"] != FORMAT:
                where = f"{self.where}/config.yaml"
                raise DataError("run of another format", where=where, value=content["format"])
            return StoredRun(from_plain(content["config"], TrainRunConfig), Plan.from_plain(content["plan"]))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            where = f"{self.where}/config.yaml"
            raise DataError(f"unreadable run: {type(error).__name__} {error}", where=where) from error

    def check_same(self, config: TrainRunConfig, stored: StoredRun) -> None:
        """Raises RunMismatchError, with the difference, if another run lives here."""
        old, new = identity(stored.config), identity(config)
        # What both have comes first: another method brings other keys with it.
        keys = sorted(old | new, key=lambda key: (key not in old or key not in new, key))
        differences = [f"{k}: {old.get(k)} there, {new.get(k)} asked" for k in keys if old.get(k) != new.get(k)]
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise RunMismatchError(
                "another run lives here",
                where=self.where,
                value="; ".join(differences[:3]) + more,
                fix="take another run= directory, or repeat the command it was made with",
            )

    def create(self, config: TrainRunConfig, plan: Plan) -> None:
        """Make the directory and write config.yaml, whole or not at all."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the run directory: {error.strerror}", where=self.path) from error
        content = {
            "format": FORMAT,
            "identity": identity_hash(config),
            "recipe": recipe_hash(config),
            "config": to_plain(config),
            "plan": plan.to_plain(),
            "versions": _versions(),
        }
        self._write_config(yaml.dump(content, Dumper=_DUMPER, sort_keys=False))

    def _write_config(self, text: str) -> None:
        write_atomic(self.config_file, text)

    # What a run behind a URL exchanges with it (training/remote_run.py); one on this file system is where it is.

    def behind(self, name: str) -> Path | None:
        """Where a part of the run lies behind the URL; None where there is none."""
        return None

    def newest_step(self) -> int:
        """Of the newest checkpoint; 0 if there is none."""
        return newest_step(self.checkpoints)

    def fetch_config(self) -> None:
        """Before `stored`."""

    def fetch_metrics(self) -> None:
        """And the configuration."""

    def fetch(self, *, every_checkpoint: bool) -> None:
        """All that a rank goes on from; the newest whole checkpoint alone, or every one."""

    def push_checkpoint(self, step: int) -> None:
        """With the metrics up to it. The bank is there already."""

    def push_pruned(self) -> None:
        """Checkpoints that have gone here go there."""

    def push_model(self) -> None: ...

    def cut_metrics(self, last_step: int) -> None:
        """Drop lines after `last_step`, and a last line that was cut short."""
        if not self.metrics_file.exists():
            return
        kept = []
        before = self.metrics_file.read_text()
        for line in before.splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        after = "".join(f"{line}\n" for line in kept)
        if after != before:
            write_atomic(self.metrics_file, after)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({k: _json_number(v) for k, v in row.items()}) + "\n")

    def sync_metrics(self) -> None:
        with self.metrics_file.open("rb") as file:
            os.fsync(file.fileno())

    def metrics_from(self, position: Position | None) -> tuple[list[dict[str, Any]], Position | None]:
        """Whole lines after `position`, and where they end, of a file that is being written to; all of them from its
        beginning where another has taken its place meanwhile, cut back to a checkpoint."""
        try:
            with self.metrics_file.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                begin = file.seek(position.offset if position is not None and position.inode == inode else 0)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], None
        end = Position(inode, begin + len(whole) + len(newline))
        return [json.loads(line) for line in whole.splitlines()], end

    def last_metrics(self) -> dict[str, Any] | None:
        """The last whole line, read from the end of a file that may be long and still be written to."""
        try:
            with self.metrics_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_NBYTES))
                lines = file.read().split(b"\n")[:-1]  # what follows the last newline is unfinished
        except FileNotFoundError:
            return None
        return json.loads(lines[-1]) if lines else None

    def metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_file.exists():
            return []
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]


def write_atomic(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _json_number(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    found = {"distseg": __version__, "python": platform.python_version()}
    for package in ("torch", "monai", "zarr", "numpy", "ray", "faiss-cpu", "faiss-gpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
