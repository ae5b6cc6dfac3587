"""The folder of one evaluation, and how it gets its content.

    RUN/evaluation/NAME/
      metrics.json    summary, DESIGN section 3; the other network's under its own name
      per_scan.csv    a line per scan, network, component (all | largest) and class
      report.html     for a reader without this program
      figures/        curves.png and the best, median and worst scan

It is filled beside its place and swapped in whole; behind a URL metrics.json comes last.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distseg.data.carry import put_folder
from distseg.data.place import is_url
from distseg.evaluation.curves import training_curves
from distseg.evaluation.figures import Plane, grey_window, png_bytes, scan_figure
from distseg.evaluation.metrics import ScoreRow
from distseg.evaluation.page import Picture
from distseg.evaluation.report import ReportContent, render_report
from distseg.training.alarms import sounded
from distseg.training.remote_run import readable_run


@dataclass(frozen=True)
class ScanResult:
    """What a worker sends back of one scan: its scores, and three planes of the tested network's prediction."""

    rows: tuple[ScoreRow, ...]
    planes: tuple[Plane, ...]
    modality: str


def fill_folder(partial: Path, run: str, content: ReportContent) -> None:
    """Fill the folder: metrics.json, per_scan.csv, figures, report.html."""
    (partial / "metrics.json").write_text(json.dumps(content.metrics, indent=1, allow_nan=False), encoding="utf-8")
    (partial / "per_scan.csv").write_text(_csv(content.rows), encoding="utf-8")
    pictures = _scan_pictures(partial, content)
    rows = _training_rows(run)
    curves = _curves(rows)
    for file, picture in [*pictures, *([("curves.png", curves)] if curves else [])]:
        (partial / "figures" / file).write_bytes(picture.png)
    for stored in partial.glob("*.npz"):
        stored.unlink()
    warnings = [(alarm.title, alarm.detail) for alarm in sounded(rows)]
    scans = [picture for _, picture in pictures]
    page = render_report(replace(content, scans=scans, curves=curves, warnings=warnings))
    (partial / "report.html").write_text(page, encoding="utf-8")


def _csv(rows: Sequence[ScoreRow]) -> str:
    text = io.StringIO()
    flat = [row.flat() for row in rows]
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _scan_pictures(partial: Path, content: ReportContent) -> list[tuple[str, Picture]]:
    """(file name, picture) of the worst, median and best scan by the mean Dice of its counted classes."""
    dice: dict[str, list[float]] = {}
    hd95: dict[str, list[float]] = {}
    for row in content.rows:
        if row.network == content.metrics["network"] and row.component == "all" and row.score.dice is not None:
            dice.setdefault(row.scan_id, []).append(row.score.dice)
            hd95.setdefault(row.scan_id, []).append(row.score.hd95_mm or 0.0)
    ranked = sorted(dice, key=lambda scan: (np.mean(dice[scan]), scan))
    # Of few scans one may be both: it is shown once, under the first of these names.
    places = {"worst": 0, "best": len(ranked) - 1, "median": (len(ranked) - 1) // 2}
    picked = {scan: place for place, scan in reversed([(p, ranked[i]) for p, i in places.items() if ranked])}
    pictures = []
    for place in ("best", "median", "worst"):
        for scan in (scan for scan, taken in picked.items() if taken == place):
            planes, modality = _load_planes(partial / f"{scan}.npz")
            window = grey_window(np.concatenate([plane.image.ravel() for plane in planes]), modality)
            caption = f"{scan}: Dice {np.mean(dice[scan]):.3f}, HD95 {np.mean(hd95[scan]):.1f} mm"
            picture = Picture(f"{place.capitalize()} scan", caption, png_bytes(scan_figure(planes, window=window)))
            pictures.append((f"{place}.png", picture))
    return pictures


def _training_rows(run: str) -> list[dict[str, Any]]:
    """The rows of the run's metrics.jsonl; none where it has none (a model that came without its run)."""
    with readable_run(run) as directory:
        try:
            return directory.metrics()
        except (OSError, ValueError):
            return []


def _curves(rows: Sequence[dict[str, Any]]) -> Picture | None:
    figure = training_curves(rows)
    if figure is None:
        return None
    return Picture("Training curves", "From metrics.jsonl; the thin lines are single steps.", png_bytes(figure))


def store_planes(file: Path, result: ScanResult) -> None:
    arrays: dict[str, Any] = {"modality": np.array(result.modality)}
    for i, plane in enumerate(result.planes):
        arrays |= {f"image{i}": plane.image, f"truth{i}": plane.truth, f"prediction{i}": plane.prediction}
        arrays[f"facts{i}"] = np.array(json.dumps([plane.name, plane.extent_mm, plane.position_mm, plane.letters]))
    np.savez_compressed(file, **arrays)


def _load_planes(file: Path) -> tuple[list[Plane], str]:
    planes = []
    with np.load(file) as stored:
        for i in range(3):
            name, extent_mm, position_mm, letters = json.loads(str(stored[f"facts{i}"]))
            image, truth, prediction = (stored[f"{kind}{i}"] for kind in ("image", "truth", "prediction"))
            planes.append(Plane(name, image, truth, prediction, tuple(extent_mm), position_mm, tuple(letters)))
        return planes, str(stored["modality"])


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A folder to fill, with figures/ in it, which then takes the place of `folder`, here or behind a URL; where the
    context ends by an error nothing has changed."""
    if is_url(folder):
        with tempfile.TemporaryDirectory(prefix="distseg-evaluation-") as here:
            partial = Path(here) / folder.name
            (partial / "figures").mkdir(parents=True)
            yield partial
            put_folder(partial, folder, marker="metrics.json")
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "figures").mkdir(parents=True)
    try:
        yield partial
        swap_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def swap_folder(partial: Path, folder: Path) -> None:
    """Put the new folder in the old one's place; a reader finds the one or the other."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
