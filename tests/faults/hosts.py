"""Hosts on one machine: network namespaces, the second joined to the first by a veth pair, a Ray node in each, all of
them on the machine's own file system. Linux, as root, with iproute2."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.faults.killing import ROOT

ADDRESSES = {"a": "10.203.77.1", "b": "10.203.77.2"}
_WIRE = "veth"


def no_hosts_here() -> str | None:
    """Why this machine makes none for us; None where it does."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces take root and iproute2"
    if subprocess.run(["ip", "netns", "add", _space("try")], capture_output=True).returncode:
        return "this machine has no network namespaces for us"
    _ip("netns", "del", _space("try"))
    return None


class Hosts:
    """Hosts a and b; `veth` in each is its only way to the other. Node a is the head; each node has one CPU.

    `environment`: of all that runs in them, on top of this process's. `cores`: the core of the machine that all of a
    host's processes are held to, by its name; without it they share them all.
    """

    def __init__(self, *, cores: dict[str, int] | None = None, **environment: str) -> None:
        self._temp = Path(tempfile.mkdtemp(prefix="dsh", dir="/tmp"))  # short: paths of sockets are
        self._cores = cores or {}
        self._environment = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": _WIRE, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": f"{ADDRESSES['a']}:6379",
            "PYTHONPATH": str(ROOT), **environment,
        }  # fmt: skip
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ADDRESSES:
            _ip("netns", "add", _space(name))
        _ip("link", "add", _WIRE, "netns", _space("a"), "type", "veth", "peer", "name", _WIRE, "netns", _space("b"))
        for name, address in ADDRESSES.items():
            for words in (("addr", "add", f"{address}/24", "dev", _WIRE), ("link", "set", _WIRE, "up")):
                _ip("-n", _space(name), *words)
            _ip("-n", _space(name), "link", "set", "lo", "up")

    def start(self, name: str) -> None:
        role = ["--head", "--port=6379", "--include-dashboard=false"]
        if name != "a":
            role = [f"--address={ADDRESSES['a']}:6379"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *role]
        words = [*ray, f"--node-ip-address={ADDRESSES[name]}", "--disable-usage-stats"]
        if name == "a":
            words.append(f"--temp-dir={self._temp / name}")
        self.nodes[name] = self.run(name, words)

    def run(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in self._environment.items() if k != "RAY_ADDRESS" or "start" not in words}
        held = ["taskset", "-c", str(self._cores[name])] if name in self._cores else []
        with (self._temp / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*held, "ip", "netns", "exec", _space(name), *words],
                env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def link(self, state: str) -> None:
        _ip("-n", _space("b"), "link", "set", _WIRE, state)

    def pids(self, name: str) -> list[int]:
        """Of all that runs in it."""
        found = subprocess.run(["ip", "netns", "pids", _space(name)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self, name: str) -> None:
        """All that runs in it, at once: a host without power."""
        for pid in self.pids(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if name in self.nodes:
            self.nodes.pop(name).wait()

    def said(self, name: str) -> str:
        return (self._temp / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for name in ADDRESSES:
            self.kill(name)
            _ip("netns", "del", _space(name))
        shutil.rmtree(self._temp)


def _space(name: str) -> str:
    return f"distseg-{name}-{os.getpid()}"  # another process's hosts may be on this machine


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
