"""report.html: one file for a clinician to open, with its pictures inside, no scripts and nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from distseg.evaluation.figures import data_uri
from distseg.evaluation.metrics import ScoreRow


@dataclass(frozen=True)
class Picture:
    """`title` and `caption` are plain text; `png` the picture's bytes."""

    title: str
    caption: str
    png: bytes


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


def render_report(content: ReportContent) -> str:
    """The whole page."""
    name = escape(content.run_name)
    parts = [
        f"<header><p class=over>Segmentation report</p><h1>{name}</h1>{_lead(content)}</header>",
        _failures(content.failed),
        _section("Results", _summary_table(content) + _how_to_read()),
        _section("Scans to look at", "".join(_picture(picture) for picture in content.scans)),
        _section("Every scan", _scan_table(content)),
        _section("How it was trained", _picture(content.curves)) if content.curves else "",
        "<footer>Research use only. Not a medical device; not for diagnosis or treatment planning.</footer>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: segmentation report</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


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
    for structure in [*names, *(["mean of structures"] if len(names) > 1 else [])]:
        lines = [
            (network, kind, part["classes"].get(structure, part["mean"]))
            for network, whole in networks.items()
            for kind, part in (("as predicted", whole), ("largest only", whole["largest_component"]))
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
    entries = "".join(f"<dt>{escape(term)}<dd>{escape(text)}" for term, text in terms)
    return f"<h3>How to read this</h3><dl>{entries}</dl>"


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


def _picture(picture: Picture) -> str:
    title, caption = escape(picture.title), escape(picture.caption)
    return (
        f"<figure><figcaption><b>{title}</b><span>{caption}</span></figcaption>"
        f'<img alt="{title}" src="{data_uri(picture.png)}"></figure>'
    )


def _failures(failed: Sequence[tuple[str, str]]) -> str:
    if not failed:
        return ""
    items = "".join(f"<li><b>{escape(scan)}</b> {escape(why)}" for scan, why in failed)
    return f"<aside><b>{_count(len(failed), 'scan')} failed and are in no figure here</b><ul>{items}</ul></aside>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


_STYLE = """
:root { color: #1f2933; background: #fff; font: 15px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
body { max-width: 1080px; margin: 0 auto; padding: 40px 28px 60px; }
.over { margin: 0; color: #7b8794; font-size: 13px; letter-spacing: .04em; }
h1 { margin: 0 0 12px; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 20px; } h3 { margin: 30px 0 8px; font-size: 15px; }
.lead { max-width: 46em; font-size: 17px; } .note { color: #616e7c; font-size: 13px; }
.tiles { display: flex; gap: 44px; margin: 24px 0 14px; flex-wrap: wrap; }
.tiles div { display: flex; flex-direction: column; }
.tiles b { font-size: 28px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: #616e7c; font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; vertical-align: baseline; font-weight: 400; white-space: nowrap; }
thead th { color: #616e7c; font-size: 12.5px; border-bottom: 1px solid #cbd2d9; vertical-align: bottom; }
thead th[colspan] { text-align: center; border-bottom-color: #e4e7eb; }
tbody td { border-bottom: 1px solid #eef0f3; }
tbody th { border-bottom: 1px solid #eef0f3; font-weight: 600; }
tbody th, thead th:first-child, .kind, td[rowspan], .summary thead tr:first-child th:nth-child(-n+3),
thead th:nth-child(2):not(.summary *) { text-align: left; }
td[rowspan], tbody th[rowspan] { vertical-align: top; }
.status { color: #b44d12; text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 8px 22px; max-width: 62em; }
dl { margin: 0; font-size: 14px; }
dt { font-weight: 600; } dd { margin: 0; color: #3e4c59; }
figure { margin: 0 0 30px; } img { display: block; width: 100%; height: auto; }
figcaption { margin-bottom: 6px; } figcaption span { color: #616e7c; margin-left: 12px; font-size: 14px; }
aside { border: 1px solid #e0a27a; border-radius: 6px; padding: 12px 18px; margin-top: 24px; }
aside ul { margin: 6px 0 0; padding-left: 20px; }
footer { margin-top: 52px; color: #616e7c; font-size: 13px; border-top: 1px solid #cbd2d9; padding-top: 14px; }
@media print { body { padding: 0; } figure, tr { break-inside: avoid; } }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 8px; } }
"""
