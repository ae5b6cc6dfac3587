"""After labelling: which masks to distrust, with pictures, and which scans to annotate next.

    OUT/scans.csv           a line a scan, the least to be trusted first
    OUT/next_to_label.csv   rank, by (doubt_and_diversity | random), scan_id; of the scans without annotation
    OUT/review.html         for a reader without this program

Facts come from the ledger, streamed: a row here is numbers, so a million scans fit in memory. The pictures alone read
images and masks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distseg.config.verbs import LabelSectionConfig
from distseg.data.carry import write_file
from distseg.data.keys import Purpose, generator
from distseg.data.label_output import read_ledger
from distseg.data.place import is_url, write_text
from distseg.errors import DataError
from distseg.evaluation.distrust import expected_error, next_to_label, random_with_foreground, volume_deviation
from distseg.evaluation.review_page import ReviewContent, render_review
from distseg.inference.model import Model
from distseg.work.executor import Executor
from distseg.work.label_pictures import review_pictures
from distseg.work.label_reference import Reference, reference_of
from distseg.work.label_sources import Sources

# What ranks a scan, each higher where it is worse; what each found on real scans is in tests/bench/RESULTS.md.
EVIDENCE = ("surface_entropy", "doubtful_share", "disagreement", "components", "volume_deviation", "expected_dice")


@dataclass(frozen=True)
class Facts:
    """The done scans of a ledger as columns; descriptors float32 [n, E] unit vectors or zeros."""

    columns: dict[str, np.ndarray]
    volumes_ml: np.ndarray  # [n, classes]
    components: np.ndarray  # [n, classes]
    descriptors: np.ndarray
    scan_ids: list[str]


def write_review(
    output: Path,
    *,
    run: str,
    sources: Sources,
    model: Model,
    settings: LabelSectionConfig,
    executor: Executor,
    set_aside: Sequence[tuple[str, str]],
) -> None:
    """Write the three files, each whole or not at all. Nothing where no scan is done."""
    facts = read_facts(output, {scan.scan_id for scan in sources.scans})
    if not facts.scan_ids:
        return
    reference, note = reference_of(run, sources.cohort, model.class_names)
    rows, order = rank(facts, reference, model.class_names)
    _write(output / "scans.csv", _csv(rows, header=tuple(rows[0])))
    by_id = {scan.scan_id: scan for scan in sources.scans}
    score = np.empty(len(order))
    score[order] = [row["expected_error"] for row in rows]
    open_to_label = np.asarray([not by_id[scan].labelled for scan in facts.scan_ids])
    next_ids = _next_ids(facts, score, np.flatnonzero(open_to_label), settings)
    lines = [{"rank": i + 1, "by": by, "scan_id": scan} for by, ids in next_ids.items() for i, scan in enumerate(ids)]
    _write(output / "next_to_label.csv", _csv(lines, header=("rank", "by", "scan_id")))
    shown = rows[: settings.review_scans]
    content = ReviewContent(
        run_name=Path(run).resolve().name,
        method=model.info.method,
        matched=model.matcher is not None,
        rows=rows,
        pictures=review_pictures(output, shown, by_id, executor),
        next_ids=next_ids,
        set_aside=set_aside,
        notes=[note] if note else [],
    )
    _write(output / "review.html", render_review(content))


def _write(file: Path, text: str) -> None:
    if is_url(file):
        write_file(file, text.encode())
    else:
        write_text(file, text)


def read_facts(output: Path, wanted: set[str]) -> Facts:
    """The last line of each wanted scan that is done, in the order of their ids."""
    found: dict[str, tuple[tuple[float, ...], tuple[list[float], list[int], list[float]]]] = {}
    for line in read_ledger(output):
        scan_id = line.get("done")
        if scan_id in wanted:
            try:
                found[scan_id] = _numbers(line), _lists(line)
            except (KeyError, TypeError, ValueError) as error:
                what, fix = (
                    f"damaged line of the ledger: {type(error).__name__} {error}",
                    "delete the line of that scan",
                )
                raise DataError(what, where=output, value=scan_id, fix=f"{fix}; it is labelled again") from error
    scan_ids = sorted(found)  # the ledger's order is that in which work was done: not the same twice
    numbers, lists = ([found[scan_id][part] for scan_id in scan_ids] for part in (0, 1))
    columns = np.asarray(numbers, np.float64).reshape(len(numbers), len(_COLUMNS))
    volumes, components, descriptors = (np.asarray([entry[i] for entry in lists]) for i in range(3))
    by_name = dict(zip(_COLUMNS, columns.T, strict=True))
    return Facts(by_name, volumes, components, descriptors.astype(np.float32), scan_ids)


_COLUMNS = (
    "expected_dice", "surface_entropy", "doubtful_share", "matched_share", "disagreement", "largest_share",
    "threshold_nats", "native_voxels", "removed_voxels", "seconds",
)  # fmt: skip


def _numbers(line: Mapping[str, Any]) -> tuple[float, ...]:
    dice = [value for value in line["expected_dice"] if value is not None]
    object_voxels = max(1, sum(line["class_voxels"]))
    return (
        sum(dice) / len(dice) if dice else np.nan,
        line["surface_entropy"],
        line["doubtful"] / object_voxels,
        line["matched"] / object_voxels,
        line["disagreeing"] / line["matched"] if line["matched"] else np.nan,
        min(line["largest_share"]),
        line["threshold_nats"],
        line["native_voxels"],
        line["removed_voxels"],
        line["seconds"],
    )


def _lists(line: Mapping[str, Any]) -> tuple[list[float], list[int], list[float]]:
    volumes = [voxels * line["native_voxel_ml"] for voxels in line["mask_voxels"]]
    return volumes, line["components"], line["descriptor"]


def rank(facts: Facts, reference: Reference, class_names: Sequence[str]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Lines of scans.csv, worst first, and the places of their scans in `facts`."""
    names = class_names[1:]
    deviations = np.stack(
        [volume_deviation(facts.volumes_ml[:, i], reference.volumes_ml.get(name, [])) for i, name in enumerate(names)]
    )
    with np.errstate(all="ignore"):
        known = ~np.isnan(deviations)
        deviation = np.where(known.any(0), np.max(np.where(known, deviations, -np.inf), axis=0), np.nan)
    usual = np.asarray([reference.components.get(name, 1) for name in names])
    columns = facts.columns
    evidence = {
        "surface_entropy": columns["surface_entropy"],
        "doubtful_share": columns["doubtful_share"],
        "disagreement": columns["disagreement"],
        "components": np.maximum(facts.components - usual, 0).sum(1).astype(np.float64),
        "volume_deviation": deviation,
        "expected_dice": 1 - columns["expected_dice"],
    }
    score = expected_error({name: evidence[name] for name in EVIDENCE})
    order = np.argsort(-score, kind="stable")
    rows = []
    for place, i in enumerate(order, start=1):
        row: dict[str, Any] = {"rank": place, "scan_id": facts.scan_ids[i], "expected_error": round(float(score[i]), 4)}
        row |= {name: _figure(columns[name][i]) for name in _COLUMNS[:6]}
        row |= {"components": int(facts.components[i].sum()), "volume_deviation": _figure(deviation[i])}
        row |= {"volume_ml": _figure(facts.volumes_ml[i].sum())}
        row |= {f"volume_ml_{name}": _figure(facts.volumes_ml[i, c]) for c, name in enumerate(names)}
        row |= {name: _figure(columns[name][i]) for name in _COLUMNS[6:]}
        rows.append(row)
    return rows, order


def _figure(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 5)


def _next_ids(
    facts: Facts, score: np.ndarray, candidates: np.ndarray, settings: LabelSectionConfig
) -> dict[str, list[str]]:
    """Of the scans without annotation, `candidates` by place in `facts`."""
    found = facts.volumes_ml.sum(1) > 0
    rng = generator(settings.seed, Purpose.NEXT_TO_LABEL)
    chosen = {
        "doubt_and_diversity": next_to_label(
            score[candidates], facts.descriptors[candidates], count=settings.next_scans
        ),
        "random": random_with_foreground(found[candidates], count=settings.next_scans, rng=rng),
    }
    return {by: [facts.scan_ids[candidates[i]] for i in places] for by, places in chosen.items()}


def _csv(rows: Iterable[Mapping[str, Any]], *, header: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
