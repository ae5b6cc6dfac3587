"""`distseg doctor` on Ray: facts and probes of every node, one actor each, then the checks of `work.doctor_checks`.

Whatever a node is asked has a time limit: one that hangs, as on a mount whose server is gone, is told by name and asked
nothing more, and the others are examined to the end.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import ray

from distseg.config.verbs import DoctorConfig
from distseg.distributed.cluster import connect, wait_for_nodes
from distseg.distributed.doctor_nodes import CALL_TIMEOUT_S, Node, ask, last_line, start
from distseg.errors import InputError
from distseg.work.doctor import probe_folder
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
from distseg.work.node_probes import GROUP_TIMEOUT_S

START_TIMEOUT_S = 120.0  # of a node's actor: a cold import of torch from a network disk takes most of a minute
STORAGE_TIMEOUT_S = 60.0  # of a probe, beside its own time at the rate below: what is slower counts as hanging
SLOWEST_MIB_S = 1.0
_MEND_STORAGE = "look at its mount and the storage's server, start Ray anew there, or choose another storage="
_CLOCK_CALLS = 7


def examine_cluster(config: DoctorConfig) -> Iterator[Finding]:
    """One finding a check. Connects to RAY_ADDRESS, or starts an embedded Ray and says so.

    A cluster that grows is first asked for the job's workers, where DISTSEG_WAIT_FOR_NODES_S says how long it may take.
    """
    try:
        connection = connect(workers=1)
    except (InputError, RuntimeError) as error:  # RuntimeError: Ray's word for another Python or Ray over there
        fix = "start the cluster with the same Python and Ray, or unset RAY_ADDRESS, or use launcher=local"
        yield Finding("cluster", "fail", " ".join(str(error).split()), fix)
        return
    with connection:
        asked = config.resources
        wait_for_nodes(workers=asked.workers, gpus_per_worker=asked.gpus_per_worker)
        addresses = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]  # Ray has no hints
        embedded = not os.environ.get("RAY_ADDRESS")
        kind = "an embedded Ray on this machine (RAY_ADDRESS is not set)" if embedded else os.environ["RAY_ADDRESS"]
        yield Finding("cluster", "ok", f"{kind}, {len(addresses)} node{'s' if len(addresses) > 1 else ''}")
        yield _fit(config)
        actors = start(addresses)
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


def _examine(config: DoctorConfig, nodes: dict[str, Any], actors: dict[str, Any], embedded: bool) -> Iterator[Finding]:
    facts, silent = ask({name: actor.facts.remote(name) for name, actor in actors.items()}, START_TIMEOUT_S)
    for name, why in silent.items():
        fix = "install the same wheel there and look at its log in /tmp/ray/session_latest/logs"
        yield Finding("nodes", "fail", f"{name} does not answer: {why}", fix)
    if not facts:
        return
    stores = {
        name: node["Resources"].get("object_store_memory", 0.0) / 2**30
        for name, node in zip(actors, nodes.values(), strict=True)
    }
    known = list(facts.values())
    yield check_versions(known)
    yield check_devices(known, gpus_per_worker=config.resources.gpus_per_worker)
    yield check_faiss(known)
    yield check_reader(known)
    yield check_shared_memory(known, object_store_gib=stores)
    answering = {name: actors[name] for name in facts}
    finding, silent = _storage(config, answering)
    yield finding
    answering = {name: actor for name, actor in answering.items() if name not in silent}
    asked = {name: actor.disks.remote(config.storage) for name, actor in answering.items()}
    disks, silent = ask(asked, CALL_TIMEOUT_S)
    yield _hanging("free disk", silent) or check_disk(
        {name: [*disks.get(name, ()), of_node.temporary] for name, of_node in facts.items()}
    )
    answering = {name: actor for name, actor in answering.items() if name not in silent}
    offsets, silent = _offsets_s(answering)
    yield _hanging("clocks", silent) or (check_clocks(offsets) if offsets else _nobody("clocks"))
    answering = {name: actor for name, actor in answering.items() if name not in silent}
    yield _round_trip(answering) if answering else _nobody("process group")
    yield check_authentication(known, loopback_only=embedded)


def _hanging(check: str, silent: dict[str, str], *, on: str = "", fix: str = "") -> Finding | None:
    """`on` what they hang. None where no node is silent."""
    if not silent:
        return None
    node, why = next(iter(silent.items()))
    text = f"{', '.join(sorted(silent))} did not answer{on}: {why}" + (f" ({node})" if len(silent) > 1 else "")
    return Finding(check, "fail", text, fix or "look at its load and at Ray's log there, or take the node out")


def _nobody(check: str) -> Finding:
    return Finding(
        check, "fail", "not measured: no node is left that answers", "mend what is told above, then try again"
    )


def _storage(config: DoctorConfig, actors: dict[str, Any]) -> tuple[Finding, dict[str, str]]:
    """Also the nodes that did not come back from it, and why."""
    folder = probe_folder(config.storage)
    silent: dict[str, str] = {}
    try:
        finding, silent = _transfers(config, actors, folder)
    finally:
        left = {name: actor.clean.remote(folder) for name, actor in actors.items() if name not in silent}
        _, not_cleaned = ask(left, STORAGE_TIMEOUT_S)
    if not silent:
        fix = f"{_MEND_STORAGE}; remove that folder"
        finding = _hanging("storage", not_cleaned, on=f" when it removed {folder}", fix=fix) or finding
    return finding, {**silent, **not_cleaned}


def _transfers(config: DoctorConfig, actors: dict[str, Any], folder: str) -> tuple[Finding, dict[str, str]]:
    """Every node writes a file, then reads the one of the node before it; all at once, as workers do."""
    nbytes, limit_s = config.storage_mib * 2**20, STORAGE_TIMEOUT_S + config.storage_mib / SLOWEST_MIB_S
    names = list(actors)
    written, silent = ask(
        {name: actors[name].write.remote(f"{folder}/{n}", nbytes, n) for n, name in enumerate(names)}, limit_s
    )
    hanging = _hanging("storage", silent, on=f" when it wrote to {config.storage}", fix=_MEND_STORAGE)
    if hanging is not None or any(speed.error for speed in written.values()):
        return hanging or check_storage(config.storage, written, {}), silent
    before = {name: (n - 1) % len(names) for n, name in enumerate(names)}
    read, silent = ask(
        {name: actors[name].read.remote(f"{folder}/{n}", nbytes, n) for name, n in before.items()}, limit_s
    )
    hanging = _hanging("storage", silent, on=f" when it read from {config.storage}", fix=_MEND_STORAGE)
    return hanging or check_storage(config.storage, written, read), silent


def _offsets_s(actors: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Each node's clock less ours, by the call that was answered fastest; right to half its time. Also the nodes that
    did not answer, and why."""
    offsets: dict[str, float] = {}
    silent: dict[str, str] = {}
    for name, actor in actors.items():
        best = (float("inf"), 0.0)
        for _ in range(_CLOCK_CALLS):
            before = time.time()
            told, not_told = ask({name: actor.clock.remote()}, CALL_TIMEOUT_S)
            after = time.time()
            if not_told:
                silent |= not_told
                break
            best = min(best, (after - before, told[name] - (before + after) / 2))
        else:
            offsets[name] = best[1]
    return offsets, silent


def _round_trip(actors: dict[str, Any]) -> Finding:
    """Over all nodes; on one node by a second actor beside the first."""
    names = list(actors)
    ranks = [actors[name] for name in names]
    ports, silent = ask({names[0]: ranks[0].free_port.remote()}, CALL_TIMEOUT_S)
    if silent:
        return _hanging("process group", silent) or _nobody("process group")
    second: Any = None
    if len(ranks) == 1:
        second = ray.remote(Node).options(num_cpus=0).remote()
        ranks.append(second)
    address = names[0].split("#")[0]
    init_method = f"tcp://{address}:{ports[names[0]]}"
    told = "two processes" if second is not None else f"{len(names)} nodes"
    try:
        calls = [actor.round_trip.remote(rank, len(ranks), init_method) for rank, actor in enumerate(ranks)]
        return check_round_trip(told, max(ray.get(calls, timeout=4 * GROUP_TIMEOUT_S)))
    except ray.exceptions.RayError as error:
        return check_round_trip(told, last_line(error))
    finally:
        if second is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(second)
