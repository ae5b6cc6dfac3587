"""A disk that fills up in the middle of an ingest: a small file system of its own, where this user may mount one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distseg.data.cohort import Cohort, index_path
from distseg.errors import DataError, FinishedWithFailures
from distseg.work.cohort_actions import repair_cohort
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import IngestReport, ingest_cohort

SHAPE = (64, 64, 64)  # half a MiB of noise, which no codec makes smaller
CASES = 8
PAGE = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs a user who may mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def noise_source(root: Path) -> Path:
    root.mkdir()
    for number in range(CASES):
        array = np.random.default_rng(number).integers(-(2**15), 2**15, SHAPE).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.eye(4)), root / f"scan{number}.nii")
    return root


def ingest(source: Path, cohort: Path) -> IngestReport:
    return ingest_cohort(source=str(source), cohort=str(cohort), executor=LocalExecutor(1), progress=False)


def test_a_full_disk_is_a_clear_line_and_the_same_command_goes_on(tmp_path: Path, small_disk: Path) -> None:
    source, path = noise_source(tmp_path / "source"), small_disk / "c.zarr"
    report = ingest(source, path)
    assert 0 < len(report.added) < CASES
    assert len(report.added) + len(report.failed) == CASES
    for scan_id, why in report.failed:
        assert why == f"{scan_id}: no room left for this scan (got No space left on device); make room, " + (
            "then give the same command again"
        )
    assert {entry.name for entry in path.iterdir()} == {*report.added, "zarr.json"}  # nothing half-written
    assert not (small_disk / "c.staging").exists()
    assert [record.scan_id for record in Cohort.open(path).records] == report.added
    with pytest.raises(FinishedWithFailures, match="no usable case"):
        ingest(noise_source(tmp_path / "nothing fits"), small_disk / "other.zarr")
    assert not (small_disk / "other.zarr").exists()
    os.system(f"mount -o remount,size=32m {small_disk}")
    again = ingest(source, path)
    assert again.failed == []
    assert sorted(again.added + again.skipped) == [f"scan{number}" for number in range(CASES)]
    truth = np.random.default_rng(7).integers(-(2**15), 2**15, SHAPE).astype(np.int16)
    scan = Cohort.open(path).scan("scan7")
    assert np.array_equal(scan.native.from_canonical(scan.image[...]), truth)


def test_no_room_for_the_index_or_the_lock(tmp_path: Path, small_disk: Path) -> None:
    source, path = noise_source(tmp_path / "source"), small_disk / "c.zarr"
    for case in sorted(source.iterdir())[2:]:
        case.rename(tmp_path / case.name)
    ingest(source, path)
    before = Cohort.open(path)
    fill(small_disk)
    with pytest.raises(
        DataError, match=r"c\.zarr: no room left on its disk \(got No space left on device\); make room"
    ):
        repair_cohort(str(path))  # writes the index anew
    assert Cohort.open(path) == before
    (small_disk / "filler").unlink()
    assert repair_cohort(str(path)).scans == 2
    index_path(path).unlink()
    fill(small_disk)
    with pytest.raises(DataError, match="no room left on its disk"):
        ingest(source, path)
    (small_disk / "filler").unlink()
    assert ingest(source, path).skipped == ["scan0", "scan1"]


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(PAGE))
            except OSError:
                return
