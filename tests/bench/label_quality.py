"""Does labelling find the scans that went wrong, and is matching better than the argmax it replaces?

Labels the annotated validation scans of a cohort by `label_cohort`, as `distseg label` does (overlap 0.25, for time),
and only then opens their annotations. The teacher's argmax and the label after matching come from one reading,
on the run's grid; the ranking is that of scans.csv, against the Dice of the masks on native grids. Keys, means over
scans:
  label_quality.dice.argmax  .matched      and iou, on the run's grid, all classes' mean
  label_quality.matched_gain               matched - argmax of the Dice, with its 95 % bootstrap interval .low and .high
  label_quality.doubtful_right.argmax  .matched    share of the doubtful voxels whose label is the annotation's
  label_quality.spearman                   of expected_error against 1 - Dice of the native mask; 1 is perfect
  label_quality.spearman.EVIDENCE          of each column that the ranking is made of
  label_quality.worst_third_found          of the third of worst Dice the share in the first third of the ranking
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from scipy.stats import spearmanr

from distseg.config.verbs import LabelSectionConfig
from distseg.data.cohort import Cohort
from distseg.data.label_output import committed_path
from distseg.data.nifti import read_nifti
from distseg.errors import ConfigError
from distseg.inference.scan_facts import FactsOfPlanes
from distseg.work import label_cohort as driver
from distseg.work.executor import LocalExecutor
from distseg.work.label_review import EVIDENCE
from distseg.work.label_sources import Sources, find_sources
from distseg.work.label_task import label_one

OVERLAP = 0.25
LESS_IS_WORSE = "expected_dice"


def run(trained: str | None = None, cohort: str | None = None, output: str | None = None) -> dict[str, float]:
    """`output`: keep the masks and the review there."""
    if trained is None or cohort is None:
        raise ConfigError("label_quality needs a trained run and its cohort", where="--trained, --cohort")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as scratch:
        folder = Path(output or scratch)
        voxels = _labelled(trained, cohort, folder)
        keys = _of_both(voxels) | _of_ranking(Cohort.open(cohort), folder)
    Console().print({key: round(value, 3) for key, value in keys.items()})
    return keys


def _labelled(trained: str, cohort: str, folder: Path) -> list[dict[str, float]]:
    """Label into `folder`; of each scan Dice and IoU of both labels, and the doubtful voxels that each has right."""
    scans: list[dict[str, float]] = []
    opened = Cohort.open(cohort)
    annotated = {record.scan_id for record in opened.select("val", labelled=True)}

    def annotated_only(*args: Any, **keywords: Any) -> Sources:
        found = find_sources(*args, **keywords)
        return dataclasses.replace(found, scans=[scan for scan in found.scans if scan.scan_id in annotated])

    def labeller(task: Any) -> Any:
        with _watching() as seen:
            made = label_one(task)
        truth = opened.scan(task.scan_id).annotation
        assert truth is not None, "annotated scans alone are labelled"
        scans.append(_compared(seen, np.asarray(truth[...])))
        Console(stderr=True).print({"scan": task.scan_id, **scans[-1]})
        return made

    with mock.patch.object(driver, "find_sources", annotated_only):
        driver.label_cohort(
            run=trained, cohort=cohort, output=str(folder), settings=LabelSectionConfig(overlap=OVERLAP),
            executor=LocalExecutor(1), progress=False, labeller=labeller,
        )  # fmt: skip
    return scans


@dataclasses.dataclass
class _Seen:
    """Of the slabs of one scan: the teacher's argmax, what it became, and what trust/ says of it."""

    teacher: list[np.ndarray] = dataclasses.field(default_factory=list)
    label: list[np.ndarray] = dataclasses.field(default_factory=list)
    codes: list[np.ndarray] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def _watching() -> Iterator[_Seen]:
    """Inside, the slabs that are counted are kept too."""
    seen, before = _Seen(), FactsOfPlanes.add

    def add(facts: Any, shares: Any, entropy: Any, *, label: Any, teacher: Any, codes: Any) -> None:
        for kept, slab in ((seen.teacher, teacher), (seen.label, label), (seen.codes, codes)):
            kept.append(slab.numpy().astype(np.uint8))
        before(facts, shares, entropy, label=label, teacher=teacher, codes=codes)

    with mock.patch.object(FactsOfPlanes, "add", add):
        yield seen


def _compared(seen: _Seen, truth: np.ndarray) -> dict[str, float]:
    teacher, label, codes = (np.concatenate(slabs) for slabs in (seen.teacher, seen.label, seen.codes))
    if label.shape != truth.shape:
        raise ConfigError("the cohort is not on the run's grid", where="--cohort", value=truth.shape)
    doubtful = codes > 0
    row: dict[str, float] = {"doubtful": float(doubtful.sum())}
    for name, mask in (("argmax", teacher), ("matched", label)):
        dice = np.mean([_dice(mask == c, truth == c) for c in np.unique(truth) if c])
        row |= {f"dice.{name}": float(dice), f"iou.{name}": float(dice / (2 - dice))}
        row[f"right.{name}"] = float((mask == truth)[doubtful].sum())
    return row


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / max(1.0, float(a.sum() + b.sum()))


def _of_both(scans: list[dict[str, float]]) -> dict[str, float]:
    def column(name: str) -> np.ndarray:
        return np.asarray([scan[name] for scan in scans])

    keys = {f"{k}.{by}": float(column(f"{k}.{by}").mean()) for k in ("dice", "iou") for by in ("argmax", "matched")}
    gain = column("dice.matched") - column("dice.argmax")
    drawn = np.random.default_rng(0).integers(0, len(gain), (10_000, len(gain)))
    low, high = np.quantile(gain[drawn].mean(1), (0.025, 0.975))
    keys |= {"matched_gain": float(gain.mean()), "matched_gain.low": float(low), "matched_gain.high": float(high)}
    doubtful = max(1.0, float(column("doubtful").sum()))
    keys |= {f"doubtful_right.{by}": float(column(f"right.{by}").sum()) / doubtful for by in ("argmax", "matched")}
    return {f"label_quality.{name}": value for name, value in keys.items()}


def _of_ranking(cohort: Cohort, folder: Path) -> dict[str, float]:
    with open(folder / "scans.csv") as file:
        rows = list(csv.DictReader(file))
    dice = []
    for row in rows:
        truth = cohort.scan(row["scan_id"]).native_annotation()
        assert truth is not None, "annotated scans only"
        mask = read_nifti(committed_path(folder, "masks", row["scan_id"])).array
        dice.append(np.mean([_dice(mask == c, truth == c) for c in np.unique(truth) if c]))
    error = 1 - np.asarray(dice)
    keys = {"label_quality.native_dice": float(np.mean(dice))}
    for name in ("expected_error", *EVIDENCE):
        values = np.asarray([float(row[name] or "nan") for row in rows]) * (-1 if name == LESS_IS_WORSE else 1)
        known = ~np.isnan(values)
        if known.sum() > 2 and np.ptp(values[known]) > 0:
            suffix = "" if name == "expected_error" else f".{name}"
            keys[f"label_quality.spearman{suffix}"] = float(spearmanr(values[known], error[known]).statistic)
    third = max(1, len(rows) // 3)
    keys["label_quality.worst_third_found"] = float(np.isin(np.argsort(-error)[:third], np.arange(third)).mean())
    return keys
