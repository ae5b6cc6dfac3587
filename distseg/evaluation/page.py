"""What every HTML report shares: one file with its pictures inside, no scripts, nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from distseg.evaluation.figures import data_uri


@dataclass(frozen=True)
class Picture:
    """`title` and `caption` are plain text; `png` the picture's bytes."""

    title: str
    caption: str
    png: bytes


def document(title: str, *, parts: Iterable[str], style: str) -> str:
    """The whole page. `title` is plain text, `parts` are HTML, `style` is CSS after the shared one."""
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n{_FOOTER}\n"
        "</body>\n</html>\n"
    )


def heading(over: str, title: str, lead: str) -> str:
    """`lead` is HTML."""
    return f"<header><p class=over>{escape(over)}</p><h1>{escape(title)}</h1>{lead}</header>"


def section(title: str, body: str) -> str:
    """Nothing where `body` is empty."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def picture_html(picture: Picture) -> str:
    title, caption = escape(picture.title), escape(picture.caption)
    return (
        f"<figure><figcaption><b>{title}</b><span>{caption}</span></figcaption>"
        f'<img alt="{title}" src="{data_uri(picture.png)}"></figure>'
    )


def glossary(terms: Iterable[tuple[str, str]]) -> str:
    entries = "".join(f"<dt>{escape(term)}<dd>{escape(text)}" for term, text in terms)
    return f"<dl>{entries}</dl>"


def failures_html(head: str, failed: Iterable[tuple[str, str]]) -> str:
    """A box of what failed and why; nothing where nothing did."""
    items = "".join(f"<li><b>{escape(item)}</b> {escape(why)}" for item, why in failed)
    return f"<aside><b>{escape(head)}</b><ul>{items}</ul></aside>" if items else ""


_FOOTER = "<footer>Research use only. Not a medical device; not for diagnosis or treatment planning.</footer>"

_STYLE = """
:root { color: #1f2933; background: #fff; font: 15px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
body { max-width: 1100px; margin: 0 auto; padding: 40px 28px 60px; }
.over { margin: 0; color: #7b8794; font-size: 13px; letter-spacing: .04em; }
h1 { margin: 0 0 12px; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 20px; } h3 { margin: 28px 0 8px; font-size: 15px; }
.lead { max-width: 46em; font-size: 17px; } .note { color: #616e7c; font-size: 13px; max-width: 62em; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; vertical-align: baseline; font-weight: 400; white-space: nowrap; }
thead th { color: #616e7c; font-size: 12.5px; border-bottom: 1px solid #cbd2d9; vertical-align: bottom; }
tbody td, tbody th { border-bottom: 1px solid #eef0f3; } tbody th { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 8px 22px; max-width: 62em; margin: 0; }
dl { font-size: 14px; } dt { font-weight: 600; } dd { margin: 0; color: #3e4c59; }
figure { margin: 0 0 30px; } img { display: block; max-width: 100%; height: auto; }
figcaption { margin-bottom: 6px; } figcaption span { color: #616e7c; margin-left: 12px; font-size: 14px; }
aside { border: 1px solid #e0a27a; border-radius: 6px; padding: 12px 18px; margin-top: 24px; }
aside ul { margin: 6px 0 0; padding-left: 20px; }
footer { margin-top: 52px; color: #616e7c; font-size: 13px; border-top: 1px solid #cbd2d9; padding-top: 14px; }
@media print { body { padding: 0; } figure, tr { break-inside: avoid; } }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 8px; } }
"""
