"""Which classes are one piece is learned from the labels that train, and from no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from distseg.config.compose import train_config
from distseg.data.cohort import Cohort
from distseg.training.plan import make_plan
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort
from tests.unit.tiny_cohort import AFFINE, scan_arrays, write_source


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Of scan `a` the femur lies in two pieces of 3 : 1; of `b` a crumb is apart, less than one in twenty."""
    root = tmp_path_factory.mktemp("pieces")
    source = write_source(root / "source")
    for number, scan, crumb in ((0, "a", (3, 3, 3)), (1, "b", (1, 1, 2))):
        label = scan_arrays(number)[1]
        far = label * 0
        far[: crumb[0], : crumb[1], : crumb[2]] = 2
        nib.save(nib.Nifti1Image(np.where(far, far, label), AFFINE), source / f"labelsTr/{scan}.nii.gz")
    path = str(root / "pieces.zarr")
    ingest_cohort(source=str(source), cohort=path, executor=LocalExecutor(1), progress=False)
    return Cohort.open(path)


@pytest.mark.parametrize(
    ("overrides", "whole"),
    [
        ({"data.labeled_ids": ["a", "c"]}, ("hip",)),
        ({"data.labeled_ids": ["b", "c"]}, ("hip", "femur")),  # a crumb; `a` is not among the labels
        ({"data.labeled_ids": ["a", "c"], "postprocess.components": "largest"}, ("hip", "femur")),
        ({"data.labeled_ids": ["b", "c"], "postprocess.components": "all"}, ()),
        ({"data.labeled_ids": ["b", "c"], "data.labeled_patches": 6}, ()),  # the rest of the labels is not known
    ],
)
def test_classes_of_one_piece(
    overrides: dict[str, Any], whole: tuple[str, ...], cohort: Cohort, tmp_path: Path
) -> None:
    small = {"sampling.patch_zyx": [16, 8, 8]}
    config = train_config(cohort=cohort.path, run=str(tmp_path / "run"), overrides={**small, **overrides})
    plan = make_plan(config, cohort)
    assert plan.whole == whole
    told = [note for note in plan.notes if "largest component" in note]
    assert bool(told) == (bool(whole) and config.postprocess.components == "auto")


def test_the_papers_preset_filters_nothing(cohort: Cohort, tmp_path: Path) -> None:
    config = train_config(cohort=cohort.path, run=str(tmp_path / "run"), preset="xie2024")
    assert make_plan(config, cohort).whole == ()
