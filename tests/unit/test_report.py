"""Figures lie the right way round and to scale; the report is self-contained and escapes what it is given."""

from __future__ import annotations

import re

import numpy as np
import pytest

from distseg.evaluation import figures
from distseg.evaluation.curves import running_mean, training_curves
from distseg.evaluation.metrics import ClassScore, ScoreRow, summarise
from distseg.evaluation.page import Picture
from distseg.evaluation.report import ReportContent, render_report

PNG = b"\x89PNG\r\n\x1a\n"


def cut(axis: int, volume: np.ndarray) -> figures.Plane:
    part = volume.take(1, axis=axis)
    return figures.plane_of(axis, 1, image=part, truth=part, prediction=part, spacing_mm=(3.0, 2.0, 1.0))


def test_planes_are_turned_as_radiologists_expect() -> None:
    # Canonical axes run to Superior, Posterior, Left: top of the picture is anterior or superior, left is right.
    volume = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    axial, coronal, sagittal = (cut(axis, volume) for axis in range(3))
    assert axial.image[0, 0] == volume[1, 0, 0]
    assert coronal.image[0, 0] == volume[-1, 1, 0]
    assert sagittal.image[0, 0] == volume[-1, 0, 1]
    assert [plane.letters for plane in (axial, coronal, sagittal)] == [
        ("R", "L", "A", "P"),
        ("R", "L", "S", "I"),
        ("A", "P", "S", "I"),
    ]
    # (width, height) in mm: X x Y, X x Z, Y x Z.
    assert [plane.extent_mm for plane in (axial, coronal, sagittal)] == [(6, 10), (6, 12), (10, 12)]
    assert axial.position_mm == 1.5 * 3


def test_central_slice_cuts_the_object() -> None:
    pair = np.zeros((3, 4, 20), bool)
    pair[1, 1:3, 2:5] = pair[1, 1:3, 14:19] = True  # two hips; their common centre, x = 10.6, lies in neither
    assert figures.central_index(pair, 2) == 14
    assert figures.central_index(pair, 0) == 1
    assert figures.central_index(np.zeros((3, 4, 9), bool), 2) == 4


def test_view_is_the_object_with_a_margin() -> None:
    mask = np.zeros((100, 100, 100), bool)
    mask[50, 2, 60:70] = True
    assert figures.view_box(mask, spacing_mm=(10.0, 10.0, 3.0)) == (slice(46, 55), slice(0, 7), slice(46, 84))
    assert figures.view_box(np.zeros((2, 3, 4), bool), spacing_mm=(1, 1, 1)) == (slice(0, 2), slice(0, 3), slice(0, 4))


def test_scan_figure_keeps_millimetres_square() -> None:
    rng = np.random.default_rng(0)
    volume = (rng.random((12, 20, 30)) > 0.5).astype(np.uint8)
    planes = [cut(axis, volume) for axis in range(3)]
    figure = figures.scan_figure(planes, window=(0, 1))
    for axes in figure.axes:
        width, height = axes.get_window_extent().size
        across, along = abs(np.diff(axes.get_xlim())[0]), abs(np.diff(axes.get_ylim())[0])
        assert width / across == pytest.approx(height / along, rel=1e-6)
    assert figures.png_bytes(figure).startswith(PNG)
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels == ["truth (annotation)", "prediction"]


def test_grey_window() -> None:
    image = np.linspace(0, 100, 1001)
    assert figures.grey_window(image, "ct") == figures.CT_WINDOW_HU
    assert figures.grey_window(image, "MR") == pytest.approx((1.0, 99.5))
    low, high = figures.grey_window(np.zeros(5), "MR")
    assert high > low


def test_comparison_figure_has_a_cell_per_method_and_row() -> None:
    truth = np.zeros((4, 10, 12), np.uint8)
    truth[1:3, 3:6, 4:8] = 1
    rows = {"4 scans": {"supervised": truth, "embedding_matching": truth}, "10 scans": {"supervised": truth * 0}}
    figure = figures.comparison_figure(np.zeros(truth.shape), truth, rows, spacing_mm=(3.0, 1.0, 1.0))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["truth", "supervised", "embedding matching"]
    assert figure.axes[3].get_ylabel() == "10 scans"
    assert not figure.axes[5].axison  # that method has no run with 10 scans
    assert figures.png_bytes(figure).startswith(PNG)


