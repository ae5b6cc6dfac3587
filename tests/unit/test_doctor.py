"""The doctor: each judgement on hand-made facts, each probe on this machine, and the whole of launcher=local."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import tracemalloc
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import distseg
from distseg.cli import main
from distseg.data.place import as_place, is_url
from distseg.matching import index_check
from distseg.matching.index_check import FaissReport, faiss_report
from distseg.work import doctor_checks as checks
from distseg.work import node_facts, node_probes
from distseg.work.doctor import disks_of
from distseg.work.doctor_checks import Finding
from distseg.work.node_facts import Disk, Gpu, NodeFacts
from distseg.work.node_probes import Speed

WORKING = FaissReport(("faiss-cpu 1.15.1",), importable=True, microseconds_a_query=20.0)
VERSIONS = {"python": "3.11.7", "distseg": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "zarr": "3.1.6"}
HEALTHY = NodeFacts(
    node="a",
    versions=VERSIONS,
    out_of_range=(),
    cores=8,
    cpu_limit=None,
    memory_gib=64.0,
    gpus=(),
    torch_cuda=None,
    has_nvidia_driver=False,
    faiss=WORKING,
    shared_memory=Disk("/dev/shm", 30.0, 32.0),
    temporary=Disk("/tmp", 100.0, 200.0),
    ray_auth_mode="token",
)
H100 = Gpu("NVIDIA H100", 79.6)


def node(name: str = "a", **changes: Any) -> NodeFacts:
    return dataclasses.replace(HEALTHY, node=name, **changes)


def versions(**changes: str) -> dict[str, str]:
    return {**VERSIONS, **changes}


def judged(finding: Finding) -> tuple[str, str]:
    return finding.level, finding.line()


WITHOUT_RAY = {name: value for name, value in VERSIONS.items() if name != "ray"}


@pytest.mark.parametrize(
    ("finding", "level", "says"),
    [
        (checks.check_versions([node("a"), node("b")]), "ok", "python 3.11.7, torch 2.13.0, ray 2.60.0"),
        (
            checks.check_versions([node("a"), node("b"), node("c", versions=versions(torch="2.12.1"))]),
            "fail",
            "torch 2.13.0 on a, b and 2.12.1 on c",
        ),
        (checks.check_versions([node("a"), node("b", versions=versions(zarr="3.2.0"))]), "warn", "zarr 3.1.6 on a"),
        (checks.check_versions([node(), node("b", versions=WITHOUT_RAY)]), "fail", "ray 2.60.0 on a and none on b"),
        (checks.check_versions([node(versions=WITHOUT_RAY)]), "warn", "only launcher=local works"),
        (checks.check_versions([node(out_of_range=("zarr 3.0.0 is not >=3.1.6",))]), "fail", "zarr 3.0.0 is not"),
        (checks.check_devices([node("a"), node("b")], gpus_per_worker=0), "ok", "16 cores, 128 GiB; no GPU on a, b"),
        (checks.check_devices([node(gpus=(H100,))], gpus_per_worker=1), "ok", "NVIDIA H100 80 GiB on a"),
        (checks.check_devices([node()], gpus_per_worker=1), "fail", "resources.gpus_per_worker=1"),
        (checks.check_devices([node(has_nvidia_driver=True)], gpus_per_worker=0), "warn", "built without CUDA"),
        (
            checks.check_devices([node(has_nvidia_driver=True, torch_cuda="13.0")], gpus_per_worker=0),
            "warn",
            "CUDA 13.0, which the driver refuses",
        ),
        (checks.check_devices([node(cpu_limit=2.0)], gpus_per_worker=0), "warn", "2 of 8 on a"),
        (checks.check_faiss([node()]), "ok", "exact search 20 us"),
        (
            checks.check_reader([node("a", reader="tensorstore"), node("b")]),
            "ok",
            "read by zarr-python on b (distseg[io]",
        ),
        (checks.check_reader([node(reader="tensorstore")]), "ok", "read by TensorStore"),
        (checks.check_faiss([node(faiss=FaissReport(()))]), "ok", "runs in torch"),
        (
            checks.check_faiss([node(), node("b", faiss=FaissReport(("faiss-cpu 1", "faiss-gpu 1"), importable=True))]),
            "fail",
            "faiss-cpu 1 and faiss-gpu 1 are both installed and own the same module (b)",
        ),
        (checks.check_faiss([node(faiss=FaissReport(("faiss-gpu 1",), error="no lib"))]), "fail", "broken (no lib)"),
        (
            checks.check_faiss([node(faiss=dataclasses.replace(WORKING, error="its search finds other"))]),
            "fail",
            "its search finds other",
        ),
        (checks.check_faiss([node(gpus=(H100,))]), "warn", "install distseg[gpu]"),
        (
            checks.check_faiss([node(faiss=dataclasses.replace(WORKING, distributions=("faiss-gpu 1.15.1",)))]),
            "ok",
            "searches on the CPU",
        ),
        (checks.check_shared_memory([node()], object_store_gib={"a": 19.0}), "ok", "32 GiB"),
        (checks.check_shared_memory([node()], object_store_gib={"a": 40.0}), "warn", "32 GiB on a, 40 wanted"),
        (
            checks.check_shared_memory([node(shared_memory=Disk("/dev/shm", 0.06, 0.0625))], object_store_gib={}),
            "warn",
            "--shm-size",
        ),
        (checks.check_shared_memory([node(shared_memory=None)], object_store_gib={}), "warn", "0 GiB on a"),
        (checks.check_disk({"a": [Disk("/x", 99.0, 200.0)]}), "ok", "99 GiB at least (/x)"),
        (checks.check_disk({"a": [Disk("/x", 5.0, 50.0)]}), "warn", "5.0 of 50 GiB under /x on a"),
        (checks.check_disk({"a": [Disk("/x", 40.0, 1000.0)]}), "warn", "40.0 of 1000"),
        (checks.check_disk({"a": [Disk("/x", 0.4, 50.0), Disk("/y", 5.0, 50.0)]}), "fail", "0.4 of 50"),
        (checks.check_clocks({"a": 0.001, "b": -0.2}), "ok", "0.200 s"),
        (checks.check_clocks({"a": 0.0, "b": -3.0}), "warn", "3.000 s apart (b)"),
        (checks.check_clocks({"a": 100.0}), "fail", "chrony"),
        (checks.check_round_trip("2 nodes", 0.01), "ok", "10 ms"),
        (checks.check_round_trip("2 nodes", 0.8), "warn", "longer than a step"),
        (checks.check_round_trip("2 nodes", "timed out"), "fail", "GLOO_SOCKET_IFNAME"),
        (checks.check_authentication([node()], loopback_only=False), "ok", "asks for a token"),
        (checks.check_authentication([node(ray_auth_mode=None)], loopback_only=False), "warn", "no token on a"),
        (checks.check_authentication([node(ray_auth_mode="disabled")], loopback_only=True), "warn", "loopback"),
        (checks.check_fit(workers=4, gpus_per_worker=1, cpus=8, gpus=4), "ok", "fits 8 CPUs and 4 GPUs"),
        (checks.check_fit(workers=5, gpus_per_worker=1, cpus=8, gpus=4), "fail", "Ray would wait for ever"),
        (checks.check_fit(workers=9, gpus_per_worker=0, cpus=8, gpus=0), "fail", "resources.workers=9"),
        (checks.check_storage("/s", {"a": Speed(200)}, {"a": Speed(300)}), "ok", "written at 200 MiB/s, read at 300"),
        (checks.check_storage("/s", {"a": Speed(200)}, {"a": Speed(30)}), "warn", "a GPU waits"),
        (checks.check_storage("/s", {"a": Speed(error="Read-only")}, {}), "fail", "cannot be written on a: Read-only"),
        (
            checks.check_storage(
                "/s", {"a": Speed(9), "b": Speed(9)}, {"a": Speed(error="No such file"), "b": Speed(error="gone")}
            ),
            "fail",
            "cannot be read on a, b: No such file (a); mount the same storage",
        ),
        (
            checks.check_storage("s3://b", {"a": Speed(9), "b": Speed(9)}, {"a": Speed(error="Forbidden")}),
            "fail",
            "s3://b cannot be read on a: Forbidden; check the URL, and the keys and the endpoint",
        ),
    ],
    ids=lambda value: value.check if isinstance(value, Finding) else None,
)
def test_a_finding_says_what_why_and_what_to_do(finding: Finding, level: str, says: str) -> None:
    assert finding.level == level
    assert says in finding.line()
    assert finding.line().startswith(f"{level:<5}{finding.check}")
    assert len(finding.line().splitlines()) == 1
    assert bool(finding.fix) == (level != "ok")


# --- FAISS ------------------------------------------------------------------------------------------------------------


def installed(*names: str) -> Any:
    def version(name: str) -> str:
        if name in names:
            return "1.2.3"
        raise PackageNotFoundError(name)

    return version


def test_faiss_is_searched_and_agrees_with_a_matrix_product() -> None:
    pytest.importorskip("faiss", reason="no FAISS is installed")
    report = faiss_report()
    assert report.importable
    assert report.error is None
    assert report.microseconds_a_query is not None
    assert report.microseconds_a_query > 0


class _Wrong:
    """An index whose neighbours are no neighbours."""

    def __init__(self, width: int) -> None: ...

    def add(self, rows: Any) -> None: ...

    def search(self, queries: Any, k: int) -> tuple[Any, Any]:
        return queries[:, :k], None


@pytest.mark.parametrize(
    ("distributions", "module", "importable", "says"),
    [
        ((), None, False, None),
        (("faiss-cpu",), None, False, "ModuleNotFoundError"),
        (("faiss-cpu",), SimpleNamespace(), False, "AttributeError"),  # a folder left behind imports as a namespace
        (("faiss-cpu",), SimpleNamespace(IndexFlatIP=_Wrong), True, "other neighbours than a matrix product"),
    ],
)
def test_a_broken_faiss_is_told_from_none(
    monkeypatch: pytest.MonkeyPatch,
    distributions: tuple[str, ...],
    module: object,
    importable: bool,
    says: str | None,
) -> None:
    monkeypatch.setattr(index_check, "version", installed(*distributions))
    monkeypatch.setitem(sys.modules, "faiss", module)
    if module is None:
        monkeypatch.delitem(sys.modules, "faiss")
        monkeypatch.setattr(sys, "meta_path", [_NoFaiss(), *sys.meta_path])
    report = faiss_report()
    assert report.distributions == tuple(f"{name} 1.2.3" for name in distributions)
    assert report.importable == importable
    assert (report.error is None) == (says is None)
    assert says is None or says in str(report.error)


class _NoFaiss:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'faiss'", name="faiss")


def test_both_packages_installed_are_found_and_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pip leaves it: the metadata of each, one module. That it imports and searches does not make it right."""
    for package in ("faiss_cpu", "faiss_gpu"):
        folder = tmp_path / f"{package}-1.99.0.dist-info"
        folder.mkdir()
        name = package.replace("_", "-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.99.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=_Exact))
    monkeypatch.setattr("distseg.work.doctor.local_round_trip", lambda: 0.01)
    assert main(["doctor", "launcher=local", f"storage={tmp_path}", "storage_mib=1"]) == 2
    line = next(line for line in capsys.readouterr().out.splitlines() if line[5:].startswith("faiss "))
    assert line.startswith("fail faiss           faiss-cpu 1.99.0 and faiss-gpu 1.99.0 are both installed")
    assert "pip uninstall" in line


class _Exact:
    def __init__(self, width: int) -> None: ...

    def add(self, rows: Any) -> None:
        self._rows = rows

    def search(self, queries: Any, k: int) -> tuple[Any, Any]:
        return -np.sort(-(queries @ self._rows.T), axis=1)[:, :k], None


# --- facts and probes on this machine ---------------------------------------------------------------------------------


def test_facts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    facts = node_facts.gather_facts("here")
    assert (facts.node, facts.ray_auth_mode) == ("here", "token")
    assert facts.versions["distseg"] == distseg.__version__
    assert facts.versions["python"] == sys.version.split()[0]
    assert facts.cores >= 1
    assert facts.memory_gib > 0.5
    assert facts.temporary.total_gib >= facts.temporary.free_gib > 0


@pytest.mark.parametrize(
    ("cpu_max", "memory_max", "cores", "gib"),
    [("200000 100000", "1073741824", 2.0, 1.0), ("max 100000", "max", None, None), (None, None, None, None)],
)
def test_a_containers_limits_are_seen(
    tmp_path: Path, cpu_max: str | None, memory_max: str | None, cores: float | None, gib: float | None
) -> None:
    for name, value in (("cpu.max", cpu_max), ("memory.max", memory_max)):
        if value is not None:
            (tmp_path / name).write_text(value + "\n")
    assert node_facts._cpu_limit(tmp_path) == cores
    found = node_facts._memory_nbytes(tmp_path) / 2**30
    assert found == gib if gib is not None else found > 0.5


def test_versions_out_of_range_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["zarr>=99", "no-such-package>=1", "ray>=1", "torch>=1", "faiss-gpu>=99; extra == 'gpu'"]
    monkeypatch.setattr(node_facts, "requires", lambda _: lines)
    assert [text.split()[0] for text in node_facts._out_of_range()] == ["zarr", "no-such-package"]


def test_storage_is_written_read_and_compared(tmp_path: Path) -> None:
    file = f"{tmp_path}/probe/0"
    assert node_probes.write_probe(file, 3_000_000, 1).mib_per_s > 0
    assert node_probes.read_probe(file, 3_000_000, 1).mib_per_s > 0
    assert node_probes.read_probe(file, 3_000_000, 2).error == "the bytes read are not those written"
    assert node_probes.read_probe(f"{tmp_path}/gone", 1, 1).error == "No such file or directory"
    assert node_probes.write_probe(f"{tmp_path}/no/probe/0", 1, 1).error == f"{tmp_path}/no is no folder there"
    node_probes.remove_probes(f"{tmp_path}/probe")
    node_probes.remove_probes(f"{tmp_path}/probe")  # another node was faster
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", ["{tmp_path}", "memory://distseg-doctor-pieces"])
def test_a_probe_of_any_size_is_written_and_read_in_pieces(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_probes, "PIECE_NBYTES", 2**16)
    place = as_place(storage.format(tmp_path=tmp_path) + "/probe/0")
    nbytes = 40 * 2**16 + 7
    tracemalloc.start()
    try:
        assert node_probes.write_probe(str(place), nbytes, 1).error is None
        assert node_probes.read_probe(str(place), nbytes, 1).error is None
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if not is_url(storage):  # memory:// holds the object itself
        assert held < nbytes / 4
    written = place.read_bytes()
    assert len(written) == nbytes
    assert len({written[start : start + 64] for start in range(0, nbytes, 2**16)}) == 41  # no piece comes twice
    place.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    assert node_probes.read_probe(str(place), nbytes, 1).error == "the bytes read are not those written"
    place.write_bytes(written + b"x")
    assert node_probes.read_probe(str(place), nbytes, 1).error == "more bytes are read than were written"
    place.write_bytes(written[:-1])
    assert node_probes.read_probe(str(place), nbytes, 1).error == "the bytes read are not those written"
    node_probes.remove_probes(str(place.parent))
    assert not place.exists()


def test_a_url_that_cannot_be_reached_is_an_error_of_the_node() -> None:
    unknown = node_probes.write_probe("nosuch://bucket/probe/0", 1, 1).error
    assert unknown is not None
    assert unknown.startswith("storage: URL that cannot be read here")
    assert node_probes.read_probe("memory://distseg-doctor-none/probe/0", 1, 1).error is not None
    node_probes.remove_probes("nosuch://bucket/probe")


def test_the_disk_below_a_folder_that_may_not_be_read_is_that_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's home is to all but root, whom no folder refuses: so os.stat says what it says to others."""
    closed = tmp_path / "closed"
    closed.mkdir()
    stat = os.stat

    def refused(path: Any, *rest: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *rest, **more)

    monkeypatch.setattr(os, "stat", refused)
    assert [disk.path for disk in disks_of(f"{closed}/below/deeper")] == [str(closed)]
    assert disks_of("s3://bucket/folder") == []


def test_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(node_probes.dist, "all_reduce", lambda tensor: tensor.zero_())
    with pytest.raises(RuntimeError, match="sum over the process group is wrong"):
        node_probes.group_round_trip(0, 1, f"file://{tmp_path}/store")


# --- the verb ---------------------------------------------------------------------------------------------------------

LOCAL_CHECKS = (
    "versions", "devices", "faiss", "patches", "shared memory", "storage", "free disk", "process group", "clocks",
    "authentication",
)  # fmt: skip


def test_this_machine_is_examined_without_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "launcher=local", f"storage={tmp_path}", "storage_mib=1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:21].strip() for line in lines] == list(LOCAL_CHECKS)
    assert code == (2 if any(line.startswith("fail") for line in lines) else 0)
    assert list(tmp_path.iterdir()) == []


def test_storage_behind_a_url_is_examined(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distseg.work.doctor.local_round_trip", lambda: 0.01)
    main(["doctor", "launcher=local", "storage=memory://distseg-doctor/cohorts/", "storage_mib=1"])
    lines = {line[5:21].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == list(LOCAL_CHECKS)
    assert "memory://distseg-doctor/cohorts: written at" in lines["storage"]
    assert not lines["storage"].startswith("fail")
    assert as_place("memory://distseg-doctor").fs.find("/distseg-doctor") == []  # type: ignore[attr-defined]  # a UPath


def test_failures_are_code_2_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable() -> float:
        raise RuntimeError("nobody there")

    monkeypatch.setattr("distseg.work.doctor.local_round_trip", unreachable)
    assert main(["doctor", "launcher=local", f"storage={tmp_path}/gone", "storage_mib=1"]) == 2
    said = capsys.readouterr()
    assert said.err == "doctor: 2 checks failed (got storage, process group)\n"
    assert f"fail storage         {tmp_path}/gone cannot be written on this machine" in said.out
    assert "fail process group   gloo over two processes: nobody there" in said.out


def test_the_function_returns_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distseg.work.doctor.local_round_trip", lambda: 0.01)
    findings = distseg.doctor(storage=tmp_path, storage_mib=1, launcher="local", gpus_per_worker=0)
    assert [finding.check for finding in findings] == list(LOCAL_CHECKS)
