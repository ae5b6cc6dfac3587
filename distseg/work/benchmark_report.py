"""From a benchmark's finished cells to RUN/tables, RUN/figures and RUN/report.html."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distseg.evaluation.benchmark_curves import RunCurves, benchmark_curves
from distseg.evaluation.benchmark_grids import Grid, comparison_grid, markdown, summary_grid, text, title_of
from distseg.evaluation.benchmark_page import BenchmarkPage, markdown_head, render_page
from distseg.evaluation.benchmark_tables import METRICS, RunScores, comparisons_csv, make_readings, summary_csv, to_csv
from distseg.evaluation.figures import comparison_figure, png_bytes
from distseg.evaluation.page import Picture
from distseg.methods import passes_per_step
from distseg.training.run import RunDirectory, write_atomic
from distseg.work.benchmark_cells import Cell
from distseg.work.benchmark_checks import Benchmark
from distseg.work.benchmark_slices import Slice, pick_scans, predict_slices, read_slice
from distseg.work.benchmark_warnings import training_warnings
from distseg.work.executor import Executor


def write_report(
    run: Path, benchmark: Benchmark, failed: Mapping[str, str], *, executor: Executor
) -> tuple[Path | None, list[tuple[str, str]]]:
    """Returns the report's path, None where no cell is measured, and what went wrong with the figures."""
    tables = run / "tables"
    tables.mkdir(exist_ok=True)
    facts = [_facts(cell, failed.get(cell.name)) for cell in (*benchmark.phase_a, *benchmark.phase_b)]
    write_atomic(tables / "cells.csv", to_csv(facts))
    measured = [c for c in (*benchmark.phase_a, *benchmark.phase_b) if c.evaluate is not None and c.is_finished()]
    if not measured:
        return None, []
    suite = benchmark.suite
    runs = [RunScores(cell.row, cell.labelled, cell.seed, _per_scan(cell)) for cell in measured]
    readings = make_readings(runs, seeds=suite.seeds, compared=suite.compare, against=suite.against)
    anatomy, trouble = _anatomy(benchmark, runs, executor)
    curves = _curves(benchmark)
    page = BenchmarkPage(
        name=suite.name,
        description=suite.description,
        cohort=Path(benchmark.cohort.path).name,  # not its path: folder names are names of patients
        split=suite.split,
        scans=len(benchmark.scans),
        seeds=suite.seeds,
        subsets=benchmark.subsets,
        titles=benchmark.titles,
        readings=readings,
        network=suite.network,
        comparisons=benchmark.comparisons,
        detectable_sd=benchmark.detectable_sd,
        anatomy=[picture for _, picture in anatomy],
        curves=[picture for _, picture in curves],
        costs=_cost_grid(benchmark, facts, executor.workers),
        cells=_cells_grid(facts),
        failed=[*failed.items(), *trouble],
        warnings=training_warnings(benchmark),
    )
    figures = run / "figures"
    figures.mkdir(exist_ok=True)
    for old in figures.glob("*.png"):
        old.unlink()
    for file, picture in [*anatomy, *curves]:
        (figures / file).write_bytes(picture.png)
    write_atomic(tables / "summary.csv", summary_csv(readings))
    write_atomic(tables / "comparisons.csv", comparisons_csv(readings))
    write_atomic(tables / "summary.md", _summary_markdown(page))
    write_atomic(run / "report.html", render_page(page))
    _print_tables(page)
    return run / "report.html", trouble


