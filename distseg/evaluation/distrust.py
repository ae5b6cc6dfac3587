"""Which pseudo-labelled scans to distrust, and which to label next: arrays in, orders out. n scans, E embedding width.

No truth is looked at. The score is a rank among the scans at hand, so one scan alone says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
_SMALLEST_SPREAD = 0.1  # of log volumes: four labelled scans alike by chance make no rule
_CANDIDATES = 10  # times as many of the most doubtful scans as are asked for compete for their place


def expected_error(evidence: Mapping[str, FloatArray]) -> FloatArray:
    """Mean percentile rank, 0 (trust) to 1, over the kinds of evidence, each [n], higher is worse; NaN has no say.

    A kind in which all scans are alike says nothing and is left out.
    """
    ranks = [_percentile_ranks(values) for values in evidence.values() if _tells_apart(values)]
    count = len(next(iter(evidence.values())))
    if not ranks:
        return np.zeros(count)
    stacked = np.stack(ranks)
    known = ~np.isnan(stacked)
    mean: FloatArray = np.where(known, stacked, 0).sum(0) / np.maximum(known.sum(0), 1)
    return mean


def volume_deviation(volumes_ml: FloatArray, labelled_ml: Sequence[float]) -> FloatArray:
    """How far each volume [n] lies from the labelled scans' in robust standard deviations of the logarithm; a missing
    object is as far as a hundredth of the median. NaN with fewer than three labelled scans to compare with."""
    known = np.asarray([volume for volume in labelled_ml if volume > 0])
    if len(known) < 3:
        return np.full(len(volumes_ml), np.nan)
    logs = np.log(known)
    middle = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - middle))), _SMALLEST_SPREAD)
    floored = np.maximum(volumes_ml, np.exp(middle) / 100)
    deviation: FloatArray = np.abs(np.log(floored) - middle) / spread
    return deviation


def next_to_label(score: FloatArray, descriptors: npt.NDArray[np.float32], *, count: int) -> list[int]:
    """`count` scans that are doubtful and unlike each other: the most doubtful one, then, again and again, the one of
    largest score x distance to the nearest already chosen. `descriptors` [n, E] are unit vectors; distance is
    1 - cosine. Only the 10 x count most doubtful compete, so that what is odd but sure is left out."""
    order = np.argsort(-score, kind="stable")[: _CANDIDATES * count]
    chosen: list[int] = []
    nearest = np.full(len(order), np.inf)
    for _ in range(min(count, len(order))):
        gain = np.where(np.isin(order, chosen), -1.0, score[order] * np.minimum(nearest, 2.0))
        best = int(order[int(np.argmax(gain))])
        chosen.append(best)
        nearest = np.minimum(nearest, 1 - descriptors[order] @ descriptors[best])
    return chosen


def random_with_foreground(has_foreground: npt.NDArray[np.bool_], *, count: int, rng: np.random.Generator) -> list[int]:
    """The baseline: `count` scans drawn evenly from those in which anything was found; others only to fill up."""
    order = rng.permutation(len(has_foreground))
    return [int(i) for i in (*order[has_foreground[order]], *order[~has_foreground[order]])][:count]


def _tells_apart(values: FloatArray) -> bool:
    known = values[~np.isnan(values)]
    return len(known) > 1 and float(known.min()) < float(known.max())


def _percentile_ranks(values: FloatArray) -> FloatArray:
    """0 to 1, ties share their mean rank; NaN stays NaN."""
    ranks = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    _, inverse, counts = np.unique(values[known], return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    ranks[known] = ((last - (counts - 1) / 2) / max(len(known) - 1, 1))[inverse]
    return ranks
