"""Everything that can be wrong with a benchmark is found here, before anything runs.

RUN/benchmark.yaml records what the directory was made with: the suite and its hash, the cohort and its digest, the
subsets by id, and what effect the evaluated scans can show. Another suite or a changed cohort there is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distseg.config.compose import RECIPE, flatten, identity, recipe_hash, train_config
from distseg.config.subsets import Name
from distseg.config.suites import Suite, load_suite
from distseg.config.untrusted import read_yaml
from distseg.config.verbs import BenchmarkConfig
from distseg.data.cohort import Cohort
from distseg.errors import ConfigError, DataError, RunMismatchError
from distseg.evaluation.compare import detectable_effect
from distseg.methods import make_method
from distseg.training.plan import choose_labelled, make_plan
from distseg.training.run import RunDirectory, write_atomic
from distseg.work.benchmark_borrow import FinishedCells, how_measured
from distseg.work.benchmark_cells import Cell, make_cells
from distseg.work.owner import owning

FORMAT = 1
_HEAD = "# What this directory was made with: `distseg benchmark` refuses another suite or a changed cohort here.\n"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that may run. `suite` is the selected part; `scans` the annotated ones of the evaluated split."""

    suite: Suite
    cohort: Cohort
    phase_a: list[Cell]
    phase_b: list[Cell]
    subsets: Mapping[Name, tuple[str, ...]]
    scans: tuple[str, ...]
    record: Mapping[str, Any]  # of benchmark.yaml

    @property
    def comparisons(self) -> int:
        """Paired tests on one metric: Holm's family."""
        return sum(ours != theirs for ours in self.suite.compare for theirs in self.suite.against)

    @property
    def titles(self) -> dict[Name, str]:
        """The subsets that run, in words."""
        return {name: self.suite.subsets[name].title(name) for name in self.suite.labelled}

    @property
    def detectable_sd(self) -> float:
        """Smallest mean paired difference that can be shown, in sd of the paired difference (80 % power, p < .05)."""
        return detectable_effect(len(self.scans), comparisons=max(1, self.comparisons))


def prepare(config: BenchmarkConfig) -> Benchmark:
    """Parse and check; writes nothing. Raises ConfigError, DataError or RunMismatchError."""
    whole = load_suite(config.suite)
    suite = whole.select(rows=config.rows, labelled=config.labelled, seeds=config.seeds)
    cohort = Cohort.open(config.cohort)
    run = Path(config.run)
    stored = _stored(run, whole, config, cohort)
    subsets = {name: _labelled(whole, name, cohort, stored) for name in suite.labelled}
    elsewhere = _finished_elsewhere(config, whole, cohort)
    phase_a, phase_b = make_cells(
        suite, config, subsets=subsets, taken=elsewhere.instead_of if elsewhere is not None else lambda cell: cell
    )
    if elsewhere is not None:
        elsewhere.check_used([*phase_a, *phase_b])
    _check_recipes(suite, phase_b)
    scans = _scans(suite, cohort)
    for cell in phase_a:
        if cell.seed == suite.seeds[0]:  # the seed decides nothing about the data
            _check_plan(cell, suite, cohort)
    for cell in phase_b:
        make_method(cell.config, num_classes=len(cohort.class_names))
    _check_runs(phase_a, phase_b)
    benchmark = Benchmark(suite, cohort, phase_a, phase_b, subsets, scans, {})
    return dataclasses.replace(benchmark, record=_record(whole, config, benchmark, stored))


@contextlib.contextmanager
def claimed(config: BenchmarkConfig, benchmark: Benchmark) -> Iterator[Path]:
    """Write RUN/benchmark.yaml and hold the directory: a second `distseg benchmark` in it is refused meanwhile."""
    folder = Path(config.run)
    with owning(folder / ".lock", what="benchmark", name=folder):
        write_atomic(folder / "benchmark.yaml", _HEAD + yaml.safe_dump(dict(benchmark.record), sort_keys=False))
        yield folder


def _stored(run: Path, suite: Suite, config: BenchmarkConfig, cohort: Cohort) -> dict[str, Any] | None:
    """RUN/benchmark.yaml if there is one and it is this benchmark's."""
    if (run / "config.yaml").exists():
        raise RunMismatchError("a training run lives here", where=run, fix="choose another run=")
    file = run / "benchmark.yaml"
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = read_yaml(file, "benchmark.yaml")
        if content["format"] != FORMAT:
            raise DataError("benchmark of another format", where=file, value=content["format"])
        if content["hash"] != suite.hash():
            there, asked = (dict(flatten(values)) for values in (content["suite"], suite.content()))
            different = [key for key in sorted(there | asked) if there.get(key) != asked.get(key)]
            raise RunMismatchError(
                f"holds a benchmark of another suite ({content['name']})",
                where=run,
                value="; ".join(f"{key}: {there.get(key)} there, {asked.get(key)} asked" for key in different[:3]),
                fix="choose another run=",
            )
        if content["cohort"] != config.cohort:
            raise RunMismatchError(
                "holds a benchmark of another cohort", where=run, value=content["cohort"], fix="choose another run="
            )
        if content["cohort_digest"] != cohort_digest(cohort):
            raise RunMismatchError(
                "the cohort has changed since this benchmark began",
                where=config.cohort,
                rule="its cells would not be compared on the same scans",
                fix="choose another run=",
            )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"unreadable: {type(error).__name__} {error}", where=file) from error
    return content


