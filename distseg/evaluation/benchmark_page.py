"""report.html of a benchmark: one file with its pictures inside, no scripts, nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from distseg.evaluation.benchmark_grids import Grid, comparison_grid, summary_grid
from distseg.evaluation.benchmark_tables import SIGNIFICANT, Reading
from distseg.evaluation.page import Picture, document, failures_html, glossary, heading, picture_html, section

SEEDS_TO_RANK = 3  # METHOD section 5
_WARNINGS = "Warnings while they trained"
_TEXT_COLUMNS = ("Metric", "Reads", "State", "Passes per step")


@dataclass(frozen=True)
class BenchmarkPage:
    """`subsets` are the labelled ids and `titles` the words, by the subset's name; `detectable_sd` is in sd of the
    paired difference."""

    name: str
    description: str
    cohort: str
    split: str
    scans: int
    seeds: Sequence[int]
    subsets: Mapping[int | str, Sequence[str]]
    titles: Mapping[int | str, str]
    readings: Sequence[Reading]
    network: str
    comparisons: int
    detectable_sd: float
    anatomy: Sequence[Picture]
    curves: Sequence[Picture]
    costs: Grid
    cells: Grid
    failed: Sequence[tuple[str, str]]
    warnings: Sequence[tuple[str, str]]  # of training: (row, what and when)


def render_page(page: BenchmarkPage) -> str:
    names = dict.fromkeys(reading.labelled for reading in page.readings)
    every_cell = f"<details><summary>Every cell</summary>{_table(page.cells)}</details>"
    parts = [
        heading("Benchmark", page.name, _lead(page)),
        failures_html("Failed, and in no table here; the same command tries them again", page.failed),
        failures_html(_WARNINGS, page.warnings),
        *(_results(page, name) for name in names),
        section("How to read this", _how_to_read()),
        section("The same slice by every row", "".join(map(picture_html, page.anatomy))),
        section("How they trained", "".join(map(picture_html, page.curves))),
        section("What it took", _table(page.costs) + every_cell),
    ]
    return document(f"{page.name}: benchmark", parts=parts, style=_STYLE)


def markdown_head(page: BenchmarkPage) -> str:
    lines = [f"# Benchmark {page.name}", "", _what(page), "", _power(page)]
    if page.failed:
        lines += ["", "Failed, and in no table:", "", *(f"- {cell}: {why}" for cell, why in page.failed)]
    if page.warnings:
        lines += ["", f"{_WARNINGS}:", "", *(f"- {row}: {what}" for row, what in page.warnings)]
    return "\n".join(lines) + "\n"


def _what(page: BenchmarkPage) -> str:
    seeds = f"{len(page.seeds)} seeds" if len(page.seeds) > 1 else "one seed"
    *others, last = page.titles.values()
    labels = f"{', '.join(others)} and {last}" if others else last
    about = f"{page.description[:1].upper()}{page.description[1:]}. " if page.description else ""
    return (
        f"{about}Trained on {labels} of the cohort {page.cohort}, all the rest of it unlabelled, with "
        f"{seeds}; measured on the {page.scans} annotated scans of the split “{page.split}”, in their native grids, at "
        "the last checkpoint: nothing was selected on them."
    )


def _power(page: BenchmarkPage) -> str:
    tests = f"{page.comparisons} comparison{'s' if page.comparisons != 1 else ''}"
    power = (
        f"With {page.scans} scans and {tests} a metric, a mean paired difference of {page.detectable_sd:.2f} of its "
        "standard deviation over scans is found with a power of 80 %; smaller ones may exist unseen."
    )
    if len(page.seeds) < SEEDS_TO_RANK:
        power += (
            f" Fewer than {SEEDS_TO_RANK} seeds: intervals and tests know the scans' spread, not that of training, so "
            "they rank these runs and not the methods."
        )
    return power


def _lead(page: BenchmarkPage) -> str:
    return f"<p class=lead>{escape(_what(page))}</p><p class=note>{escape(_power(page))}</p>"


def _results(page: BenchmarkPage, name: int | str) -> str:
    """The tested network as predicted first and open; the other readings follow under it."""
    readings = [reading for reading in page.readings if reading.labelled == name]
    first = [r for r in readings if r.network == page.network and r.component == "all"]
    rest = [r for r in readings if r not in first]
    others = "".join(_reading(reading) for reading in rest)
    ids = ", ".join(page.subsets[name])
    body = "".join(_reading(reading) for reading in first) + others + f"<p class=note>Labelled: {escape(ids)}.</p>"
    return section(page.titles[name], body)


def _reading(reading: Reading) -> str:
    comparison = comparison_grid(reading)
    summary = summary_grid(reading)
    compared = _table(comparison) if comparison else ""
    return f"<h3>{escape(summary.title)}</h3>{_table(summary)}{compared}"


def _table(grid: Grid) -> str:
    kinds = ["text" if i == 0 or name in _TEXT_COLUMNS else "" for i, name in enumerate(grid.head)]
    head = "".join(f"<th class={kind}>{escape(name)}" if kind else f"<th>{escape(name)}" for name, kind in
                   zip(grid.head, kinds, strict=True))  # fmt: skip
    lines = []
    for line in grid.lines:
        cells = "".join(
            f"<td class='{kind} {_mark(cell)}'>{escape(cell)}" for cell, kind in zip(line[1:], kinds[1:], strict=True)
        )
        lines.append(f"<tr><th scope=row class=text>{escape(line[0])}{cells}</tr>")
    note = f"<p class=note>{escape(grid.note)}</p>" if grid.note else ""
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{note}"


def _mark(cell: str) -> str:
    return cell if cell in ("better", "worse", "failed") else ""


def _how_to_read() -> str:
    terms = (
        ("IoU, Dice", "Overlap of the predicted and the annotated region; 1 is the same region. Higher is better."),
        (
            "HD95",
            "Distance in millimetres within which 95 % of the two surfaces lie of each other. Lower is better; small "
            "stray islands make it large, so all is told again for the largest component alone.",
        ),
        (
            "Missed",
            "The structure is there and nothing was predicted: it costs IoU 0 and the image's diagonal as HD95. "
            "Counted over all seeds and scans.",
        ),
        (
            "Mean, median, ± seeds",
            "Each scan is first averaged over the seeds; mean and median are over scans. ± is the standard deviation "
            "over seeds of the mean over scans: how much chance in training moves a row.",
        ),
        (
            "Interval, p",
            "95 % bootstrap interval of the mean difference, paired by scan; Wilcoxon's signed-rank test, and its p "
            "after Holm's correction over all comparisons of the metric. “Better” and “worse” "
            f"mean p below {SIGNIFICANT} after it; “not shown” is not the same as equal.",
        ),
        (
            "Detectable",
            "The mean difference, in the metric's unit, that this many scans find in 4 of 5 such benchmarks, given the "
            "spread that was seen.",
        ),
        ("Student, teacher", "The two networks of one training: the student learns, the teacher is its average."),
    )
    return glossary(terms)


_STYLE = """
table { font-size: 13px; } th, td { padding: 4px 8px; } thead th { font-size: 12px; white-space: normal; }
.text { text-align: left; } .better { color: #00664b; font-weight: 600; }
.worse, .failed { color: #b44d12; font-weight: 600; }
details { margin-top: 14px; } summary { cursor: pointer; }
"""
