"""Named warnings when predictions on unlabelled patches flood or collapse (METHOD traps 9 and 10), or numbers end.

The former compare means over the last `WINDOW` steps. An alarm is a function of the rows of metrics.jsonl alone, so a
resumed run raises it where an undisturbed one would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 25
# Labelled patches are drawn towards the object, unlabelled ones are not: on those the object should fill less.
FLOOD_RATIO = 2.0  # predicted share on unlabelled patches over the true share on labelled ones
COLLAPSE_RATIO = 0.01
# Of that ratio in a branch's first WINDOW steps; tells 5 runs that lost overlap from 60 that did not (RESULTS.md).
SHRINK_RATIO = 0.25
MATCHED_FLOOD = 0.5  # share of the matched voxels that matching calls foreground; the truth is a few per cent
MATCHED_LEAST = 1e-4  # of the unlabelled voxels: where fewer are matched, a handful would decide

_SHARES = ("foreground_unlabelled", "foreground_target", "foreground_matched")

TEXT = {
    "alarm_not_finite": "not finite: a loss or a gradient; such steps are skipped, metrics.jsonl says which scans",
    "alarm_flood": "flood: the student calls {foreground_unlabelled:.0%} of unlabelled patches foreground, "
    "labelled ones hold {foreground_target:.0%}; its teacher may be confirming its own excess",
    "alarm_matched_flood": "flood of matched labels: {foreground_matched:.0%} of the voxels the teacher is unsure of "
    "are matched to foreground; surface references may look like other tissue",
    "alarm_collapse": "collapse: the student calls {foreground_unlabelled:.2%} of unlabelled patches foreground, "
    "labelled ones hold {foreground_target:.0%}",
    "alarm_shrink": "shrinking: the student calls {foreground_unlabelled:.2%} of unlabelled patches foreground, "
    "labelled ones hold {foreground_target:.1%}; a quarter of what it began with, or less: pseudo-labels may take the "
    "object away",
}


class Alarms:
    """Feed it each row in order; it returns the row's alarms.

    `branched`: the run began with a trained student (`train.init_from`), whose share at the start means something;
    then `earlier` is every row so far, else the last `WINDOW` will do.
    """

    def __init__(self, earlier: Iterable[Mapping[str, Any]], *, branched: bool = False) -> None:
        rows = list(earlier)
        self._rows: deque[Mapping[str, Any]] = deque(rows, maxlen=WINDOW)
        self._branched, self._first = branched, rows[:WINDOW]

    def of(self, row: Mapping[str, Any]) -> dict[str, int]:
        """Alarm name -> 1, for those that sound at this row; of shares none before `WINDOW` rows are there."""
        self._rows.append(row)
        if len(self._first) < WINDOW:
            self._first.append(row)
        sounding = {"alarm_not_finite": "not_finite" in row}
        means = window_means(self._rows) if len(self._rows) == WINDOW else {}
        predicted, target = means.get("foreground_unlabelled"), means.get("foreground_target")
        if predicted is not None and target:
            sounding["alarm_flood"] = predicted > FLOOD_RATIO * target
            sounding["alarm_collapse"] = predicted < COLLAPSE_RATIO * target
            if self._branched:
                sounding["alarm_shrink"] = predicted / target < SHRINK_RATIO * self._ratio_at_first()
        matched = means.get("foreground_matched")
        if matched is not None and means.get("coverage_matched", 1.0) >= MATCHED_LEAST:
            sounding["alarm_matched_flood"] = matched > MATCHED_FLOOD
        return {name: 1 for name, on in sounding.items() if on}

    def _ratio_at_first(self) -> float:
        means = window_means(self._first)
        target = means.get("foreground_target")
        return means.get("foreground_unlabelled", 0.0) / target if target else 0.0


def window_means(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each share over the rows that have it; of the matched voxels, each voxel counts the same."""
    rows = list(rows)
    means = {}
    for name in (*_SHARES, "coverage_matched"):
        having = [row for row in rows if row.get(name) is not None]
        weights = [row.get("coverage_matched", 1.0) if name == "foreground_matched" else 1.0 for row in having]
        if sum(weights):
            means[name] = sum(row[name] * weight for row, weight in zip(having, weights, strict=True)) / sum(weights)
    return means


def alarm_text(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The warning for one alarm of the last of `rows`, in words; figures are means over them."""
    return f"step {rows[-1]['step']}: {_in_words(name, window_means(rows))}"


def _in_words(name: str, shares: Mapping[str, Any]) -> str:
    return TEXT[name].format(**{key: shares.get(key) or 0.0 for key in _SHARES})


@dataclass(frozen=True)
class Sounded:
    """An alarm of a run that sounded at `steps` of `total` steps, between `first` and `last`. `text` has the means over
    those steps."""

    name: str
    text: str
    first: int
    last: int
    steps: int
    total: int

    @property
    def title(self) -> str:
        return self.text.partition(": ")[0].capitalize()

    @property
    def detail(self) -> str:
        """What, and when."""
        return f"{self.text.partition(': ')[2]}; {self.when}"

    @property
    def when(self) -> str:
        return f"at {self.steps} of {self.total} steps, from {self.first} to {self.last}"


def sounded(rows: Iterable[Mapping[str, Any]]) -> list[Sounded]:
    """The alarms of a run, from the rows of its metrics.jsonl; in the order of `TEXT`."""
    rows = list(rows)
    found = []
    for name in TEXT:
        mine = [row for row in rows if row.get(name)]
        if mine:
            steps = [int(row["step"]) for row in mine]
            found.append(Sounded(name, _in_words(name, window_means(mine)), steps[0], steps[-1], len(mine), len(rows)))
    return found
