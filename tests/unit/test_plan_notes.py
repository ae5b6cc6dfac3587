"""What a plan learns of the labels that train, and of no other: classes of one piece; how large the object is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from distseg.config.compose import train_config
from distseg.data.cohort import Cohort
from distseg.training import whole_classes as whole_classes_module
from distseg.training.plan import make_plan
from distseg.training.whole_classes import whole_classes
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
    assert all(f"{name} (one piece in 2 labelled scans)" in note for note in told for name in whole)
    assert bool(told) == (bool(whole) and config.postprocess.components == "auto")


def test_a_rare_class_is_judged_by_the_scans_that_have_it(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scan of each class is read, and only `a`, where it lies in pieces, has the femur."""
    monkeypatch.setattr(whole_classes_module, "MAX_SCANS", 1)
    records = [
        record if record.scan_id == "a" else dataclasses.replace(record, voxels={**record.voxels, "femur": 0})
        for record in cohort.records
    ]
    ids = ["c", "d", "e", "a"]
    config = train_config(cohort=cohort.path, run=str(tmp_path / "run"), overrides={"data.labeled_ids": ids})
    whole, note = whole_classes(config, dataclasses.replace(cohort, records=records), sorted(ids))
    assert whole == ("hip",)
    assert note is not None
    assert "hip (one piece in 1 labelled scans)" in note
    nobody = [dataclasses.replace(record, voxels={**record.voxels, "femur": 0}) for record in cohort.records]
    assert whole_classes(config, dataclasses.replace(cohort, records=nobody), sorted(ids))[0] == ("hip",)


def test_the_papers_preset_filters_nothing(cohort: Cohort, tmp_path: Path) -> None:
    config = train_config(cohort=cohort.path, run=str(tmp_path / "run"), preset="xie2024")
    assert make_plan(config, cohort).whole == ()


def test_a_patch_that_sees_too_little_is_told_with_a_spacing(cohort: Cohort, tmp_path: Path) -> None:
    def notes(**overrides: Any) -> list[str]:
        keys = {"data.labeled_ids": ["c"], "sampling.patch_zyx": [16, 8, 8], **overrides}
        config = train_config(cohort=cohort.path, run=str(tmp_path / "run"), overrides=keys)
        return [note for note in make_plan(config, cohort).notes if "a patch covers" in note]

    box = np.argwhere(scan_arrays(2)[1] > 0)  # of scan c, i j k
    z, y, x = ((box.max(0) - box.min(0) + 1) * [2, 2, 3])[::-1]
    (told,) = notes(**{"data.spacing_mm": [0.5, 0.5, 0.5]})
    assert f"a patch covers 8 x 4 x 4 mm, the labelled object {z:.0f} x {y:.0f} x {x:.0f} mm" in told
    half = [np.ceil(side / 2 / size * 10) / 10 for side, size in ((z, 16), (y, 8), (x, 8))]
    assert told.endswith(f"data.spacing_mm=[{','.join(f'{max(one, 0.5):g}' for one in half)}]")
    assert notes() == []
    branch = {"data.spacing_mm": [0.5, 0.5, 0.5], "train.init_from": "parent"}
    assert notes(**branch) == []  # the parent's spacing, and no other
    assert notes(**{"data.spacing_mm": [0.5, 0.5, 0.5], "data.labeled_patches": 200}) == []
