"""The tables of a benchmark: per_scan.csv of its runs -> summaries and paired comparisons -> CSV.

A reading is one label count, network (student, teacher), component (all, largest) and structure; each has the
statistics of DESIGN section 8 from `compare`. Of several structures there is a further reading, `mean`: per scan the
mean over the structures counted in it. A row that lacks a seed is summarised over those it has and is not compared.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from distseg.evaluation.compare import (
    Comparison,
    MethodSummary,
    ScoreTable,
    SeedScore,
    compare,
    detectable_effect,
    holm,
    summarise,
)
from distseg.evaluation.metrics import COMPONENTS

METRICS = ("iou", "dice", "hd95_mm")
SMALLER_IS_BETTER = ("hd95_mm",)
NETWORKS = ("student", "teacher")
MEAN = "mean"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class RunScores:
    """One run of the benchmark: `labelled` names its subset, `lines` are those of its per_scan.csv, as read."""

    row: str
    labelled: int | str
    seed: int
    lines: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Verdict:
    """A comparison; `detectable` is the mean difference that so many scans would show, in the metric's unit."""

    comparison: Comparison
    detectable: float
    reads: str  # better | worse | not shown: significant after Holm, and which way the ranks point


@dataclass(frozen=True)
class Reading:
    """Everything by metric; `seeds` and `missed` (objects over all seeds and scans) by row."""

    labelled: int | str
    network: str
    component: str
    class_name: str
    summaries: Mapping[str, Sequence[MethodSummary]]
    verdicts: Mapping[str, Sequence[Verdict]]
    seeds: Mapping[str, tuple[int, ...]]
    missed: Mapping[str, int]
    left_out: tuple[str, ...]  # scans that not every run counts


def make_readings(
    runs: Sequence[RunScores], *, seeds: Sequence[int], against: Sequence[str], compared: Sequence[str]
) -> list[Reading]:
    """`seeds` are those asked for; every row of `compared` is tested against every other one of `against`."""
    readings = []
    for labelled in dict.fromkeys(run.labelled for run in runs):
        part = [run for run in runs if run.labelled == labelled]
        names = list(dict.fromkeys(line["class"] for run in part for line in run.lines))
        for network in NETWORKS:
            for component in COMPONENTS:
                for name in [*([MEAN] if len(names) > 1 else []), *names]:
                    key = (labelled, network, component, name)
                    reading = _reading(key, part, seeds=seeds, compared=compared, against=against)
                    readings += [reading] if reading is not None else []
    return readings


def _reading(
    key: tuple[int | str, str, str, str],
    runs: Sequence[RunScores],
    *,
    seeds: Sequence[int],
    compared: Sequence[str],
    against: Sequence[str],
) -> Reading | None:
    """None where no scan has the structure."""
    _, network, component, name = key
    rows = list(dict.fromkeys(run.row for run in runs))
    has = {row: tuple(sorted(run.seed for run in runs if run.row == row)) for row in rows}
    complete = [row for row in rows if set(has[row]) == set(seeds)]
    groups = [complete, *([row] for row in rows if row not in complete)]
    chosen = {(r.row, r.seed): _chosen(r.lines, network=network, component=component, name=name) for r in runs}
    summaries: dict[str, list[MethodSummary]] = {}
    verdicts: dict[str, list[Verdict]] = {}
    left_out: set[str] = set()
    for metric in METRICS:
        tables = [ScoreTable.of(_scores(chosen, group, metric)) for group in groups if group]
        if not all(table.scan_ids for table in tables):
            return None
        found = {summary.method: summary for table in tables for summary in summarise(table)}
        summaries[metric] = [found[row] for row in rows]
        verdicts[metric] = _verdicts(tables[0], metric, compared, against) if complete else []
        left_out.update(*(table.left_out for table in tables))
    missed = {
        row: sum(line["status"] == "missed" for (of, _), lines in chosen.items() if of == row for line in lines)
        for row in rows
    }
    return Reading(*key, summaries, verdicts, has, missed, tuple(sorted(left_out)))


def _chosen(lines: Iterable[Mapping[str, str]], *, network: str, component: str, name: str) -> list[Mapping[str, str]]:
    return [
        line
        for line in lines
        if line["network"] == network and line["component"] == component and name in (MEAN, line["class"])
    ]


def _scores(
    chosen: Mapping[tuple[str, int], Sequence[Mapping[str, str]]], rows: Sequence[str], metric: str
) -> list[SeedScore]:
    """One score a row, seed and scan: the mean over the structures that are counted there, None if none is."""
    scores = []
    for (row, seed), lines in chosen.items():
        if row not in rows:
            continue
        values: dict[str, list[float]] = {line["scan_id"]: [] for line in lines}
        for line in lines:
            if line[metric] != "":
                values[line["scan_id"]].append(float(line[metric]))
        scores += [SeedScore(row, seed, scan, float(np.mean(v)) if v else None) for scan, v in values.items()]
    return scores


def _verdicts(table: ScoreTable, metric: str, compared: Sequence[str], against: Sequence[str]) -> list[Verdict]:
    """Holm's correction runs over all comparisons of the metric."""
    here = table.values
    found: list[Comparison] = []
    for ours in (row for row in compared if row in here):
        baselines = [row for row in against if row in here and row != ours]
        found += compare(table, method=ours, baselines=baselines) if baselines else []
    corrected = holm([comparison.p_wilcoxon for comparison in found])
    verdicts = []
    for comparison, p_holm in zip(found, corrected, strict=True):
        difference = table.per_scan(comparison.method) - table.per_scan(comparison.baseline)
        sd = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
        verdicts.append(
            Verdict(
                dataclasses.replace(comparison, p_holm=p_holm),
                detectable_effect(len(difference), comparisons=len(found)) * sd,
                _reads(difference, p_holm, metric),
            )
        )
    return verdicts


def _reads(difference: np.ndarray, p_holm: float, metric: str) -> str:
    if p_holm >= SIGNIFICANT:
        return "not shown"
    ranks = float((np.sign(difference) * stats.rankdata(np.abs(difference))).sum())
    return "better" if (ranks < 0) == (metric in SMALLER_IS_BETTER) else "worse"


# --- CSV: one line a figure, for programs --------------------------------------------------------------------------


def summary_csv(readings: Iterable[Reading]) -> str:
    lines = []
    for reading in readings:
        for metric, summaries in reading.summaries.items():
            for summary in summaries:
                values = dataclasses.asdict(summary)
                values["seed_means"] = ";".join(f"{value:.6g}" for value in summary.seed_means)
                values["missed"] = reading.missed[summary.method]
                values = {"row" if name == "method" else name: value for name, value in values.items()}
                lines.append({**_keys(reading), "metric": metric, "seeds": len(summary.seed_means), **values})
    return to_csv(lines)


def comparisons_csv(readings: Iterable[Reading]) -> str:
    lines = []
    for reading in readings:
        for metric, verdicts in reading.verdicts.items():
            for verdict in verdicts:
                values = dataclasses.asdict(verdict.comparison)
                values = {"row" if name == "method" else name: value for name, value in values.items()}
                extra = {"detectable": verdict.detectable, "reads": verdict.reads}
                lines.append({**_keys(reading), "metric": metric, **values, **extra})
    return to_csv(lines)


def _keys(reading: Reading) -> dict[str, Any]:
    return {
        "labelled": reading.labelled,
        "network": reading.network,
        "component": reading.component,
        "class": reading.class_name,
    }


def to_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """All lines have the first one's columns; floats to 6 digits, None is empty. No lines give an empty text."""
    if not lines:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    return text.getvalue()
