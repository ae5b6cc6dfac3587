"""Pseudo-labels of a cohort's scans as training reads them: on the run's grid, unsure voxels marked to be ignored.

    FOLDER/ID/label     uint8 [Z, Y, X] on the run's grid, IGNORE where the trust map is below the floor
    FOLDER/ID/voxels    int32 [n, 4] (class, z, y, x): up to 2000 of each class to place patches at

A scan is brought there when it is first touched, by whichever rank comes first, and read by box from then on: masks
come as compressed NIfTI in native grids, which cannot be.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from distseg.data.carry import local_copy
from distseg.data.cohort import Cohort, Scan
from distseg.data.keys import Purpose, generator
from distseg.data.label_output import CODE_STEP, CONFIDENCE_STEPS, KINDS, NO_LABEL, committed_path
from distseg.data.nifti import read_nifti
from distseg.data.patches import LabelArray, PatchReader, crop
from distseg.data.place import join
from distseg.data.volume import Volume, resample_box
from distseg.errors import DataError
from distseg.losses.supervised import IGNORE

CLASS_SAMPLES = 2000
_CHUNK = 64


class PseudoLabels:
    """The pseudo-labels `output` holds of `scans`, in this order on every rank.

    Args:
        reader: says each scan's shape on the run's grid.
        folder: for the labels on the run's grid; any rank may write there.
        confidence: 0 to 1, the least a voxel's label must have in the trust map; one without a label is never taken.
    """

    def __init__(
        self,
        output: Path,
        *,
        scans: Sequence[str],
        cohort: Cohort,
        reader: PatchReader,
        spacing_mm: Sequence[float],
        folder: Path,
        confidence: float,
    ) -> None:
        self.scans = tuple(scans)
        self._output, self._folder, self._reader = output, folder, reader
        self._cohort_path, self._class_names = cohort.path, cohort.class_names
        self._spacing_mm, self._least = tuple(spacing_mm), confidence * CONFIDENCE_STEPS
        self._labels: dict[str, zarr.Array[Any]] = {}
        self._foreground: dict[str, dict[str, npt.NDArray[np.int32]]] = {}

    def label(self, scan_id: str, start: Sequence[int], size: Sequence[int]) -> LabelArray:
        """Classes of a box, uint8; IGNORE where unsure and beyond the scan."""
        if scan_id not in self._labels:
            self._labels[scan_id] = zarr.open_array(self._brought(scan_id) / "label", mode="r", zarr_format=3)
        stored = self._labels[scan_id]
        low = [max(s, 0) for s in start]
        high = [max(min(s + n, extent), a) for s, n, extent, a in zip(start, size, stored.shape, low, strict=True)]
        inside = np.asarray(stored[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], np.uint8)
        return crop(inside, [s - a for s, a in zip(start, low, strict=True)], size, fill=IGNORE).astype(np.uint8)

    def foreground(self, scan_id: str) -> dict[str, npt.NDArray[np.int32]]:
        """Class name -> voxels [n, 3] that are sure to be of it; {} where there are none."""
        if scan_id not in self._foreground:
            voxels = np.asarray(zarr.open_array(self._brought(scan_id) / "voxels", mode="r", zarr_format=3)[...])
            of_class = {name: voxels[voxels[:, 0] == value, 1:] for value, name in enumerate(self._class_names)}
            self._foreground[scan_id] = {name: found for name, found in of_class.items() if len(found)}
        return self._foreground[scan_id]

    def _brought(self, scan_id: str) -> Path:
        """The scan's folder, made where there is none; of two ranks at once one's stays, and they are equal."""
        folder = self._folder / scan_id
        if folder.is_dir():
            return folder
        label = self._on_run_grid(scan_id)
        partial = self._folder / f".{scan_id}.{uuid.uuid4().hex[:8]}"
        try:
            zarr.create_array(partial / "label", data=label, chunks=tuple(min(_CHUNK, n) for n in label.shape))
            zarr.create_array(partial / "voxels", data=self._drawn(scan_id, label))
            with contextlib.suppress(OSError):  # not empty: another rank was first
                os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _on_run_grid(self, scan_id: str) -> LabelArray:
        scan = Scan(join(self._cohort_path, scan_id), scan_id)
        mask, trust = (self._volume(kind, scan_id) for kind in KINDS)
        native = scan.native
        for volume in (mask, trust):
            if volume.native.shape != native.shape or not np.allclose(volume.native.affine, native.affine, atol=1e-3):
                rule = "masks and trust maps lie in the grid of the scan's source"
                fix = "label this cohort again"
                raise DataError("pseudo-label of another image", where=scan_id, rule=rule, fix=fix)
        unsure = (trust.array % CODE_STEP < self._least) | (trust.array == NO_LABEL)
        label: LabelArray = resample_box(
            np.where(unsure, np.uint8(IGNORE), mask.array.astype(np.uint8)),
            source_spacing_mm=native.geometry.spacing_mm,
            target_spacing_mm=self._spacing_mm,
            start_zyx=(0, 0, 0),
            size_zyx=self._reader.shape(scan_id),
            order=0,
            fill=IGNORE,
        )
        return label

    def _volume(self, kind: str, scan_id: str) -> Volume:
        with local_copy(committed_path(self._output, kind, scan_id)) as file:
            return read_nifti(file)

    def _drawn(self, scan_id: str, label: LabelArray) -> npt.NDArray[np.int32]:
        key = int.from_bytes(hashlib.sha256(scan_id.encode()).digest()[:8], "little")
        rng = generator(0, Purpose.PSEUDO_VOXELS, key)
        regions = [np.zeros((0, 4), np.int32)]
        for value in range(1, len(self._class_names)):
            where = np.argwhere(label == value)
            chosen = where[np.sort(rng.permutation(len(where))[:CLASS_SAMPLES])]
            regions.append(np.insert(chosen, 0, value, axis=1).astype(np.int32))
        return np.concatenate(regions)
