"""A benchmark's readings as tables of text, for Markdown, HTML and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distseg.evaluation.benchmark_tables import METRICS, SMALLER_IS_BETTER, Reading

_LABELS = {"iou": "IoU", "dice": "Dice", "hd95_mm": "HD95, mm"}
_DIGITS = {"iou": 3, "dice": 3, "hd95_mm": 1}
_COMPONENTS = {"all": "as predicted", "largest": "largest component only"}


@dataclass(frozen=True)
class Grid:
    """A table of text: `head` names its columns, each of `lines` has as many cells; the first column is a name."""

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str = ""


def title_of(reading: Reading) -> str:
    return f"{reading.class_name}, {reading.network}, {_COMPONENTS[reading.component]}"


def summary_grid(reading: Reading) -> Grid:
    """A line a row of the suite. `±` is the sd over seeds of the mean over scans."""
    columns = [f"{_LABELS[metric]} {what}" for metric in METRICS for what in ("mean", "± seeds", "median")]
    lines = []
    for place, first in enumerate(reading.summaries[METRICS[0]]):
        cells = [first.method]
        for metric in METRICS:
            summary, digits = reading.summaries[metric][place], _DIGITS[metric]
            cells += [text(summary.mean, digits), text(summary.seed_sd, digits), text(summary.median, digits)]
        runs = first.scans * len(first.seed_means)
        lines.append((*cells, f"{reading.missed[first.method]} of {runs}", str(len(first.seed_means))))
    note = f"{reading.summaries[METRICS[0]][0].scans} scans, each averaged over the seeds first."
    if reading.left_out:
        note += f" Not counted by every run and left out: {', '.join(reading.left_out)}."
    return Grid(title_of(reading), ("Row", *columns, "Missed", "Seeds"), tuple(lines), note)


def comparison_grid(reading: Reading) -> Grid | None:
    """Differences are row minus reference, paired by scan; None where nothing was compared."""
    lines = []
    for metric in METRICS:
        for verdict in reading.verdicts[metric]:
            found, digits = verdict.comparison, _DIGITS[metric]
            ratio = ("\u2013", "\u2013")
            if metric in SMALLER_IS_BETTER:
                ratio = (text(found.median_ratio, 2), f"{text(found.ratio_low, 2)} to {text(found.ratio_high, 2)}")
            lines.append(
                (
                    f"{found.method} against {found.baseline}",
                    _LABELS[metric],
                    signed(found.mean_difference, digits),
                    _interval(found.difference_low, found.difference_high, digits),
                    *ratio,
                    p_text(found.p_wilcoxon),
                    p_text(found.p_holm),
                    text(verdict.detectable, digits),
                    verdict.reads,
                )
            )
    if not lines:
        return None
    head = (
        "Comparison", "Metric", "Mean difference", "95 % interval", "Ratio of medians", "95 % interval",
        "p", "p, Holm", "Detectable", "Reads",
    )  # fmt: skip
    return Grid(f"{title_of(reading)}: paired by scan", head, tuple(lines))


def text(value: float | None, digits: int) -> str:
    """A figure for a table; an en dash where there is none."""
    return "\u2013" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """With a sign, unless it rounds to nothing."""
    shown = f"{value:+.{digits}f}".replace("-", "\u2212")
    return shown if any(digit in shown for digit in "123456789") else shown[1:]


def p_text(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0") if p < 1 else "1"


def _interval(low: float, high: float, digits: int) -> str:
    return f"{signed(low, digits)} to {signed(high, digits)}"


def markdown(grid: Grid) -> str:
    """A table of GitHub's Markdown under its title."""
    cells = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (grid.head, *grid.lines)]
    rule = "|".join(["---", *["---:"] * (len(grid.head) - 1)])
    table = "\n".join([f"| {cells[0]} |", f"|{rule}|", *(f"| {line} |" for line in cells[1:])])
    return f"**{grid.title}**\n\n{table}\n" + (f"\n{grid.note}\n" if grid.note else "")
