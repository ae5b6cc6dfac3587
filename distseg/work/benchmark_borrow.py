"""Cells that another benchmark has finished with the same configuration: read where they lie, not trained again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.config.compose import identity_hash
from distseg.config.untrusted import read_yaml
from distseg.errors import ConfigError, DataError
from distseg.training.run import RunDirectory
from distseg.work.benchmark_cells import Cell


class FinishedCells:
    """Of the benchmark in `folder`, by what they were trained with; two runs are the same by `identity`."""

    def __init__(self, folder: Path, *, evaluated: Mapping[str, Any]) -> None:
        """`evaluated`: how cells are measured here, see `how_measured`; ConfigError where it is otherwise there."""
        self._folder = folder
        _check_measured_alike(folder, evaluated)
        self._runs: dict[str, Path] = {}
        for run in sorted((folder / "cells").glob("*")):
            stored = RunDirectory(run).stored()
            if stored is not None:
                self._runs[identity_hash(stored.config)] = run

    def instead_of(self, cell: Cell) -> Cell:
        """The same cell over there where it is finished, or `cell`. A branch is the same if its phase A is."""
        run = self._runs.get(identity_hash(cell.config))
        if run is None:
            return cell
        config = dataclasses.replace(cell.config, run=str(run))
        evaluate = None if cell.evaluate is None else dataclasses.replace(cell.evaluate, run=str(run))
        there = dataclasses.replace(cell, config=config, evaluate=evaluate)
        return there if there.is_finished() else cell

    def check_used(self, cells: list[Cell]) -> None:
        """Raises ConfigError where none of `cells` lies there."""
        if not any(cell.run.parents[1] == self._folder for cell in cells):
            raise ConfigError(
                "no finished cell of this suite there",
                where="cells_from",
                value=self._folder,
                rule="a cell is taken whose whole configuration is the same, a branch with its phase A",
                fix="leave cells_from out",
            )


def how_measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a benchmark.yaml that decides what a cell's figures mean."""
    suite = record["suite"]
    return {
        "cohort": record["cohort"],
        "cohort_digest": record["cohort_digest"],
        **{f"evaluate.{key}": suite[key] for key in ("split", "network", "overlap")},
    }


def _check_measured_alike(folder: Path, ours: Mapping[str, Any]) -> None:
    file = folder / "benchmark.yaml"
    try:
        theirs = how_measured(read_yaml(file, "benchmark.yaml"))
    except FileNotFoundError:
        raise ConfigError("no benchmark lives there", where="cells_from", value=folder) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"unreadable: {type(error).__name__} {error}", where=file) from error
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"the benchmark there has another {key}",
                where="cells_from",
                value=folder,
                rule=f"{theirs.get(key)} there, {value} here",
                fix="leave cells_from out",
            )
