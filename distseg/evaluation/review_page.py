"""review.html of a labelling: the scans to look at first, with pictures, and those to annotate next. One file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from distseg.evaluation.page import Picture, document, failures_html, glossary, heading, picture_html, section
from distseg.evaluation.report import number

MOST_ROWS = 200  # of the table; scans.csv has them all


@dataclass(frozen=True)
class ReviewContent:
    """`rows` are lines of scans.csv, the least to be trusted first; `next_ids` by method; `notes` say what was not to
    be had."""

    run_name: str
    method: str
    matched: bool  # whether the run has references to match against
    rows: Sequence[Mapping[str, Any]]
    pictures: Sequence[Picture]
    next_ids: Mapping[str, Sequence[str]]
    set_aside: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()


def render_review(content: ReviewContent) -> str:
    """The whole page."""
    count = len(content.set_aside)
    failed = f"{count} {'scan has' if count == 1 else 'scans have'} no mask"
    parts = [
        heading("Pseudo-labels to review", content.run_name, _lead(content)),
        failures_html(failed, content.set_aside),
        section("Look at these first", "".join(map(picture_html, content.pictures))),
        section("Scans by expected error", _table(content)),
        section("Worth annotating next", _next(content)),
        section("How to read this", glossary(_TERMS)),
    ]
    return document(f"{content.run_name}: pseudo-labels to review", parts=parts, style=_STYLE)


def _lead(content: ReviewContent) -> str:
    how = (
        "Where the network was in doubt, voxels were labelled by the labelled scans' voxels they are most similar to."
        if content.matched
        else "This run has no references to match against: where the network was in doubt its best guess stands."
    )
    text = (
        f"{len(content.rows)} scans were labelled by the network trained with the method "
        f"{content.method.replace('_', ' ')}. {how} No annotation was looked at here: the order below says which masks "
        "are most likely wrong, not how wrong they are."
    )
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in content.notes)
    return f"<p class=lead>{escape(text)}</p>{notes}"


_COLUMNS = (
    ("expected_error", "Expected error", 2),
    ("expected_dice", "Expected Dice", 3),
    ("surface_entropy", "Doubt at the surface", 3),
    ("doubtful_share", "In doubt, share of object", 3),
    ("disagreement", "Matching disagrees", 2),
    ("components", "Pieces", 0),
    ("volume_deviation", "Volume off by, sd", 1),
    ("volume_ml", "Volume, ml", 1),
)


def _table(content: ReviewContent) -> str:
    head = "<tr><th>Scan" + "".join(f"<th>{title}" for _, title, _ in _COLUMNS) + "</tr>"
    body = "".join(
        f"<tr><th scope=row>{escape(str(row['scan_id']))}"
        + "".join(f"<td>{number(row[key], digits)}" for key, _, digits in _COLUMNS)
        + "</tr>"
        for row in content.rows[:MOST_ROWS]
    )
    more = len(content.rows) - MOST_ROWS
    note = f"<p class=note>{more} more are in scans.csv.</p>" if more > 0 else ""
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}"


def _next(content: ReviewContent) -> str:
    if not any(content.next_ids.values()):
        return "<p class=note>Every scan here has an annotation.</p>"
    titles = {"doubt_and_diversity": "In doubt and unlike each other", "random": "Drawn at random (the baseline)"}
    columns = "".join(
        f"<div><h3>{titles[by]}</h3><ol>{''.join(f'<li>{escape(scan)}' for scan in ids)}</ol></div>"
        for by, ids in content.next_ids.items()
    )
    return f"<div class=pair>{columns}</div>"


_TERMS = (
    ("Expected error", "The mean of a scan's ranks, among all scans here, in the columns beside it; 1 is the worst."),
    (
        "Expected Dice",
        "The overlap of the mask with what the network itself thinks likely, averaged over its passes; 1 is certain.",
    ),
    (
        "Doubt at the surface",
        "The network's entropy next to the outline, as a share of the largest possible. Some is normal: an outline "
        "lies between voxels.",
    ),
    ("In doubt", "Voxels the network was unsure of, divided by the voxels of the object."),
    ("Matching disagrees", "Of the voxels labelled by matching, those whose label is not the network's guess."),
    ("Pieces", "Separate pieces of the object, over all structures. More than in annotated scans means islands."),
    ("Volume off by", "How far the volume is from that of the annotated scans, in standard deviations."),
)

_STYLE = """
.pair { display: flex; gap: 60px; flex-wrap: wrap; } ol { padding-left: 26px; margin: 0; }
tbody th, thead th:first-child { text-align: left; } img { width: 100%; } thead th { white-space: normal; }
"""
