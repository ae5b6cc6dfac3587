"""Training curves from the rows of metrics.jsonl: a panel per theme, and only panels whose keys the rows hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distseg.evaluation.figures import INK, new_figure

# Okabe and Ito's palette, dark ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
MUTED, FAINT = "#7b8794", "#e4e7eb"
COLUMNS = 3
SMOOTHED_FROM_ROWS = 60  # shorter runs are drawn as they are

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    prefix: str = ""  # every key that starts so
    keys: tuple[str, ...] = ()
    common: str = ""  # what the legend leaves out of every key
    share: bool = False  # an axis from 0 to 1


_PANELS = (
    _Panel("Loss terms, unweighted", "nats or 1 - Dice", "loss_"),
    _Panel("Total loss", "weighted sum", keys=("loss",)),
    _Panel("Weights of the terms", "weight", "weight_"),
    _Panel("Entropy threshold", "nats", keys=("threshold_nats",)),
    _Panel(
        "Unlabelled voxels that teach",
        "share",
        keys=("coverage_reliable", "coverage_matched"),
        common="coverage_",
        share=True,
    ),
    _Panel("Matched labels that are right", "share", keys=("matched_accuracy",), share=True),
    _Panel(
        "Predicted foreground",
        "share of voxels",
        keys=("foreground_labelled", "foreground_unlabelled"),
        common="foreground_",
    ),
    _Panel(
        "Voxels the teacher is unsure of: foreground",
        "share",
        keys=("foreground_matched", "foreground_true"),
        common="foreground_",
        share=True,
    ),
    _Panel("Age of the references", "steps", keys=("bank_age_steps",)),
    _Panel("Validation patches", "share", keys=("val_dice", "val_dice_teacher"), common="val_"),
)


def training_curves(rows: Rows) -> Figure | None:
    """Panels over steps, a running mean over the faint raw line; None where the rows hold nothing to draw."""
    shown = [(panel, keys) for panel in (*_PANELS, *_validation_panels(rows)) if (keys := _keys(panel, rows))]
    if not shown:
        return None
    lines = -(-len(shown) // COLUMNS)
    figure = new_figure(9.6, 2.15 * lines + 0.1)
    for place, (panel, keys) in enumerate(shown, start=1):
        _draw(figure.add_subplot(lines, COLUMNS, place), panel, keys, rows)
    figure.tight_layout(pad=0.6, w_pad=1.2, h_pad=1.0)
    return figure


def _validation_panels(rows: Rows) -> list[_Panel]:
    """A panel of its own for each val_* key that no fixed panel draws: their units differ."""
    drawn = {key for panel in _PANELS for key in panel.keys}
    found = sorted({key for row in rows for key in row if key.startswith("val_")} - drawn)
    return [
        _Panel("Validation: " + _words(key, "val_"), "mm" if key.endswith("_mm") else "", keys=(key,)) for key in found
    ]


def _keys(panel: _Panel, rows: Rows) -> list[str]:
    """The panel's keys that some row gives a number, in order of first appearance."""
    seen = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    if panel.prefix:
        return [key for key in seen if key.startswith(panel.prefix)]
    return [key for key in panel.keys if key in seen]


def _draw(axes: Axes, panel: _Panel, keys: Sequence[str], rows: Rows) -> None:
    for key, colour in zip(keys, COLOURS * len(keys), strict=False):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        steps, values = np.array(points, np.float64).T
        marker = "o" if len(points) <= 30 else ""
        smooth = running_mean(values) if len(points) >= SMOOTHED_FROM_ROWS else values
        if smooth is not values:
            axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.25)
        label = _words(key, panel.prefix or panel.common)
        axes.plot(steps, smooth, color=colour, linewidth=1.4, marker=marker, markersize=2.5, label=label)
    axes.set_title(panel.title, fontsize=9, color=INK, loc="left")
    axes.set_xlabel("step", fontsize=8, color=MUTED)
    axes.set_ylabel(panel.unit, fontsize=8, color=MUTED)
    axes.tick_params(labelsize=7, colors=MUTED, length=2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    if panel.share:
        axes.set_ylim(0, 1.02)
    if len(keys) > 1:
        axes.legend(fontsize=7, frameon=False, labelcolor=INK, handlelength=1.2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a thirtieth of the run; at the ends over what there is. Values that are not finite spread."""
    half = max(1, len(values) // 60)
    padded = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    mean: np.ndarray = (padded[high] - padded[low]) / (high - low)
    return mean


def _words(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).replace("_", " ")
