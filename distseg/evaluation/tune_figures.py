"""Figures of a sweep: parallel coordinates, the objective against compute, what each key explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from distseg.evaluation.curves import COLOURS, FAINT, MUTED
from distseg.evaluation.figures import INK, new_figure
from distseg.evaluation.tune_importance import Importance

UNUSED = -0.14  # where a line passes the axis of a key that does not count in its trial
AXES_A_PANEL = 6
_HALO = [withStroke(linewidth=2, foreground="white")]
_STOPPED = "#9aa5b1"
_MAP = colormaps["cividis"]  # light is better; readable without colour vision


@dataclass(frozen=True)
class ValueAxis:
    """A key's axis; `ticks` are (place from 0 to 1, text)."""

    label: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class TrialLine:
    """A trial as drawn. `places`: on each axis, None where the key does not count; `looks`: (step, objective)."""

    name: str
    state: str  # finished, stopped
    places: Sequence[float | None]
    looks: Sequence[tuple[int, float]]
    value: float | None  # of a finished trial
    is_best: bool = False
    is_default: bool = False


def parallel_coordinates(axes: Sequence[ValueAxis], lines: Sequence[TrialLine], *, objective: str) -> Figure:
    """A line a trial through the values it tried to what it reached; stopped ones are thin and end before the last
    axis. Many keys are parted into panels of a few, each with the objective. The best is bold, the default dashed."""
    panels = -(-len(axes) // AXES_A_PANEL)
    wide = -(-len(axes) // panels)
    figure = new_figure(max(7.0, 1.6 * (wide + 1)), 3.1 * panels + 0.3)
    plots = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for number, plot in enumerate(plots):
        shown = slice(number * wide, (number + 1) * wide)
        _draw_panel(plot, axes[shown], [replace(line, places=line.places[shown]) for line in lines], objective)
        plot.set_xlim(-0.12, wide + 0.25)
    figure.legend(handles=_handles(lines), loc="lower center", ncols=4, fontsize=7.5, frameon=False, labelcolor=INK)
    figure.tight_layout(pad=0.5, h_pad=1.2, rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    return figure


def _draw_panel(plot: Axes, axes: Sequence[ValueAxis], lines: Sequence[TrialLine], objective: str) -> None:
    scale = _scale([line.value for line in lines if line.value is not None])
    for line in sorted(lines, key=lambda one: (one.is_best, one.value is not None)):
        heights = [UNUSED if place is None else min(max(place, -0.05), 1.05) for place in line.places]
        if line.value is not None:
            heights.append(float(scale(line.value)))
        plot.plot(range(len(heights)), heights, **_style(line, scale))
    for place, axis in enumerate(axes):
        plot.axvline(place, color=MUTED, linewidth=0.8, zorder=0)
        for height, text in axis.ticks:
            plot.annotate(
                text, (place, height), (3, 2), textcoords="offset points", fontsize=7, color=INK, path_effects=_HALO
            )
    last = len(axes)
    plot.axvline(last, color=INK, linewidth=1.2, zorder=0)
    for tick in MaxNLocator(5).tick_values(scale.vmin or 0.0, scale.vmax or 1.0):
        if 0 <= scale(tick) <= 1:
            plot.annotate(f"{tick:.3g}", (last, float(scale(tick))), (4, -3), textcoords="offset points", fontsize=7)
    if any(place is None for line in lines for place in line.places):
        plot.annotate("not used", (-0.12, UNUSED), (0, 3), textcoords="offset points", fontsize=7, color=MUTED)
    plot.set_ylim(UNUSED - 0.05, 1.1)
    names = [*(axis.label.replace(".", "\n", 1) for axis in axes), objective]
    plot.set_xticks(range(last + 1), names, fontsize=7.5, color=INK)
    plot.tick_params(length=0, pad=4)
    plot.xaxis.tick_top()
    plot.set_yticks([])
    for spine in plot.spines.values():
        spine.set_visible(False)


def compute_figure(
    lines: Sequence[TrialLine], best_so_far: Sequence[tuple[int, float]], *, objective: str, warmup_steps: int
) -> Figure:
    """Left: every look over its trial's steps. Right: the best look so far over the steps of all trials together."""
    figure = new_figure(9.6, 3.0)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.25, 1]})
    scale = _scale([line.value for line in lines if line.value is not None])
    for line in sorted(lines, key=lambda one: (one.is_best, one.value is not None)):
        if line.looks:
            steps, values = zip(*line.looks, strict=True)
            left.plot(steps, values, **_style(line, scale))
            if line.state == "stopped":
                left.plot(steps[-1:], values[-1:], marker="x", markersize=4, color=MUTED)
    _dress(left, "step of the trial", objective)
    left.legend(handles=_handles(lines), loc="lower right", fontsize=7, frameon=False, labelcolor=INK)
    if best_so_far:
        steps, values = zip(*best_so_far, strict=True)
        right.step(steps, values, where="post", color=COLOURS[0], linewidth=1.6)
    if warmup_steps:
        right.axvline(warmup_steps, color=MUTED, linewidth=0.8, linestyle=":")
        right.annotate("warm-up", (warmup_steps, 0.02), (3, 0), xycoords=("data", "axes fraction"),
                       textcoords="offset points", fontsize=7, color=MUTED)  # fmt: skip
    right.set_xlim(left=0)
    _dress(right, "steps of all trials together", f"best {objective} seen so far")
    figure.tight_layout(pad=0.6, w_pad=1.4)
    return figure


