"""Which swept keys moved the objective: one honest figure a key, with what chance alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

LEAST_TRIALS = 5  # with fewer a curve through the points explains everything
PERMUTATIONS = 999
CHANCE = 95.0  # percentile of shuffled objectives


@dataclass(frozen=True)
class Importance:
    """`share` of the objective's variance, in ranks, that this key alone explains; `chance`: what 19 of 20 shuffled
    objectives stay below. `trials`: those in which the key counts."""

    key: str
    share: float
    chance: float
    trials: int

    @property
    def shown(self) -> bool:
        return self.share > self.chance


def importance(key: str, values: Sequence[Any], objective: Sequence[float], *, seed: int = 0) -> Importance | None:
    """R^2 of the objective's ranks: on a parabola in the ranks of numbers, on a mean a value of anything else.

    Ranks, so that neither a logarithmic axis nor one collapsed trial decides; a parabola, so that a best value inside
    the range is seen. Says nothing of interactions. None with too few trials or one value only.
    """
    if len(values) < LEAST_TRIALS or all(value == values[0] for value in values):
        return None
    design = _design(values)
    ranks = _ranks(np.asarray(objective, np.float64))
    if not ranks.std():
        return None
    rng = np.random.default_rng(seed)
    shuffled = [_r_squared(design, rng.permutation(ranks)) for _ in range(PERMUTATIONS)]
    return Importance(key, _r_squared(design, ranks), float(np.percentile(shuffled, CHANCE)), len(values))


def _design(values: Sequence[Any]) -> np.ndarray:
    """float64 [trials, columns], orthonormal, the constant first."""
    distinct: list[Any] = []
    for value in values:  # not a set: a value may be a list
        if value not in distinct:
            distinct.append(value)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct)
    if numbers and len(distinct) > 2:
        ranks = _ranks(np.asarray(values, np.float64))
        columns = [np.ones(len(values)), ranks, ranks**2]
    else:
        columns = [np.asarray([value == one for value in values], np.float64) for one in distinct]
        columns[0] = np.ones(len(values))
    basis: np.ndarray = np.linalg.qr(np.stack(columns, axis=1))[0]
    return basis


def _r_squared(design: np.ndarray, ranks: np.ndarray) -> float:
    fitted = design @ (design.T @ ranks)
    centred = ranks - ranks.mean()
    return float(1.0 - ((ranks - fitted) ** 2).sum() / (centred**2).sum())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks of ties, centred and scaled to about one: powers of them stay well conditioned."""
    ranks = np.asarray(rankdata(values), np.float64)
    centred: np.ndarray = (ranks - ranks.mean()) / len(values)
    return centred
