"""Compare methods over the same scans and seeds (DESIGN section 8, METHOD section 5).

Legend: S seeds, N scans. Scores are averaged over seeds per scan first, so n = N; the seeds' spread is told apart.
Differences and ratios are paired by scan: bootstrap intervals resample scans, the same ones for both methods, and the
Wilcoxon signed-rank tests carry Holm's correction over the comparisons of one metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from distseg.errors import InputError

RESAMPLES = 10_000
CONFIDENCE = 0.95
WILCOXON_EFFICIENCY = 3 / math.pi  # asymptotic relative efficiency against the paired t-test, normal differences


@dataclass(frozen=True)
class SeedScore:
    """One number: what one run (method and seed) scored on one scan in one metric. None: the class is absent there."""

    method: str
    seed: int
    scan_id: str
    value: float | None
    missed: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """One metric of several methods on the same seeds and scans; a scan that some run could not count is left out."""

    seeds: tuple[int, ...]
    scan_ids: tuple[str, ...]
    values: Mapping[str, np.ndarray]  # method -> float64 [S, N]
    missed: Mapping[str, int]  # method -> missed objects over all seeds and scans
    left_out: tuple[str, ...]  # scans that not every run counts

    @classmethod
    def of(cls, scores: Iterable[SeedScore]) -> ScoreTable:
        """Refuses a table in which a method lacks a seed or scan that another has: it would not be paired."""
        scores = list(scores)
        cells = {(s.method, s.seed, s.scan_id): s for s in scores}
        methods = list(dict.fromkeys(s.method for s in scores))
        seeds = tuple(sorted({s.seed for s in scores}))
        scans = tuple(sorted({s.scan_id for s in scores}))
        lacking = [(m, seed, scan) for m in methods for seed in seeds for scan in scans if (m, seed, scan) not in cells]
        if lacking:
            method, seed, scan = lacking[0]
            raise InputError(
                f"{len(lacking)} of the scores to compare are missing, first: {method}, seed {seed}, scan {scan}",
                rule="methods are compared on the same seeds and scans",
                fix="finish the missing runs or leave that method out",
            )
        uncounted = {s.scan_id for s in scores if s.value is None}
        kept = tuple(scan for scan in scans if scan not in uncounted)
        values = {
            m: np.array([[cells[m, seed, scan].value for scan in kept] for seed in seeds], np.float64) for m in methods
        }
        missed = {m: sum(s.missed for s in scores if s.method == m) for m in methods}
        return cls(seeds, kept, values, missed, tuple(scan for scan in scans if scan in uncounted))

    def per_scan(self, method: str) -> np.ndarray:
        """[N] mean over seeds."""
        mean: np.ndarray = self.values[method].mean(axis=0)
        return mean


@dataclass(frozen=True)
class MethodSummary:
    """Mean, median and sd over scans (of the seeds' mean); `seed_sd` is the sd of the seeds' means over scans."""

    method: str
    scans: int
    mean: float
    median: float
    sd: float | None
    seed_means: tuple[float, ...]
    seed_sd: float | None
    missed: int


@dataclass(frozen=True)
class Comparison:
    """`method` against `baseline` on one metric. Differences are method - baseline; the ratio is of medians."""

    method: str
    baseline: str
    scans: int
    mean_difference: float
    difference_low: float
    difference_high: float
    median_ratio: float
    ratio_low: float
    ratio_high: float
    p_wilcoxon: float
    p_holm: float


def summarise(table: ScoreTable) -> list[MethodSummary]:
    """One summary per method, in the table's order."""
    summaries = []
    for method, values in table.values.items():
        _require_scans(table)
        scans, seeds = values.mean(axis=0), values.mean(axis=1)
        summaries.append(
            MethodSummary(
                method=method,
                scans=len(scans),
                mean=float(scans.mean()),
                median=float(np.median(scans)),
                sd=_sample_sd(scans),
                seed_means=tuple(float(seed) for seed in seeds),
                seed_sd=_sample_sd(seeds),
                missed=table.missed[method],
            )
        )
    return summaries


def compare(
    table: ScoreTable, *, method: str, baselines: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> list[Comparison]:
    """`method` against each baseline. Deterministic for a seed; every comparison sees the same resampled scans."""
    _require_scans(table)
    ours = table.per_scan(method)
    n = len(ours)
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))  # [resamples, N]
    p_values = [wilcoxon_p(ours - table.per_scan(baseline)) for baseline in baselines]
    comparisons = []
    for baseline, p, p_holm in zip(baselines, p_values, holm(p_values), strict=True):
        theirs = table.per_scan(baseline)
        difference = ours - theirs
        low, high = _interval(difference[draws].mean(axis=1))
        ratios = _ratio(np.median(ours[draws], axis=1), np.median(theirs[draws], axis=1))
        ratio_low, ratio_high = _interval(ratios)
        comparisons.append(
            Comparison(
                method=method,
                baseline=baseline,
                scans=n,
                mean_difference=float(difference.mean()),
                difference_low=low,
                difference_high=high,
                median_ratio=float(_ratio(np.median(ours), np.median(theirs))),
                ratio_low=ratio_low,
                ratio_high=ratio_high,
                p_wilcoxon=p,
                p_holm=p_holm,
            )
        )
    return comparisons


def wilcoxon_p(difference: np.ndarray) -> float:
    """Two-sided signed-rank p of paired differences [N]; equal scans are dropped (Wilcoxon), 1 if all are equal."""
    difference = difference[difference != 0]
    if len(difference) == 0:
        return 1.0
    return float(stats.wilcoxon(difference, zero_method="wilcox").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: running maximum of (m - rank) p over ascending p."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted


def detectable_effect(scans: int, *, comparisons: int = 1, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest mean paired difference that `scans` scans can show, in standard deviations of the paired difference.

    Two-sided Wilcoxon signed-rank by the normal approximation, (z_{1 - alpha/2m} + z_power) / sqrt(n ARE), with the
    strictest of Holm's levels, alpha / m for m comparisons. To be stated before the experiment is looked at.
    """
    if scans < 1:
        raise InputError("no scans to compare on", value=scans, rule="at least one")
    z = stats.norm.ppf(1 - alpha / (2 * comparisons)) + stats.norm.ppf(power)
    return float(z / math.sqrt(scans * WILCOXON_EFFICIENCY))


def _require_scans(table: ScoreTable) -> None:
    if not table.scan_ids:
        raise InputError("no scan is counted by every run", rule="methods are compared on the same scans")


def _interval(samples: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval; `nearest` order statistics, so that an infinite ratio stays one."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(samples, [tail, 100 - tail], method="nearest")
    return float(low), float(high)


def _ratio(ours: np.ndarray | np.floating, theirs: np.ndarray | np.floating) -> np.ndarray:
    """ours / theirs; 0 / 0 is 1 (both perfect), x / 0 infinite."""
    ours, theirs = np.broadcast_arrays(np.asarray(ours, np.float64), np.asarray(theirs, np.float64))
    ratio = np.where(ours == 0, 1.0, np.inf)
    np.divide(ours, theirs, out=ratio, where=theirs != 0)
    return ratio


def _sample_sd(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
