"""The nodes of a cluster as the doctor asks them: an actor on each, and a time limit to whatever it is asked."""

from __future__ import annotations

import socket
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distseg.work.doctor import disks_of
from distseg.work.node_facts import Disk, NodeFacts, gather_facts
from distseg.work.node_probes import Speed, group_round_trip, read_probe, remove_probes, write_probe

CALL_TIMEOUT_S = 30.0  # of what takes a node no time


class Node:
    """Lives on one node; asks for no CPU, so that it starts on a busy cluster too."""

    def facts(self, name: str) -> NodeFacts:
        return gather_facts(name)

    def disks(self, storage: str) -> list[Disk]:
        return disks_of(storage)

    def write(self, file: str, nbytes: int, seed: int) -> Speed:
        return write_probe(file, nbytes, seed)

    def read(self, file: str, nbytes: int, seed: int) -> Speed:
        return read_probe(file, nbytes, seed)

    def clean(self, folder: str) -> None:
        remove_probes(folder)

    def clock(self) -> float:
        return time.time()

    def free_port(self) -> int:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
            return port

    def round_trip(self, rank: int, world_size: int, init_method: str) -> float:
        return group_round_trip(rank, world_size, init_method)


def start(nodes: dict[str, Any]) -> dict[str, Any]:
    """An actor on each node, by the name that findings use: its address, numbered where several share one."""
    actor: Any = ray.remote(Node)
    started: dict[str, Any] = {}
    for node_id, node in nodes.items():
        address = node["NodeManagerAddress"]
        name = address if address not in started else f"{address}#{len(started)}"
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        started[name] = actor.options(num_cpus=0, scheduling_strategy=pinned).remote()
    return started


def ask(references: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Answers by node, and of nodes that gave none one line why. All have the same time, side by side."""
    answers: dict[str, Any] = {}
    silent: dict[str, str] = {}
    asked = list(references.values())
    done = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)[0] if asked else []
    for name, reference in references.items():
        if reference not in done:
            silent[name] = f"no answer within {timeout_s:g} s"
            continue
        try:
            answers[name] = ray.get(reference, timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            silent[name] = last_line(error)
    return answers, silent


def last_line(error: Exception) -> str:
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
