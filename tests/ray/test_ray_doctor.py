"""The doctor on a cluster of two nodes, and on one that does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import distseg
from distseg.work.doctor_checks import Finding

CHECKS = [
    "cluster", "resources", "versions", "devices", "faiss", "patches", "shared memory", "storage", "free disk",
    "clocks", "process group", "authentication",
]  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_are_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        findings = {f.check: f for f in distseg.doctor(storage=tmp_path, storage_mib=1, workers=2)}
        assert list(findings) == CHECKS
        assert findings["cluster"].text.endswith("2 nodes")
        assert findings["resources"].level == "ok"
        assert findings["versions"].level == "ok"
        assert "across 2 nodes" in findings["storage"].text
        assert "gloo over 2 nodes: 6 MiB summed" in findings["process group"].text
        assert findings["authentication"].level == "warn"
        too_many = {f.check: f for f in distseg.doctor(storage=tmp_path, storage_mib=1, workers=3)}
        assert too_many["resources"].level == "fail"
        assert list(tmp_path.iterdir()) == []
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    findings: list[Finding] = distseg.doctor()
    assert [(finding.check, finding.level) for finding in findings] == [("cluster", "fail")]