def cohort_digest(cohort: Cohort) -> str:
    """Changes with any scan, its content, split or label."""
    facts = sorted([r.scan_id, r.sha256, r.split, r.labelled] for r in cohort.records)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _labelled(suite: Suite, name: Name, cohort: Cohort, stored: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Ids of the subset: fixed when it first ran, named by the suite, or drawn."""
    before = (stored or {}).get("subsets", {}).get(name)
    if before is not None:
        return tuple(before)
    subset = suite.subsets[name]
    if subset.of is not None:
        return _labelled(suite, subset.of, cohort, stored)
    training = [r for r in cohort.records if r.split in (None, "train") and r.labelled]
    chosen: dict[str, Any] = {}  # all there are
    if subset.ids is not None:
        chosen = {"data.labeled_ids": list(subset.ids)}
    elif subset.subset_seed is not None:
        chosen = {"data.labeled_scans": name, "data.subset_seed": subset.subset_seed}
    try:
        return choose_labelled(train_config(cohort="", run="", overrides=chosen), cohort, training)
    except ConfigError as error:
        where = f"suite {suite.name}: subsets.{name}"
        raise ConfigError(error.what, where=where, value=error.value, rule=error.rule) from None


def _check_plan(cell: Cell, suite: Suite, cohort: Cohort) -> None:
    """The cohort can serve what the subset asks for."""
    try:
        make_plan(cell.config, cohort)
    except ConfigError as error:
        if error.where != "data.labeled_patches":
            raise
        where = f"suite {suite.name}: subsets.{cell.labelled}.patches"
        raise ConfigError(error.what, where=where, value=error.value, rule=error.rule) from None


def _check_recipes(suite: Suite, phase_b: Sequence[Cell]) -> None:
    """Rows of one table differ in their method alone (DESIGN section 2)."""
    first = phase_b[0]
    for cell in phase_b:
        comparable = (cell.labelled, cell.seed) == (first.labelled, first.seed)
        if not comparable or recipe_hash(cell.config) == recipe_hash(first.config):
            continue
        ours, theirs = identity(cell.config), identity(first.config)
        keys = [k for k in ours if k.split(".")[0] in RECIPE and k != "train.init_from" and ours[k] != theirs[k]]
        raise ConfigError(
            "differing recipes in one table",
            where=f"suite {suite.name}: rows.{cell.row} and rows.{first.row}",
            value="; ".join(f"{key}: {ours[key]} and {theirs[key]}" for key in keys[:3]),
            rule=f"rows share {', '.join(RECIPE)}",
            fix="set those keys under common, or compare in a suite of their own",
        )


def _scans(suite: Suite, cohort: Cohort) -> tuple[str, ...]:
    scans = tuple(sorted(r.scan_id for r in cohort.records if r.split == suite.split and r.labelled))
    if not scans:
        there = sorted({r.split for r in cohort.records if r.split is not None and r.labelled})
        raise ConfigError(
            "no annotated scan in the split to evaluate on",
            where=f"suite {suite.name}: evaluate.split",
            value=suite.split,
            rule=f"splits with annotated scans: {', '.join(there) or 'none'}",
        )
    return scans


def _finished_elsewhere(config: BenchmarkConfig, suite: Suite, cohort: Cohort) -> FinishedCells | None:
    if config.cells_from is None:
        return None
    ours = {"cohort": config.cohort, "cohort_digest": cohort_digest(cohort), "suite": suite.content()}
    return FinishedCells(Path(config.cells_from), evaluated=how_measured(ours))


def _check_runs(phase_a: Sequence[Cell], phase_b: Sequence[Cell]) -> None:
    """Run directories that are there already hold what this suite would train."""
    for cell in (*phase_a, *phase_b):
        directory = RunDirectory(cell.run)
        stored = directory.stored()
        if stored is not None:
            directory.check_same(cell.config, stored)


def _record(
    suite: Suite, config: BenchmarkConfig, benchmark: Benchmark, stored: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of benchmark.yaml; a subset that runs here for the first time is added to it."""
    subsets = {**(stored or {}).get("subsets", {}), **{n: list(ids) for n, ids in benchmark.subsets.items()}}
    return {
        "format": FORMAT,
        "name": suite.name,
        "hash": suite.hash(),
        "cohort": config.cohort,
        "cohort_digest": cohort_digest(benchmark.cohort),
        "cells_from": config.cells_from,
        "evaluated_scans": len(benchmark.scans),
        "detectable_effect_sd": round(dataclasses.replace(benchmark, suite=suite).detectable_sd, 4),
        "subsets": {name: subsets[name] for name in suite.subsets if name in subsets},
        "suite": suite.content(),
    }
