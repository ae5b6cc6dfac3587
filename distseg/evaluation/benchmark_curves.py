"""Training curves of a benchmark: a column per row of the suite, a line of panels per theme, axes shared along it.

Phase A comes first and is the same in every column; the dotted line is where the rows branch. Every seed is a thin
line, their mean a bold one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from distseg.evaluation.curves import COLOURS, FAINT, MUTED, running_mean
from distseg.evaluation.figures import INK, new_figure

Rows = Sequence[Mapping[str, Any]]
COLUMNS = 4  # of a figure; more rows go to further figures
SMOOTHED_FROM_ROWS = 60


@dataclass(frozen=True)
class RunCurves:
    """metrics.jsonl of a run and of the phase A it branched from."""

    row: str
    seed: int
    phase_a: Rows
    phase_b: Rows


@dataclass(frozen=True)
class _Theme:
    """Keys that begin with `prefix` and end with `suffix`, `but` for one; the legend names them by what is between."""

    title: str
    prefix: str
    suffix: str = ""
    but: str = ""
    share: bool = False
    itself: str = ""  # what the legend calls the key that is the prefix


_THEMES = (
    _Theme("Loss terms, unweighted", "loss_"),
    _Theme("Unlabelled voxels, share reliable", "coverage_reliable", share=True, itself="reliable"),
    _Theme("Unlabelled voxels, share for matching", "coverage_", but="coverage_reliable"),  # few: an axis of its own
    _Theme("Foreground, share of voxels", "foreground_"),
    _Theme("Labels right where the teacher is unsure", "", "_accuracy", share=True),
    _Theme("Dice of validation patches", "val_dice", share=True, itself="student"),
)


def benchmark_curves(runs: Sequence[RunCurves]) -> list[Figure]:
    """Figures of at most `COLUMNS` rows of the suite each; none where there is nothing to draw."""
    names = list(dict.fromkeys(run.row for run in runs))
    drawn = [(theme, keys) for theme in _THEMES if (keys := _keys(theme, runs))]
    if not drawn:
        return []
    limits = {theme.title: _limits(theme, keys, runs) for theme, keys in drawn}
    return [_figure(names[i : i + COLUMNS], runs, drawn, limits) for i in range(0, len(names), COLUMNS)]


def _keys(theme: _Theme, runs: Sequence[RunCurves]) -> list[str]:
    """Keys of the theme that some row gives a number, in order of first appearance."""
    rows = [row for run in runs for part in (run.phase_a, run.phase_b) for row in part]
    seen = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    return [key for key in seen if key.startswith(theme.prefix) and key.endswith(theme.suffix) and key != theme.but]


def _figure(
    names: Sequence[str],
    runs: Sequence[RunCurves],
    drawn: Sequence[tuple[_Theme, list[str]]],
    limits: Mapping[str, tuple[float, float]],
) -> Figure:
    """The last column holds the legend of each line: a key has one colour in all of them."""
    widths = [2.4] * len(names) + [0.9]
    figure = new_figure(sum(widths) + 0.3, 1.75 * len(drawn) + 0.4)
    cells = figure.subplots(len(drawn), len(widths), squeeze=False, sharex="col", gridspec_kw={"width_ratios": widths})
    for line, (theme, keys) in enumerate(drawn):
        for column, name in enumerate(names):
            axes = cells[line, column]
            _draw(axes, keys, [run for run in runs if run.row == name])
            axes.set_ylim(*limits[theme.title])
            _dress(axes, left=column == 0, bottom=line == len(drawn) - 1)
            if line == 0:
                axes.set_title(name.replace("_", " "), fontsize=9, color=INK, pad=18, fontweight="bold")
            if column == 0:
                axes.text(0, 1.04, theme.title, transform=axes.transAxes, fontsize=8, color=INK, va="bottom")
        handles = [
            Line2D([], [], color=colour, linewidth=1.6, label=_words(theme, key))
            for key, colour in zip(keys, COLOURS * len(keys), strict=False)
        ]
        cells[line, -1].set_axis_off()
        cells[line, -1].legend(
            handles=handles, loc="center left", fontsize=7, frameon=False, labelcolor=INK, handlelength=1.2, borderpad=0
        )
    figure.tight_layout(pad=0.5, w_pad=0.6, h_pad=0.9)
    return figure


def _words(theme: _Theme, key: str) -> str:
    between = key.removeprefix(theme.prefix).removesuffix(theme.suffix)
    return between.strip("_").replace("_", " ") or theme.itself


def _draw(axes: Axes, keys: Sequence[str], runs: Sequence[RunCurves]) -> None:
    """Each key of each seed, and the mean over seeds."""
    drawn = False
    for key, colour in zip(keys, COLOURS * len(keys), strict=False):
        lines = [line for run in runs if len(line := _points(run, key))]
        if not lines:
            continue
        drawn = True
        smooth = [_smoothed(line) for line in lines]
        for line in smooth if len(smooth) > 1 else lines if len(lines[0]) >= SMOOTHED_FROM_ROWS else []:
            axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.6, alpha=0.35)
        mean = _mean_over_seeds(smooth)
        marker = "o" if len(mean) <= 30 else ""
        axes.plot(mean[:, 0], mean[:, 1], color=colour, linewidth=1.4, marker=marker, markersize=2)
    if not drawn:
        axes.text(0.5, 0.5, "not in this method", ha="center", va="center", fontsize=7, color=MUTED,
                  transform=axes.transAxes)  # fmt: skip
    for branch in {len(run.phase_a) for run in runs}:
        axes.axvline(branch, color=MUTED, linewidth=0.8, linestyle=":")


def _points(run: RunCurves, key: str) -> np.ndarray:
    """float64 [n, 2] step over A + B and value."""
    offset = len(run.phase_a)
    points = [(row["step"], row[key]) for row in run.phase_a if isinstance(row.get(key), int | float)]
    points += [(offset + row["step"], row[key]) for row in run.phase_b if isinstance(row.get(key), int | float)]
    return np.array(points, np.float64).reshape(-1, 2)


def _smoothed(points: np.ndarray) -> np.ndarray:
    if len(points) < SMOOTHED_FROM_ROWS:
        return points
    return np.stack([points[:, 0], running_mean(points[:, 1])], axis=1)


def _mean_over_seeds(lines: Sequence[np.ndarray]) -> np.ndarray:
    """[n, 2] at the steps that every seed has: some are None where a share had nothing to be a share of."""
    steps = sorted(set.intersection(*({float(step) for step in line[:, 0]} for line in lines)))
    by_step = [dict(line.tolist()) for line in lines]
    return np.array([(step, np.mean([values[step] for values in by_step])) for step in steps]).reshape(-1, 2)


def _limits(theme: _Theme, keys: Sequence[str], runs: Sequence[RunCurves]) -> tuple[float, float]:
    """One axis for all columns, so that rows can be compared; the highest spikes of single steps may leave it."""
    if theme.share:
        return 0.0, 1.05
    values = np.concatenate(
        [_smoothed(points)[:, 1] for run in runs for key in keys if len(points := _points(run, key))]
    )
    top = float(np.percentile(values, 99.5)) if len(values) >= SMOOTHED_FROM_ROWS else float(values.max())
    return min(0.0, float(values.min())), top * 1.1 or 1.0


def _dress(axes: Axes, *, left: bool, bottom: bool) -> None:
    axes.tick_params(labelsize=7, colors=MUTED, length=2, labelleft=left, labelbottom=bottom)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    if bottom:
        axes.set_xlabel("step, phases A and B", fontsize=7, color=MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
