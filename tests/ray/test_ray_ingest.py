"""One real Ray: the same scans as a local ingest, failures as lines, a dead worker, resources checked, quiet end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import ray

from distseg.data.cohort import Cohort
from distseg.distributed.cluster import connect
from distseg.distributed.executor import RayExecutor
from distseg.errors import InputError
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort


def dies(item: int) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.ray
def test_ray_ingests_what_a_local_pool_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    source = tmp_path / "s"
    source.mkdir()
    for n in range(5):
        array = np.random.default_rng(n).integers(-1000, 500, (6, 7, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), source / f"scan_{n}.nii.gz")
    (source / "bad.nii.gz").write_bytes(b"")
    reports = {}
    executor = RayExecutor(2)
    try:
        for name, by in (("local", LocalExecutor(1)), ("ray", executor)):
            path = str(tmp_path / f"{name}.zarr")
            reports[name] = ingest_cohort(source=str(source), cohort=path, executor=by, progress=False)
        assert Cohort.open(tmp_path / "ray.zarr").records == Cohort.open(tmp_path / "local.zarr").records
        assert reports["ray"].added == reports["local"].added == [f"scan_{n}" for n in range(5)]
        assert reports["ray"].failed == reports["local"].failed
        with pytest.raises(InputError, match="more workers than the cluster has CPUs for"):
            connect(workers=10_000)
        assert ray.is_initialized()  # a refused connect leaves an existing one alone
        outcomes = {outcome.key: outcome for outcome in executor.map(dies, [0, 1, 2])}
        assert (outcomes["0"].value, outcomes["2"].value) == (0, 2)
        assert "its worker process died" in outcomes["1"].error
    finally:
        executor.close()
    assert not ray.is_initialized()