def _per_scan(cell: Cell) -> list[dict[str, str]]:
    with (cell.evaluation / "per_scan.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- what it took --------------------------------------------------------------------------------------------------


def _facts(cell: Cell, error: str | None) -> dict[str, Any]:
    """A line of cells.csv. `seconds_a_step` is the median; wall times are over all attempts."""
    rows = RunDirectory(cell.run).metrics() if cell.run.is_dir() else []
    times = [row["time_step_s"] for row in rows if row.get("time_step_s") is not None]
    wall = cell.wall_s()
    state = "failed" if error is not None else "finished" if cell.is_finished() else "unfinished"
    return {
        "cell": cell.name,
        "row": cell.row,
        "labelled": cell.labelled,
        "seed": cell.seed,
        "state": state,
        "steps": len(rows),
        **{f"{kind}_passes": count for kind, count in passes_per_step(cell.config)._asdict().items()},
        "seconds_a_step": statistics.median(times) if times else None,
        "train_s": wall.get("train"),
        "evaluate_s": wall.get("evaluate"),
        "reason": error or "",
    }


def _cost_grid(benchmark: Benchmark, facts: Sequence[Mapping[str, Any]], side_by_side: int) -> Grid:
    """A line a row and label count: means over its finished seeds."""
    lines = []
    passes = {(c.row, c.labelled): str(passes_per_step(c.config)) for c in (*benchmark.phase_a, *benchmark.phase_b)}
    for cell in passes:
        mine = [f for f in facts if (f["row"], f["labelled"]) == cell and f["state"] == "finished"]
        means = [_mean([f[key] for f in mine]) for key in ("steps", "seconds_a_step", "train_s", "evaluate_s")]
        lines.append(
            (
                f"{cell[0]}, {benchmark.titles[cell[1]]}",
                text(means[0], 0),
                passes[cell],
                text(means[1], 3),
                *(text(None if seconds is None else seconds / 60, 1) for seconds in means[2:]),
                str(len(mine)),
            )
        )
    known = [f[key] for f in facts for key in ("train_s", "evaluate_s") if f[key] is not None]
    note = (
        f"Wall times of a cell, mean over its seeds, with {side_by_side} cells side by side; {sum(known) / 3600:.2f} "
    )
    note += "hours of all cells together. Passes are a slot's: rows of equal steps are not of equal compute."
    head = ("Cell", "Steps", "Passes per step", "Seconds a step", "Training, min", "Evaluation, min", "Finished")
    return Grid("What it took", head, tuple(lines), note)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cells_grid(facts: Sequence[Mapping[str, Any]]) -> Grid:
    lines = tuple(
        (
            str(f["cell"]),
            str(f["steps"]),
            text(f["seconds_a_step"], 3),
            text(f["train_s"], 0),
            text(f["evaluate_s"], 0),
            str(f["state"]),
        )
        for f in facts
    )
    return Grid("Every cell", ("Cell", "Steps", "Seconds a step", "Training, s", "Evaluation, s", "State"), lines)


# --- pictures ------------------------------------------------------------------------------------------------------


def _anatomy(
    benchmark: Benchmark, runs: Sequence[RunScores], executor: Executor
) -> tuple[list[tuple[str, Picture]], list[tuple[str, str]]]:
    """(file name, the paper's Figure 2) of the best, median and worst scan by the mean Dice of all runs."""
    suite = benchmark.suite
    picked = pick_scans(_mean_dice([line for run in runs for line in run.lines], suite.network))
    slices = {place: read_slice(benchmark.cohort, scan) for place, scan in picked.items()}
    shown = _shown_cells(benchmark)
    masks, trouble = predict_slices(
        shown,
        list(slices.values()),
        benchmark.cohort,
        network=suite.network,
        overlap=suite.overlap,
        executor=executor,
    )
    dice = {
        (run.row, run.labelled, run.seed): _mean_dice(run.lines, suite.network) for run in runs
    }  # fmt: skip
    pictures = []
    for place, one in slices.items():
        predictions: dict[str, dict[str, np.ndarray]] = {}
        scores = []
        for cell in shown:
            if cell.name in masks:
                mask = masks[cell.name][one.scan_id][None]
                predictions.setdefault(benchmark.titles[cell.labelled], {})[cell.row] = mask
                score = dice[cell.row, cell.labelled, cell.seed].get(one.scan_id)
                scores.append(f"{cell.row} {text(score, 2)}")
        if predictions:
            caption = (
                f"{one.scan_id}, seed {shown[0].seed}, {suite.network}. Dice of the whole scan: {', '.join(scores)}"
            )
            png = png_bytes(_figure(one, predictions))
            pictures.append((f"slice_{place}.png", Picture(f"{place.capitalize()} scan", caption, png)))
    return pictures, trouble


def _figure(one: Slice, predictions: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
    return comparison_figure(
        one.image[None], one.truth[None], predictions, spacing_mm=one.spacing_mm, modality=one.modality
    )


def _mean_dice(lines: Sequence[Mapping[str, str]], network: str) -> dict[str, float]:
    """Scan -> mean Dice as predicted, over structures and runs."""
    values: dict[str, list[float]] = {}
    for line in lines:
        if line["network"] == network and line["component"] == "all" and line["dice"] != "":
            values.setdefault(line["scan_id"], []).append(float(line["dice"]))
    return {scan: float(np.mean(found)) for scan, found in values.items()}


def _shown_cells(benchmark: Benchmark) -> list[Cell]:
    """Finished branches of the seed that has most of them, the first of those."""
    finished = [cell for cell in benchmark.phase_b if cell.is_finished()]
    counts = {seed: sum(cell.seed == seed for cell in finished) for seed in benchmark.suite.seeds}
    seed = max(counts, key=lambda s: counts[s])
    return [cell for cell in finished if cell.seed == seed]


def _curves(benchmark: Benchmark) -> list[tuple[str, Picture]]:
    """(file name, curves) for each subset."""
    phase_a = {cell.name: cell for cell in benchmark.phase_a}
    pictures = []
    for name in benchmark.suite.labelled:
        runs = []
        for cell in (c for c in benchmark.phase_b if c.labelled == name and c.is_trained() and c.parent is not None):
            before = RunDirectory(phase_a[str(cell.parent)].run).metrics()
            runs.append(RunCurves(cell.row, cell.seed, before, RunDirectory(cell.run).metrics()))
        for part, figure in enumerate(benchmark_curves(runs), start=1):
            caption = "Bold: mean over seeds; thin: each seed. Dotted: where the rows branch from their common start."
            picture = Picture(benchmark.titles[name], caption, png_bytes(figure))
            pictures.append((f"curves_{name}_{part}.png", picture))
    return pictures


# --- text ----------------------------------------------------------------------------------------------------------


def _summary_markdown(page: BenchmarkPage) -> str:
    parts = [markdown_head(page)]
    for name in dict.fromkeys(reading.labelled for reading in page.readings):
        parts.append(f"## {page.titles[name]}\n")
        for reading in (r for r in page.readings if r.labelled == name):
            parts.append(markdown(summary_grid(reading)))
            compared = comparison_grid(reading)
            parts += [markdown(compared)] if compared else []
    parts += ["## What it took\n", markdown(page.costs)]
    return "\n".join(parts)


def _print_tables(page: BenchmarkPage) -> None:
    """The tested network as predicted, over all structures, on stdout."""
    shown: set[int | str] = set()
    for reading in page.readings:
        if reading.labelled in shown or (reading.network, reading.component) != (page.network, "all"):
            continue
        shown.add(reading.labelled)
        table = Table(title=f"{page.titles[reading.labelled]}: {title_of(reading)}")
        table.add_column("row")
        for name in ("IoU", "Dice", "HD95 mm", "median", "missed"):
            table.add_column(name, justify="right")
        for iou, dice, hd95 in zip(*(reading.summaries[metric] for metric in METRICS), strict=True):
            figures = (text(iou.mean, 3), text(dice.mean, 3), text(hd95.mean, 1), text(hd95.median, 1))
            table.add_row(iou.method, *figures, str(reading.missed[iou.method]))
        Console().print(table)
