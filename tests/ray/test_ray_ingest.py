"""One real Ray: the same scans as a local ingest, failures as lines, a dead worker, resources checked, no port open to
other machines, quiet end."""

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
from tests.faults.killing import kin

# As /proc/net/tcp and tcp6 have them: 127.0.0.1, ::1 and ::ffff:127.0.0.1 in words of little-endian hex.
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def dies(item: int) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def listening(pids: list[int]) -> dict[str, list[int]]:
    """Address in hex -> the ports at which one of the processes takes connections from there."""
    sockets = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(handle))
            except OSError:
                continue  # closed meanwhile
    found: dict[str, list[int]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                address, port = local.split(":")
                found.setdefault(address, []).append(int(port, 16))
    return found


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
        ports = listening([os.getpid(), *kin(os.getpid())])
        assert sum(map(len, ports.values())) >= 3  # Ray's store of nodes, its node, its agent
        assert ports.keys() <= LOOPBACK, ports
        assert ray.is_initialized()  # a refused connect leaves an existing one alone
        outcomes = {outcome.key: outcome for outcome in executor.map(dies, [0, 1, 2])}
        assert (outcomes["0"].value, outcomes["2"].value) == (0, 2)
        assert "its worker process died" in outcomes["1"].error
    finally:
        executor.close()
    assert not ray.is_initialized()
