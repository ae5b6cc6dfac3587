"""report.html of a sweep: one file with its pictures inside, no scripts, nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from distseg.evaluation.benchmark_grids import Grid
from distseg.evaluation.page import Picture, document, failures_html, glossary, heading, picture_html, section


@dataclass(frozen=True)
class TunePage:
    """`lead` and `notes` are plain sentences."""

    space: str
    description: str
    lead: Sequence[str]
    notes: Sequence[str]
    pictures: Sequence[Picture]
    best: Grid | None
    trials: Grid
    failed: Sequence[tuple[str, str]]


def render_tune_page(page: TunePage) -> str:
    lead = f"<p class=lead>{escape(' '.join(page.lead))}</p>"
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in page.notes)
    parts = [
        heading("Sweep", page.space, lead + notes),
        failures_html("Failed; the same command tries them again", page.failed),
        section("The best beside the default", _table(page.best) if page.best else ""),
        *(section(picture.title, picture_html(picture)) for picture in page.pictures),
        section("Every trial", _table(page.trials)),
        section("How to read this", _how_to_read()),
    ]
    return document(f"{page.space}: sweep", parts=parts, style=_STYLE)


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{escape(name)}" for name in grid.head)
    lines = [
        f"<tr class='{escape(line[1])}'><th scope=row>{escape(line[0])}" + "".join(f"<td>{escape(c)}" for c in line[1:])
        for line in grid.lines
    ]
    note = f"<p class=note>{escape(grid.note)}</p>" if grid.note else ""
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{note}"


def _how_to_read() -> str:
    terms = (
        (
            "Objective",
            "Measured on patches of validation scans, the same for every trial at every look; test scans are never "
            "opened. The best of many trials is flattered by the choice: measure it anew with distseg evaluate on "
            "scans that had no say, and with other seeds, before believing in a small gain.",
        ),
        ("Stopped early", "ASHA lets one trial in so many go on at each rung, by its objective among those there."),
        ("Default", "The configuration as it stands, with no key of the space changed."),
        (
            "Explained",
            "Share of the objective's variance, in ranks, that one key alone explains over the trials; chance: what 19 "
            "of 20 sweeps of pure noise stay below. Keys that act only together are not seen.",
        ),
        ("Steps", "Optimiser steps of the trial; the shared warm-up is counted once, for all."),
    )
    return glossary(terms)


_STYLE = """
table { font-size: 13px; } th, td { padding: 4px 9px; } thead th { white-space: normal; }
thead th:first-child, tbody th { text-align: left; }
tr.stopped td, tr.stopped th { color: #7b8794; } tr.failed td, tr.failed th { color: #b44d12; }
figcaption b { display: none; } figcaption span { margin-left: 0; }
"""