def test_curves_draw_only_what_is_there() -> None:
    rows = [
        {"step": t, "loss": 1 / t, "loss_supervised": 1 / t, "val_dice": 0.5 if t == 9 else None} for t in range(1, 10)
    ]
    figure = training_curves(rows)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Loss terms, unweighted",
        "Total loss",
        "Validation patches",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["step"] * 3
    assert list(figure.axes[2].lines[0].get_xdata()) == [9]
    assert figures.png_bytes(figure).startswith(PNG)
    assert training_curves([]) is None
    assert training_curves([{"step": 1}]) is None


def test_unknown_validation_keys_get_their_own_panel() -> None:
    figure = training_curves([{"step": 1, "val_hd95_mm": 9.0}, {"step": 2, "val_hd95_mm": 8.0}])
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "mm"


def test_running_mean_by_hand() -> None:
    # 9 values: one neighbour on each side, fewer at the ends.
    assert running_mean(np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 18])).tolist() == [1.5, 2, 3, 4, 5, 6, 7, 11, 13]


def content(scan_id: str = "scan_1") -> ReportContent:
    found = ClassScore("found", 0.5, 2 / 3, 4.25, 1.5, 10.0, 12.0)
    missed = ClassScore("missed", 0.0, 0.0, 300.0, 300.0, 10.0, 0.0)
    absent = ClassScore("absent", None, None, None, None, 0.0, 0.0)
    rows = [
        ScoreRow(scan, network, component, "mandible", score)
        for scan, score in ((scan_id, found), ("scan_2", missed), ("scan_3", absent))
        for network in ("student", "teacher")
        for component in ("all", "largest")
    ]
    summaries = {
        name: summarise([row for row in rows if row.network == name], class_names=["background", "mandible"])
        for name in ("student", "teacher")
    }
    head = {
        "split": "val",
        "cohort": "<b>cohort</b>",
        "scans": 3,
        "scans_without_annotation": 1,
        "checkpoint": "step_0000009",
        "network": "student",
    }
    metrics = {**head, **summaries["student"], "teacher": summaries["teacher"]}
    return ReportContent(
        "my <run>",
        "embedding_matching",
        metrics,
        rows,
        [Picture("Best scan", scan_id, PNG)],
        Picture("Training curves", "", PNG),
        [("scan_9", "broken & gone")],
    )


def test_report_is_self_contained_and_escaped() -> None:
    page = render_report(content(scan_id="<script>alert(1)</script>"))
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert "my &lt;run&gt;" in page
    assert "&lt;b&gt;cohort&lt;/b&gt;" in page
    assert "broken &amp; gone" in page


def test_report_says_what_a_clinician_needs() -> None:
    page = render_report(content())
    for wanted in ("Research use only", "How to read this", "HD95", "Missed", "largest only", "teacher", "missed<"):
        assert wanted in page
    assert "1 scan without annotation left out" in page
    # Mean Dice of 2/3 and 0, its median the same; one missed.
    assert page.count("<td>0.333<td>0.333") == 4
    every_scan = page[page.index("Every scan") :]
    assert (
        every_scan.index("scan_2") < every_scan.index("scan_1") < every_scan.index("scan_3")
    )  # worst first, absent last
    assert "\u2013" in every_scan


def test_many_structures_are_listed_with_their_mean() -> None:
    base = content()
    rows = [ScoreRow(r.scan_id, r.network, r.component, name, r.score) for r in base.rows for name in ("left", "right")]
    summary = summarise([r for r in rows if r.network == "student"], class_names=["background", "left", "right"])
    page = render_report(ReportContent("r", None, {**base.metrics, **summary, "teacher": summary}, rows, [], None))
    assert "outlined left and right on" in page
    assert "mean of structures" in page
