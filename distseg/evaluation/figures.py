"""Figures of anatomy: a scan in three planes with truth and prediction outlined, the paper's Figure 2.

Volumes are [Z, Y, X] with x to the patient's Left, y to the Posterior, z to the Superior; they are drawn in millimetres
and in radiological convention (the patient's right on the left of the picture, anterior or superior on top).
Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

TRUTH_COLOUR, PREDICTION_COLOUR = "#56B4E9", "#E69F00"
CT_WINDOW_HU = (-350.0, 650.0)  # centre 150, width 1000: soft tissue stays grey, bone stays below white
OTHER_WINDOW_PERCENTILES = (1.0, 99.5)

VIEW_MARGIN_MM = 40.0
SCALE_BAR_MM = 50.0

INK = "#1f2933"
OUTLINED = ("truth (annotation)", "prediction")


@dataclass(frozen=True)
class Plane:
    """One slice, rows from top to bottom of the picture. `extent_mm` is (width, height); `letters` left, right, top,
    bottom."""

    name: str
    image: np.ndarray  # float32 [rows, columns]
    truth: np.ndarray  # uint8 label values
    prediction: np.ndarray  # uint8 label values
    extent_mm: tuple[float, float]
    position_mm: float  # of the slice along its axis, from the first voxel's edge
    letters: tuple[str, str, str, str]


_WRITING: dict[str, Any] = {
    "color": "white",
    "fontsize": 8,
    "path_effects": [withStroke(linewidth=1.6, foreground="black")],  # readable on bone
}

# axis it cuts -> name, letters left right top bottom, whether rows run upwards (superior on top)
_VIEWS = {
    0: ("axial", ("R", "L", "A", "P"), False),
    1: ("coronal", ("R", "L", "S", "I"), True),
    2: ("sagittal", ("A", "P", "S", "I"), True),
}


def central_index(mask: np.ndarray, axis: int) -> int:
    """The slice across `axis` nearest to the object's centre that shows at least half its largest cross-section.

    So a pair of hips is cut through a hip and not between them. The image's middle where the mask is empty.
    """
    areas = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
    if not areas.any():
        return int(mask.shape[axis]) // 2
    positions = np.arange(len(areas))
    centre = (areas * positions).sum() / areas.sum()
    eligible = positions[areas * 2 >= areas.max()]
    return min((int(position) for position in eligible), key=lambda position: abs(position - centre))


def view_box(mask: np.ndarray, *, spacing_mm: Sequence[float]) -> tuple[slice, slice, slice]:
    """The part of the volume worth showing: the object and `VIEW_MARGIN_MM` around it; all of it if there is none."""
    sides = []
    for axis, (size, spacing) in enumerate(zip(mask.shape, spacing_mm, strict=True)):
        occupied = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = int(np.ceil(VIEW_MARGIN_MM / spacing))
        first, last = (int(occupied[0]), int(occupied[-1])) if len(occupied) else (0, size - 1)
        sides.append(slice(max(0, first - margin), min(size, last + margin + 1)))
    return sides[0], sides[1], sides[2]


def plane_of(
    axis: int,
    index: int,
    *,
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float],
) -> Plane:
    """Slices [rows, columns] taken across `axis` at `index`, given as they lie in the volume, turned for display."""
    name, letters, upwards = _VIEWS[axis]
    turned = [np.ascontiguousarray(part[::-1] if upwards else part) for part in (image, truth, prediction)]
    row_mm, column_mm = (spacing for a, spacing in enumerate(spacing_mm) if a != axis)
    extent = (image.shape[1] * column_mm, image.shape[0] * row_mm)
    return Plane(name, turned[0], turned[1], turned[2], extent, (index + 0.5) * spacing_mm[axis], letters)


def grey_window(image: np.ndarray, modality: str) -> tuple[float, float]:
    """Intensities shown as black and white: fixed for CT, percentiles of the image for anything else."""
    if modality.upper() == "CT":
        return CT_WINDOW_HU
    low, high = np.percentile(image, OTHER_WINDOW_PERCENTILES)
    return float(low), float(max(high, low + 1e-6))


def scan_figure(planes: Sequence[Plane], *, window: tuple[float, float], names: tuple[str, str] = OUTLINED) -> Figure:
    """Three planes side by side at one scale on black, truth and prediction outlined; `names` is what these are."""
    widths = [plane.extent_mm[0] for plane in planes]
    height_mm = max(plane.extent_mm[1] for plane in planes)
    width_inch, gap_inch, legend_inch = 9.6, 0.06, 0.34
    scale = (width_inch - gap_inch * (len(planes) - 1)) / sum(widths)  # inches a millimetre
    total = height_mm * scale + legend_inch
    figure = new_figure(width_inch, total)
    left = 0.0
    for plane, width in zip(planes, widths, strict=True):
        box = (left / width_inch, legend_inch / total, width * scale / width_inch, height_mm * scale / total)
        axes = figure.add_axes(box)
        _draw_plane(axes, plane, window)
        spare = (height_mm - plane.extent_mm[1]) / 2
        axes.set_ylim(plane.extent_mm[1] + spare, -spare)
        title = f"{plane.name}, {plane.position_mm:.0f} mm"
        axes.text(0.02, 0.98, title, va="top", **_WRITING, transform=axes.transAxes)
        left += width * scale + gap_inch
    _draw_scale_bar(figure.axes[0], widths[0], sum(figure.axes[0].get_ylim()) / 2 + height_mm / 2)
    handles = _outline_handles(names)
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _draw_scale_bar(axes: Axes, width_mm: float, bottom_mm: float) -> None:
    if width_mm < 2 * SCALE_BAR_MM:
        return
    start, y = 0.03 * width_mm, bottom_mm - 0.04 * width_mm
    axes.plot([start, start + SCALE_BAR_MM], [y, y], color="white", linewidth=1.6, solid_capstyle="butt")
    axes.text(start, y - 0.015 * width_mm, f"{SCALE_BAR_MM:.0f} mm", va="bottom", **_WRITING)


def comparison_figure(
    image: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, Mapping[str, np.ndarray]],
    *,
    spacing_mm: Sequence[float],
    modality: str = "CT",
) -> Figure:
    """The paper's Figure 2: one central axial slice, a row per label count, a column each for truth and the methods.

    `predictions[row label][method]` are masks [Z, Y, X]; a method without a mask in a row leaves its cell empty.
    """
    index, (_, rows, columns) = central_index(truth, 0), view_box(truth, spacing_mm=spacing_mm)
    methods = list(dict.fromkeys(name for row in predictions.values() for name in row))
    grey = image[index, rows, columns]
    height_mm, width_mm = grey.shape[0] * spacing_mm[1], grey.shape[1] * spacing_mm[2]
    cell = 2.0
    figure = new_figure(cell * (1 + len(methods)) + 0.5, cell * height_mm / width_mm * len(predictions) + 0.55)
    cells = figure.subplots(len(predictions), 1 + len(methods), squeeze=False)
    window = grey_window(grey, modality)
    nothing = np.zeros(grey.shape, np.uint8)
    for line, (label, by_method) in enumerate(predictions.items()):
        for column, name in enumerate(["truth", *methods]):
            axes = cells[line, column]
            mask = truth if name == "truth" else by_method.get(name)
            if mask is None:
                axes.set_axis_off()
                continue
            outlined = mask[index, rows, columns]
            shown = (outlined, nothing) if name == "truth" else (nothing, outlined)
            plane = plane_of(0, index, image=grey, truth=shown[0], prediction=shown[1], spacing_mm=spacing_mm)
            _draw_plane(axes, plane, window, letters=line == 0 and column == 0)
            if line == 0:
                axes.set_title(name.replace("_", " "), fontsize=9, color=INK)
            if column == 0:
                axes.set_ylabel(label, fontsize=9, color=INK)
    bottom = 0.34 / figure.get_figheight()
    figure.subplots_adjust(0.4 / figure.get_figwidth(), bottom, 0.995, 1 - 0.25 / figure.get_figheight(), 0.03, 0.03)
    figure.legend(handles=_outline_handles(), loc="lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _draw_plane(axes: Axes, plane: Plane, window: tuple[float, float], *, letters: bool = True) -> None:
    width, height = plane.extent_mm
    box = (0.0, width, height, 0.0)
    axes.imshow(plane.image, cmap="gray", vmin=window[0], vmax=window[1], extent=box, interpolation="bilinear")
    rows, columns = plane.image.shape
    xs = (np.arange(columns + 2) - 0.5) * width / columns  # centres of the voxels and of a frame around them
    ys = (np.arange(rows + 2) - 0.5) * height / rows
    for mask, colour, line_width in (
        (plane.truth, TRUTH_COLOUR, 2.6),
        (plane.prediction, PREDICTION_COLOUR, 1.0),
    ):
        for value in np.unique(mask[mask > 0]):
            framed = np.pad((mask == value).astype(np.float32), 1)
            axes.contour(xs, ys, framed, levels=[0.5], colors=[colour], linewidths=[line_width])
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_facecolor("black")
    if letters:
        places = [
            (0.02, 0.5, "left", "center"),
            (0.98, 0.5, "right", "center"),
            (0.5, 0.98, "center", "top"),
            (0.5, 0.02, "center", "bottom"),
        ]
        for letter, (x, y, across, along) in zip(plane.letters, places, strict=True):
            axes.text(x, y, letter, ha=across, va=along, **_WRITING, transform=axes.transAxes)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _outline_handles(names: tuple[str, str] = OUTLINED) -> list[Line2D]:
    return [
        Line2D([], [], color=TRUTH_COLOUR, linewidth=2.4, label=names[0]),
        Line2D([], [], color=PREDICTION_COLOUR, linewidth=1.6, label=names[1]),
    ]


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, outside pyplot's global list: nothing to close, safe in threads."""
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    figure.set_facecolor("white")
    return figure


def png_bytes(figure: Figure) -> bytes:
    """PNG without a time stamp: equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
