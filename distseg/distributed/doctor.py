"""`distseg doctor` on Ray: facts and probes of every node, one actor each, then the checks of `work.doctor_checks`."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distseg.config.verbs import DoctorConfig
from distseg.distributed.cluster import connect
from distseg.errors import InputError
from distseg.work.doctor import disk_of, probe_folder
from distseg.work.doctor_checks import (
    Finding,
    check_authentication,
    check_clocks,
    check_devices,
    check_disk,
    check_faiss,
    check_fit,
    check_reader,
    check_round_trip,
    check_shared_memory,
    check_storage,
    check_versions,
)
from distseg.work.node_facts import Disk, NodeFacts, gather_facts
from distseg.work.node_probes import GROUP_TIMEOUT_S, Speed, group_round_trip, read_probe, write_probe

_START_TIMEOUT_S = 120.0  # of a node's actor: a cold import of torch from a network disk takes most of a minute
_CLOCK_CALLS = 7


class _Node:
    """Lives on one node; asks for no CPU, so that it starts on a busy cluster too."""

    def facts(self, name: str, storage: str) -> tuple[NodeFacts, Disk]:
        return gather_facts(name), disk_of(storage)

    def write(self, file: str, nbytes: int, seed: int) -> Speed:
        return write_probe(file, nbytes, seed)

    def read(self, file: str, nbytes: int, seed: int) -> Speed:
        return read_probe(file, nbytes, seed)

    def clean(self, folder: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def clock(self) -> float:
        return time.time()

    def free_port(self) -> int:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
            return port

    def round_trip(self, rank: int, world_size: int, init_method: str) -> float:
        return group_round_trip(rank, world_size, init_method)


def examine_cluster(config: DoctorConfig) -> Iterator[Finding]:
    """One finding a check. Connects to RAY_ADDRESS, or starts an embedded Ray and says so."""
    try:
        connection = connect(workers=1)
    except (InputError, RuntimeError) as error:  # RuntimeError: Ray's word for another Python or Ray over there
        fix = "start the cluster with the same Python and Ray, or unset RAY_ADDRESS, or use launcher=local"
        yield Finding("cluster", "fail", " ".join(str(error).split()), fix)
        return
    with connection:
        addresses = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]  # Ray has no hints
        embedded = not os.environ.get("RAY_ADDRESS")
        kind = "an embedded Ray on this machine (RAY_ADDRESS is not set)" if embedded else os.environ["RAY_ADDRESS"]
        yield Finding("cluster", "ok", f"{kind}, {len(addresses)} node{'s' if len(addresses) > 1 else ''}")
        yield _fit(config)
        actors = _start(addresses)
        try:
            yield from _examine(config, addresses, actors, embedded)
        finally:
            for actor in actors.values():
                ray.kill(actor)


def _fit(config: DoctorConfig) -> Finding:
    has = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no hints
    return check_fit(
        workers=config.resources.workers,
        gpus_per_worker=config.resources.gpus_per_worker,
        cpus=float(has.get("CPU", 0.0)),
        gpus=float(has.get("GPU", 0.0)),
    )


def _start(nodes: dict[str, Any]) -> dict[str, Any]:
    """An actor on each node, by the name that findings use: its address, numbered where several share one."""
    actor: Any = ray.remote(_Node)
    started: dict[str, Any] = {}
    for node_id, node in nodes.items():
        address = node["NodeManagerAddress"]
        name = address if address not in started else f"{address}#{len(started)}"
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        started[name] = actor.options(num_cpus=0, scheduling_strategy=pinned).remote()
    return started


def _examine(config: DoctorConfig, nodes: dict[str, Any], actors: dict[str, Any], embedded: bool) -> Iterator[Finding]:
    asked = {name: actor.facts.remote(name, config.storage) for name, actor in actors.items()}
    answers: dict[str, tuple[NodeFacts, Disk]] = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=_START_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            fix = "install the same wheel there and look at its log in /tmp/ray/session_latest/logs"
            yield Finding("nodes", "fail", f"{name} does not answer: {_last_line(error)}", fix)
            actors = {other: actor for other, actor in actors.items() if other != name}
    if not answers:
        return
    facts = [of_node for of_node, _ in answers.values()]
    stores = {
        name: node["Resources"].get("object_store_memory", 0.0) / 2**30
        for name, node in zip(asked, nodes.values(), strict=True)
    }
    yield check_versions(facts)
    yield check_devices(facts, gpus_per_worker=config.resources.gpus_per_worker)
    yield check_faiss(facts)
    yield check_reader(facts)
    yield check_shared_memory(facts, object_store_gib=stores)
    yield _storage(config, actors)
    yield check_disk({name: [disk, of_node.temporary] for name, (of_node, disk) in answers.items()})
    yield check_clocks({name: _offset_s(actor) for name, actor in actors.items()})
    yield _round_trip(actors)
    yield check_authentication(facts, loopback_only=embedded)


def _storage(config: DoctorConfig, actors: dict[str, Any]) -> Finding:
    """Every node writes a file, then reads the one of the node before it; all at once, as workers do."""
    folder, nbytes = probe_folder(config.storage), config.storage_mib * 2**20
    names = list(actors)
    try:
        written = _all({name: actors[name].write.remote(f"{folder}/{n}", nbytes, n) for n, name in enumerate(names)})
        if any(speed.error for speed in written.values()):
            return check_storage(config.storage, written, {})
        before = {name: (n - 1) % len(names) for n, name in enumerate(names)}
        read = _all({name: actors[name].read.remote(f"{folder}/{n}", nbytes, n) for name, n in before.items()})
        return check_storage(config.storage, written, read)
    finally:
        ray.get([actor.clean.remote(folder) for actor in actors.values()])


def _all(references: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(references, ray.get(list(references.values())), strict=True))


def _offset_s(actor: Any) -> float:
    """The node's clock less ours, by the call that was answered fastest; right to half its time."""
    best = (float("inf"), 0.0)
    for _ in range(_CLOCK_CALLS):
        before = time.time()
        there = ray.get(actor.clock.remote())
        after = time.time()
        best = min(best, (after - before, there - (before + after) / 2))
    return best[1]


def _round_trip(actors: dict[str, Any]) -> Finding:
    """Over all nodes; on one node by a second actor beside the first."""
    names = list(actors)
    ranks = [actors[name] for name in names]
    second: Any = None
    if len(ranks) == 1:
        second = ray.remote(_Node).options(num_cpus=0).remote()
        ranks.append(second)
    address = names[0].split("#")[0]
    init_method = f"tcp://{address}:{ray.get(ranks[0].free_port.remote())}"
    told = "two processes" if second is not None else f"{len(names)} nodes"
    try:
        calls = [actor.round_trip.remote(rank, len(ranks), init_method) for rank, actor in enumerate(ranks)]
        return check_round_trip(told, max(ray.get(calls, timeout=4 * GROUP_TIMEOUT_S)))
    except ray.exceptions.RayError as error:
        return check_round_trip(told, _last_line(error))
    finally:
        if second is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(second)


def _last_line(error: Exception) -> str:
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
