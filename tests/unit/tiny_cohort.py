"""A cohort small enough to train on in a test: CT-like ellipsoids with two bones of different density.

Training scans a to f are labelled, u and w are not, v is labelled and held out for validation. Fixtures are in
conftest.py. Native axes are RAS, voxels 2 x 2 x 3 mm; canonical arrays are [Z, Y, X] with X towards the left.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort

LABELLED = ("a", "b", "c", "d", "e", "f")
UNLABELLED = ("u", "w")
VALIDATION = ("v",)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
SHAPE = (20, 22, 18)  # native i, j, k: canonical [18, 22, 20]


def scan_arrays(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 and label uint8 (0, 1 hip, 2 femur) in native axes; `number` decides sizes and places."""
    rng = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), axis=-1)
    middle = np.asarray(SHAPE) / 2
    body = (((grid - middle) / (middle - 1)) ** 2).sum(-1) < 1
    hip = np.linalg.norm(grid - (middle + rng.uniform(-2, 2, 3) - [3, 0, 0]), axis=-1) < rng.uniform(3, 4)
    femur = (np.linalg.norm(grid - (middle + rng.uniform(-1, 1, 3) + [4, 0, 0]), axis=-1) < 2.5) & ~hip
    label = (hip + 2 * femur).astype(np.uint8)
    image = np.where(body, 40, -1000) + 400 * hip + 900 * femur + rng.normal(0, 30, SHAPE)
    return image.round().astype(np.int16), label


def write_source(root: Path, *, poisoned: tuple[str, ...] = ()) -> Path:
    """An nnU-Net raw folder. The labels of `poisoned` scans are noise in place of the truth."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for number, scan in enumerate((*LABELLED, *UNLABELLED, *VALIDATION)):
        image, label = scan_arrays(number)
        nib.save(nib.Nifti1Image(image, AFFINE), root / f"imagesTr/{scan}_0000.nii.gz")
        if scan in poisoned:
            label = np.random.default_rng(100 + number).integers(0, 3, SHAPE).astype(np.uint8)
        if scan not in UNLABELLED:
            nib.save(nib.Nifti1Image(label, AFFINE), root / f"labelsTr/{scan}.nii.gz")
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "hip": 1, "femur": 2}}
    (root / "dataset.json").write_text(json.dumps(dataset))
    splits = {"train": [*LABELLED, *UNLABELLED], "val": list(VALIDATION), "test": []}
    (root / "splits.json").write_text(json.dumps(splits))
    return root


def make_cohort(root: Path, *, poisoned: tuple[str, ...] = ()) -> str:
    """Source and store under `root`; the store's path."""
    source, cohort = write_source(root / "source", poisoned=poisoned), root / "tiny.zarr"
    report = ingest_cohort(source=str(source), cohort=str(cohort), executor=LocalExecutor(1), progress=False)
    assert report.failed == []
    return str(cohort)
