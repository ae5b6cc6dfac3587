"""Statistics against hand-computed values and scipy's own bootstrap."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distseg.errors import InputError
from distseg.evaluation.compare import (
    ScoreTable,
    SeedScore,
    compare,
    detectable_effect,
    holm,
    summarise,
    wilcoxon_p,
)


def table(values: dict[str, list[list[float | None]]], **missed: int) -> ScoreTable:
    """values[method][seed][scan]"""
    scores = [
        SeedScore(method, seed, f"scan{n}", value, missed=value == 0)
        for method, rows in values.items()
        for seed, row in enumerate(rows)
        for n, value in enumerate(row)
    ]
    return ScoreTable.of(scores)


def test_summary_by_hand() -> None:
    (summary,) = summarise(table({"a": [[0.2, 0.4, 0.0], [0.4, 0.6, 0.8]]}))
    # Per scan over seeds: .3, .5, .4; seeds' means: .2, .6.
    assert summary.mean == pytest.approx(0.4)
    assert summary.median == pytest.approx(0.4)
    assert summary.sd == pytest.approx(0.1)
    assert summary.seed_means == pytest.approx((0.2, 0.6))
    assert summary.seed_sd == pytest.approx(0.4 / math.sqrt(2))
    assert (summary.scans, summary.missed) == (3, 1)


def test_holm_by_hand() -> None:
    # Ascending .01, .02, .03, .04 times 4, 3, 2, 1 = .04, .06, .06, .04; the running maximum gives .04, .06, .06, .06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_p_and_bonferroni(p_values: list[float]) -> None:
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p <= adjusted <= min(1.0, p * len(p_values)) + 1e-12


def test_wilcoxon_by_enumeration() -> None:
    # All five positive: of 2^5 sign patterns, one is as extreme on each side: p = 2/32.
    assert wilcoxon_p(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 32)
    difference = np.array([-1.5, 2.0, 3.5, -4.0, 5.5, 6.0])
    ranks = np.arange(1, 7)  # |difference| ascends
    observed = min(ranks[difference > 0].sum(), ranks[difference < 0].sum())
    patterns = [
        sum(rank for rank, on in zip(ranks, signs, strict=True) if on) for signs in itertools.product([0, 1], repeat=6)
    ]
    p = 2 * np.mean([total <= observed for total in patterns])
    assert wilcoxon_p(difference) == pytest.approx(p)
    assert wilcoxon_p(np.append(difference, 0.0)) == pytest.approx(p)


def test_equal_methods_do_not_crash() -> None:
    same = [[0.5, 0.6, 0.7]]
    (result,) = compare(table({"a": same, "b": same}), method="a", baselines=["b"], resamples=200)
    assert (result.mean_difference, result.difference_low, result.difference_high) == (0, 0, 0)
    assert (result.median_ratio, result.ratio_low, result.ratio_high) == (1, 1, 1)
    assert (result.p_wilcoxon, result.p_holm) == (1, 1)


def test_zero_medians_give_one_or_infinity() -> None:
    perfect, poor = [[0.0, 0.0, 0.0]], [[2.0, 3.0, 4.0]]
    scores = table({"perfect": perfect, "twin": perfect, "poor": poor})
    results = {
        (r.method, r.baseline): r
        for m in ("perfect", "poor")
        for r in compare(scores, method=m, baselines=["twin", "poor"], resamples=50)
    }
    assert results["perfect", "twin"].median_ratio == 1
    assert results["perfect", "poor"].median_ratio == 0
    assert results["poor", "twin"].median_ratio == results["poor", "twin"].ratio_high == math.inf


def test_paired_difference_and_its_interval() -> None:
    rng = np.random.default_rng(5)
    scan, gain = rng.normal(0.6, 0.2, 40), rng.normal(0.03, 0.02, 40)
    scores = table({"ours": [list(scan + gain)] * 2, "theirs": [list(scan)] * 2})
    (result,) = compare(scores, method="ours", baselines=["theirs"])
    assert result.mean_difference == pytest.approx(gain.mean())
    oracle = stats.bootstrap((gain,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert (result.difference_low, result.difference_high) == pytest.approx((oracle.low, oracle.high), abs=5e-4)
    # Pairing is what makes it tight: unpaired, the scans' own spread of .2 would swamp a gain of .03.
    assert result.p_wilcoxon < 1e-6
    assert result.difference_low > 0


def test_ratio_of_constant_factor_is_exact() -> None:
    scans = [3.0, 5.0, 9.0, 11.0]
    scores = table({"ours": [[0.8 * s for s in scans]], "theirs": [scans]})
    (result,) = compare(scores, method="ours", baselines=["theirs"], resamples=500)
    assert (result.median_ratio, result.ratio_low, result.ratio_high) == pytest.approx((0.8, 0.8, 0.8))


def test_same_seed_same_interval() -> None:
    scores = table({"a": [[0.1, 0.5, 0.3, 0.9]], "b": [[0.2, 0.3, 0.35, 0.5]]})
    first, again = (compare(scores, method="a", baselines=["b"], resamples=300, seed=3) for _ in range(2))
    other = compare(scores, method="a", baselines=["b"], resamples=300, seed=4)
    assert first == again
    assert first[0].difference_low != other[0].difference_low


def test_detectable_effect() -> None:
    # (1.95996 + .84162) / sqrt(30 * .95493) = .52343
    assert detectable_effect(30) == pytest.approx(0.52343, abs=1e-5)
    assert detectable_effect(30, comparisons=6) > detectable_effect(30)
    # Simulated at that effect, the test finds it in about 80 % of experiments.
    rng = np.random.default_rng(0)
    found = [wilcoxon_p(rng.normal(detectable_effect(30), 1, 30)) < 0.05 for _ in range(1500)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    with pytest.raises(InputError, match="no scans"):
        detectable_effect(0)


def test_scans_not_counted_everywhere_are_left_out_and_named() -> None:
    scores = table({"a": [[0.1, None, 0.3]], "b": [[0.2, 0.4, 0.6]]})
    assert scores.scan_ids == ("scan0", "scan2")
    assert scores.left_out == ("scan1",)
    np.testing.assert_array_equal(scores.per_scan("b"), [0.2, 0.6])


def test_an_unpaired_table_is_refused() -> None:
    lacking = [SeedScore("a", 0, "s1", 0.1), SeedScore("a", 0, "s2", 0.1), SeedScore("b", 0, "s1", 0.1)]
    with pytest.raises(InputError, match=r"1 of the scores .* b, seed 0, scan s2"):
        ScoreTable.of(lacking)
    with pytest.raises(InputError, match="no scan is counted by every run"):
        summarise(table({"a": [[None]]}))
