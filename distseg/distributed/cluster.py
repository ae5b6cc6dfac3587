"""Reaching Ray: an embedded one on loopback unless RAY_ADDRESS names a cluster, checked to be large enough."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import ray
import ray.autoscaler.sdk
from ray._private import ray_constants

from distseg.errors import InputError

# Set before Ray starts and only where the user has not: no usage report leaves the machine, and a task that asks for
# no GPU keeps what CUDA_VISIBLE_DEVICES says (Ray's own coming default, which otherwise warns at each start).
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_REACH_TIMEOUT_S = 10.0
_POLL_S = 2.0


class Connection:
    """A connection to Ray; closing it stops Ray only where `connect` started it. A context manager."""

    def __init__(self, *, started_here: bool) -> None:
        self._started_here = started_here

    def close(self) -> None:
        if self._started_here and ray.is_initialized():
            ray.shutdown()
        self._started_here = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def connect(
    *, workers: int = 1, gpus_per_worker: float = 0.0, cpus_per_worker: float = 1.0, include_dashboard: bool = False
) -> Connection:
    """Connect to RAY_ADDRESS, or start an embedded Ray, or keep the Ray this process is connected to.

    Raises InputError where the cluster could never give every worker its share: Ray itself would wait for ever.
    """
    started_here = not ray.is_initialized()
    if started_here:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                _reach(address)
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                _start_embedded(include_dashboard=include_dashboard)
        except ConnectionError as error:
            fix = "start that cluster, or unset RAY_ADDRESS for an embedded one"
            raise InputError("no Ray cluster answers", where="RAY_ADDRESS", value=address, fix=fix) from error
    connection = Connection(started_here=started_here)
    try:
        check_resources(workers=workers, gpus_per_worker=gpus_per_worker, cpus_per_worker=cpus_per_worker)
    except InputError:
        connection.close()
        raise
    return connection


def _start_embedded(*, include_dashboard: bool) -> None:
    """Raises InputError where Ray's own 30 s to start were not enough, as on a machine full of other work, and where
    it did not stay on loopback: whoever reaches Ray's ports runs code as this user."""
    try:
        with _no_other_machine():
            ray.init(
                "local",
                include_dashboard=include_dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
    except Exception as error:  # Ray raises a bare Exception here; any other goes on
        if "timed out during startup" not in str(error):
            raise
        raise InputError(
            "Ray did not start in time",
            where="launcher",
            value="ray",
            rule=f"this machine's load is {os.getloadavg()[0]:.0f} on {len(os.sched_getaffinity(0))} cores",
            fix="the same command again when there is less other work, or launcher=local",
        ) from error
    _check_loopback()


@contextmanager
def _no_other_machine() -> Iterator[None]:
    """Inside, Ray takes 127.0.0.1 for this machine's address, and so every process it starts listens there alone.

    Ray has no public setting for it: of `ray.init(_node_ip_address="127.0.0.1")` alone it makes the address that other
    machines reach (`resolve_ip_for_localhost`), unless the platform may form no clusters, as macOS and Windows, where
    it stays on loopback. So that is what it is told; Ray 2.60 asks at each start.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_loopback() -> None:
    """Raises InputError, with Ray shut down, where its node has an address that others may reach."""
    address = str(ray.nodes()[0]["NodeManagerAddress"])  # type: ignore[no-untyped-call]  # Ray leaves it without hints
    if ipaddress.ip_address(address).is_loopback:
        return
    ray.shutdown()
    raise InputError(
        "Ray listens where other machines reach it",
        where="launcher",
        value=address,
        rule="an embedded Ray stays on loopback: it runs what it is sent, and asks for no password",
        fix="install the version of ray that constraints.txt pins, or launcher=local",
    )


def wait_for_nodes(*, workers: int, gpus_per_worker: float = 0.0, cpus_per_worker: float = 1.0) -> None:
    """Ask the autoscaler for all workers at once and wait for their nodes, for DISTSEG_WAIT_FOR_NODES_S at most.

    Returns at once where they are there, or where that is 0 or unset; too few in the end are no error here. Raises
    InputError where it is no number.
    """
    each_worker = {kind: share for kind, share in (("CPU", cpus_per_worker), ("GPU", gpus_per_worker)) if share > 0}
    seconds = os.environ.get("DISTSEG_WAIT_FOR_NODES_S", "0")
    if not seconds.isdigit():
        rule, fix = "whole seconds", "set DISTSEG_WAIT_FOR_NODES_S=1200, or unset it"
        raise InputError("not a number", where="DISTSEG_WAIT_FOR_NODES_S", value=seconds, rule=rule, fix=fix)
    deadline = time.monotonic() + int(seconds)
    asked = False
    while time.monotonic() < deadline:
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray leaves it without hints
        if all(workers * share <= has.get(kind, 0.0) for kind, share in each_worker.items()):
            break
        if not asked:
            ray.autoscaler.sdk.request_resources(bundles=[each_worker] * workers)
            asked = True
        time.sleep(_POLL_S)
    if asked:  # a request outlives its job; from here on the workers themselves hold their nodes
        ray.autoscaler.sdk.request_resources(bundles=[])


def _reach(address: str) -> None:
    """Raises ConnectionError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        return  # "auto", or a Ray client's address
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(str(error)) from error


def check_resources(*, workers: int, gpus_per_worker: float = 0.0, cpus_per_worker: float = 1.0) -> None:
    """Raises InputError where `workers` do not fit the connected cluster at once.

    On a cluster that grows, DISTSEG_WAIT_FOR_NODES_S says how long its autoscaler may take to bring what is missing.
    """
    wait_for_nodes(workers=workers, gpus_per_worker=gpus_per_worker, cpus_per_worker=cpus_per_worker)
    has = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray leaves it without hints
    for kind, each in (("CPU", cpus_per_worker), ("GPU", gpus_per_worker)):
        needed, there = workers * each, float(has.get(kind, 0.0))
        if needed > there:
            raise InputError(
                f"more workers than the cluster has {kind}s for",
                where="resources.workers",
                value=f"{workers} workers x {each:g} {kind} = {needed:g}",
                rule=f"the cluster has {there:g} {kind}",
                fix="lower resources.workers or resources.gpus_per_worker, or add machines",
            )
