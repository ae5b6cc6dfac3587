"""report.html: one file for a clinician to open, with its pictures inside, no scripts and nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from distseg.evaluation.metrics import ScoreRow
from distseg.evaluation.page import Picture, document, failures_html, glossary, heading, picture_html, section


@dataclass(frozen=True)
class ReportContent:
    """`metrics` is the content of metrics.json, `rows` every line of per_scan.csv."""

    run_name: str
    method: str | None
    metrics: Mapping[str, Any]
    rows: Sequence[ScoreRow]
    scans: Sequence[Picture]
    curves: Picture | None
    failed: Sequence[tuple[str, str]] = ()
    warnings: Sequence[tuple[str, str]] = ()  # what its training warned of: (what, when)


def render_report(content: ReportContent) -> str:
    """The whole page."""
    parts = [
        heading("Segmentation report", content.run_name, _lead(content)),
        failures_html(f"{_count(len(content.failed), 'scan')} failed and are in no figure here", content.failed),
        failures_html("Warnings while it trained", content.warnings),
        section("Results", _summary_table(content) + _how_to_read()),
        section("Scans to look at", "".join(map(picture_html, content.scans))),
        section("Every scan", _scan_table(content)),
        section("How it was trained", picture_html(content.curves) if content.curves else ""),
    ]
    return document(f"{content.run_name}: segmentation report", parts=parts, style=_STYLE)


def number(value: float | None, digits: int) -> str:
    """A figure for a table; an en dash where there is none."""
    return "\u2013" if value is None else f"{value:.{digits}f}"


def _lead(content: ReportContent) -> str:
    metrics = content.metrics
    skipped, missed = metrics["scans_without_annotation"], metrics["mean"]["missed"]
    names = list(metrics["classes"])
    objects = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    scans = _count(metrics["scans"], "scan")
    split = "all splits" if metrics["split"] == "all" else f"split “{metrics['split']}”"
    trained = f", trained with the method {content.method.replace('_', ' ')}," if content.method else ""
    text = (
        f"The network{trained} outlined {objects} on {scans} of the cohort {metrics['cohort']} ({split}); each result "
        "was compared with the scan's annotation, at the scan's own resolution."
    )
    dice = metrics["mean"]["dice"]
    facts = [
        (number(dice["median"], 2), "median Dice"),
        (number(metrics["mean"]["hd95_mm"]["median"], 1) + " mm", "median HD95"),
        (str(missed), "missed"),
        (str(metrics["scans"]), "scans"),
    ]
    tiles = "".join(f"<div><b>{escape(value)}</b><span>{label}</span></div>" for value, label in facts)
    asked = f"These figures are the {metrics['network']} network's, checkpoint {metrics['checkpoint']}."
    if skipped:
        asked += f" {_count(skipped, 'scan')} without annotation left out."
    return f"<p class=lead>{escape(text)}</p><div class=tiles>{tiles}</div><p class=note>{escape(asked)}</p>"


def _summary_table(content: ReportContent) -> str:
    head = (
        "<tr><th rowspan=2>Structure<th rowspan=2>Network<th rowspan=2>Islands"
        "<th colspan=2>Dice<th colspan=2>IoU<th colspan=2>HD95, mm<th colspan=2>Mean distance, mm<th rowspan=2>Missed"
        "<th rowspan=2>False alarms</tr>" + "<tr>" + "<th>mean<th>median" * 4 + "</tr>"
    )
    metrics = content.metrics
    networks = {metrics["network"]: metrics, **{k: metrics[k] for k in ("student", "teacher") if k in metrics}}
    body = []
    names = list(metrics["classes"])
    filtered = metrics.get("keeps_largest_component", [])
    as_predicted = f"as predicted, {len(filtered)} of {len(names)} filtered" if filtered else "as predicted"
    for structure in [*names, *(["mean of structures"] if len(names) > 1 else [])]:
        lines = [
            (network, kind, part["classes"].get(structure, part["mean"]))
            for network, whole in networks.items()
            for kind, part in ((as_predicted, whole), ("largest only", whole["largest_component"]))
        ]
        for i, (network, kind, entry) in enumerate(lines):
            first = f"<th scope=row rowspan={len(lines)}>{escape(structure)}" if i == 0 else ""
            span = f"<td rowspan=2>{escape(network)}" if i % 2 == 0 else ""
            figures = "".join(
                f"<td>{number(entry[metric][figure], digits)}"
                for metric, digits in (("dice", 3), ("iou", 3), ("hd95_mm", 1), ("asd_mm", 2))
                for figure in ("mean", "median")
            )
            body.append(
                f"<tr{' class=first' if i == 0 else ''}>{first}{span}<td class=kind>{kind}{figures}"
                f"<td>{entry['missed']}<td>{entry['false_alarms']}</tr>"
            )
    return f"<div class=scroll><table class=summary><thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"


def _how_to_read() -> str:
    terms = (
        (
            "Dice and IoU",
            "How much the predicted and the annotated region overlap: 1 is the same region, 0 no overlap. IoU is the "
            "shared volume divided by the volume of both together; Dice, the shared volume divided by their average, "
            "is always the higher of the two.",
        ),
        (
            "HD95",
            "How far the outlines are apart where they agree worst: 95 % of the surface lies closer than this, in "
            "millimetres, whichever of the two outlines one starts from. Small stray islands make it large.",
        ),
        ("Mean distance", "The average distance between the two surfaces, in millimetres."),
        (
            "Missed",
            "The structure is in the scan but nothing was predicted. It counts as Dice 0 and as a distance of the "
            "whole image's diagonal, so missing a structure never improves an average. A false alarm is the reverse.",
        ),
        (
            "Islands",
            "“Largest only” keeps the largest connected piece of each structure and drops the rest.",
        ),
        (
            "Student and teacher",
            "The two networks of one training: the student learns, the teacher is its running average.",
        ),
    )
    return f"<h3>How to read this</h3>{glossary(terms)}"


def _scan_table(content: ReportContent) -> str:
    """The tested network's figures, as predicted, worst Dice first; classes absent from scan and prediction last."""
    network = content.metrics["network"]
    rows = [row for row in content.rows if row.network == network and row.component == "all"]
    rows.sort(key=lambda row: (row.score.dice is None, row.score.dice, row.scan_id))
    words = {"found": "", "missed": "missed", "false_alarm": "false alarm", "absent": "not in this scan"}
    body = "".join(
        f"<tr><th scope=row>{escape(row.scan_id)}<td class=kind>{escape(row.class_name)}"
        f"<td>{number(row.score.dice, 3)}<td>{number(row.score.iou, 3)}<td>{number(row.score.hd95_mm, 1)}"
        f"<td>{number(row.score.asd_mm, 2)}<td>{number(row.score.truth_ml, 1)}<td>{number(row.score.predicted_ml, 1)}"
        f"<td class=status>{words[row.score.status]}</tr>"
        for row in rows
    )
    head = (
        "<tr><th>Scan<th>Structure<th>Dice<th>IoU<th>HD95, mm<th>Mean distance, mm"
        "<th>Annotated, ml<th>Predicted, ml<th></tr>"
    )
    note = f"<p class=note>The {escape(network)} network, as predicted; lowest Dice first.</p>"
    return f"{note}<div class=scroll><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


_STYLE = """
.tiles { display: flex; gap: 44px; margin: 24px 0 14px; flex-wrap: wrap; }
.tiles div { display: flex; flex-direction: column; }
.tiles b { font-size: 28px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: #616e7c; font-size: 13px; }
thead th[colspan] { text-align: center; border-bottom-color: #e4e7eb; }
tbody th, thead th:first-child, .kind, td[rowspan], .summary thead tr:first-child th:nth-child(-n+3),
thead th:nth-child(2):not(.summary *) { text-align: left; }
td[rowspan], tbody th[rowspan] { vertical-align: top; }
.status { color: #b44d12; text-align: left; }
img { width: 100%; }
"""