def importance_figure(found: Sequence[Importance]) -> Figure:
    """A bar a key, strongest on top; the tick is what chance gives."""
    ranked = sorted(found, key=lambda one: one.share)
    figure = new_figure(7.0, 0.34 * len(ranked) + 0.7)
    plot = figure.add_subplot()
    for place, one in enumerate(ranked):
        plot.barh(place, one.share, height=0.55, color=COLOURS[0] if one.shown else "#cbd2d9")
        plot.plot([one.chance] * 2, [place - 0.38, place + 0.38], color=INK, linewidth=1.2)
    plot.set_yticks(range(len(ranked)), [one.key for one in ranked], fontsize=8, color=INK)
    plot.set_xlim(0, 1)
    _dress(plot, "share of the objective's rank variance explained by this key alone", "")
    plot.grid(axis="y", visible=False)
    figure.tight_layout(pad=0.5)
    return figure


def _scale(values: Sequence[float]) -> Normalize:
    if not values:
        return Normalize(0.0, 1.0)
    low, high = min(values), max(values)
    return Normalize(low, high if high > low else low + 1e-6)


def _style(line: TrialLine, scale: Normalize) -> dict[str, Any]:
    if line.value is None:
        style: dict[str, Any] = {"color": _STOPPED, "linewidth": 0.7, "alpha": 0.8}
    else:
        style = {"color": _MAP(0.15 + 0.75 * float(scale(line.value))), "linewidth": 1.2}
    if line.is_default:
        style |= {"color": INK, "linestyle": "--", "linewidth": 1.4}
    if line.is_best:
        style |= {"color": COLOURS[1], "linewidth": 2.4}
    return style


def _handles(lines: Sequence[TrialLine]) -> list[Line2D]:
    """For a legend: the best, the default and those stopped early, as far as there are any."""
    best = next((line for line in lines if line.is_best), None)
    default = next((line for line in lines if line.is_default), None)
    handles = []
    if best is not None:
        label = "best: the default" if best is default else f"best: {best.name}"
        handles.append(Line2D([], [], label=label, **_style(best, _scale([]))))
    if default is not None and default is not best:
        handles.append(Line2D([], [], label="default", **_style(default, _scale([]))))
    if any(line.state == "stopped" for line in lines):
        handles.append(Line2D([], [], color=_STOPPED, linewidth=0.7, label="stopped early"))
    return handles


def _dress(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=8, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=8, color=MUTED)
    axes.tick_params(labelsize=7, colors=MUTED, length=2)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
