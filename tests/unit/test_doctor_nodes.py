"""The doctor on nodes that hang or fail, one call of them each: named within the time limit, the others examined on."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from distseg.config.schema import ResourcesConfig
from distseg.config.verbs import DoctorConfig
from distseg.distributed import doctor, doctor_nodes
from distseg.distributed.doctor_nodes import Node
from distseg.work.doctor_checks import Finding
from tests.unit.test_doctor import HEALTHY

CHECKS = [
    "versions", "devices", "faiss", "patches", "shared memory", "storage", "free disk", "clocks", "process group",
    "authentication",
]  # fmt: skip


class Hangs:
    """The reference of a call that never comes back."""


class Answer:
    """The reference of a call that came back."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Call:
    """A method of an actor, called at once in this process."""

    def __init__(self, call: Callable[..., Any] | Hangs | Exception) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Any:
        return Answer(self._call(*arguments)) if callable(self._call) else self._call


class Actor:
    """A node of this process; `broken` calls hang or fail."""

    def __init__(self, broken: dict[str, Hangs | Exception]) -> None:
        self._node, self._broken = Node(), broken
        self._instead: dict[str, Callable[..., Any]] = {
            "facts": lambda name: dataclasses.replace(HEALTHY, node=name),
            "disks": lambda _: [HEALTHY.temporary],
            "round_trip": lambda *_: 0.01,
        }

    def __getattr__(self, name: str) -> Call:
        return Call(self._broken.get(name) or self._instead.get(name) or getattr(self._node, name))


def wait(references: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
    assert num_returns == len(references)
    assert timeout > 0
    return [r for r in references if not isinstance(r, Hangs)], [r for r in references if isinstance(r, Hangs)]


def get(references: Any, *, timeout: float) -> Any:
    if isinstance(references, list):
        return [get(reference, timeout=timeout) for reference in references]
    if isinstance(references, Exception):
        raise references
    return references.value


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    second = types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=lambda: Actor({})))
    fake = types.SimpleNamespace(
        wait=wait, get=get, exceptions=ray.exceptions, remote=lambda _: second, kill=lambda _: None
    )
    monkeypatch.setattr(doctor, "ray", fake)
    monkeypatch.setattr(doctor_nodes, "ray", fake)


def examine(tmp_path: Path, **broken: Hangs | Exception) -> list[Finding]:
    """Of nodes a and b, where calls of b are broken."""
    actors = {"a": Actor({}), "b": Actor(broken)}
    nodes = {name: {"Resources": {}} for name in actors}
    config = DoctorConfig(storage=str(tmp_path), storage_mib=1, resources=ResourcesConfig(workers=2))
    return list(doctor._examine(config, nodes, actors, embedded=True))


def test_healthy_nodes_have_a_finding_a_check(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    assert [finding.check for finding in findings] == CHECKS
    assert "across 2 nodes" in findings[5].text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "check", "says"),
    [
        ("write", "storage", "b did not answer when it wrote to {0}: no answer within 61 s; look at its mount"),
        ("read", "storage", "b did not answer when it read from {0}: no answer within 61 s; look at its mount"),
        ("clean", "storage", "b did not answer when it removed {0}/.distseg-doctor-"),
        ("disks", "free disk", "b did not answer: no answer within 30 s; look at its load"),
        ("clock", "clocks", "b did not answer: no answer within 30 s; look at its load"),
        ("facts", "nodes", "b does not answer: no answer within 120 s; install the same wheel"),
    ],
)
def test_a_call_that_hangs_is_told_by_node_and_the_others_go_on(
    call: str, check: str, says: str, tmp_path: Path
) -> None:
    findings = examine(tmp_path, **{call: Hangs()})
    failed = [finding for finding in findings if finding.level == "fail"]
    assert [finding.check for finding in failed] == [check]
    assert says.format(tmp_path) in failed[0].line()
    assert [finding.check for finding in findings if finding.check != "nodes"] == CHECKS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["write", "read", "clean", "disks", "clock", "facts"])
def test_a_node_that_dies_is_a_finding(call: str, tmp_path: Path) -> None:
    findings = examine(tmp_path, **{call: ray.exceptions.RayError("The actor died\nits node is gone")})
    (failed,) = [finding for finding in findings if finding.level == "fail"]
    assert "b did not answer" in failed.text or "b does not answer" in failed.text
    assert "its node is gone" in failed.text


def test_a_port_that_is_not_told_and_a_storage_that_all_hang_on(tmp_path: Path) -> None:
    silent = Actor({"free_port": Hangs()})
    finding = doctor._round_trip({"a": silent, "b": silent})
    assert finding.line().startswith("fail process group   a did not answer: no answer within 30 s")
    config = DoctorConfig(storage=str(tmp_path), storage_mib=1)
    alone = {"a": Actor({"write": Hangs()})}
    findings = list(doctor._examine(config, {"a": {"Resources": {}}}, alone, embedded=True))
    assert [finding.check for finding in findings] == CHECKS
    failed = {finding.check: finding.text for finding in findings if finding.level == "fail"}
    assert list(failed) == ["storage", "clocks", "process group"]
    assert failed["clocks"] == failed["process group"] == "not measured: no node is left that answers"


def test_a_cluster_that_grows_is_asked_for_the_jobs_workers_before_its_nodes_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[Any] = []
    fake: Any = doctor.ray
    fake.nodes = lambda: happened.append("nodes") or []
    fake.cluster_resources = lambda: {"CPU": 4.0, "GPU": 4.0}

    class Connection:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(doctor, "connect", lambda **_: Connection())
    monkeypatch.setattr(doctor, "wait_for_nodes", lambda **asked: happened.append(asked))
    monkeypatch.setattr(doctor, "start", lambda *_: {})
    config = DoctorConfig(resources=ResourcesConfig(workers=4, gpus_per_worker=1.0))
    findings = list(doctor.examine_cluster(config))
    assert happened == [{"workers": 4, "gpus_per_worker": 1.0}, "nodes"]
    assert [finding.level for finding in findings] == ["ok", "ok"]
