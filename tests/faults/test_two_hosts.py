"""Two hosts on one machine: network namespaces joined by a veth pair, a Ray node in each, shared storage. The link is
cut for a while, then one host dies and comes back: the run ends as one process would."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.killing import ROOT, TINY, Forked, command, kin, rows, steps_done, until
from tests.faults.test_ray_chaos import on_ray
from tests.ray.test_ray_train import weights
from tests.unit.tiny_cohort import make_cohort

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1500)]
HOSTS = {"a": "10.203.77.1", "b": "10.203.77.2"}


class Hosts:
    """Namespaces distseg-a and distseg-b; `veth` in each is its only way to the other."""

    def __init__(self) -> None:
        self._temp = Path(tempfile.mkdtemp(prefix="dsh", dir="/tmp"))  # short: paths of sockets are
        self._environment = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "veth", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": f"{HOSTS['a']}:6379",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        for name in HOSTS:
            ip("netns", "add", f"distseg-{name}")
        ip("link", "add", "veth", "netns", "distseg-a", "type", "veth", "peer", "name", "veth", "netns", "distseg-b")
        for name, address in HOSTS.items():
            for words in (("addr", "add", f"{address}/24", "dev", "veth"), ("link", "set", "veth", "up")):
                ip("-n", f"distseg-{name}", *words)
            ip("-n", f"distseg-{name}", "link", "set", "lo", "up")

    def start(self, name: str) -> None:
        role = (
            ["--head", "--port=6379", "--include-dashboard=false"] if name == "a" else [f"--address={HOSTS['a']}:6379"]
        )
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *role]
        words = [*ray, f"--node-ip-address={HOSTS[name]}", "--disable-usage-stats"]
        if name == "a":
            words.append(f"--temp-dir={self._temp / name}")
        self._nodes[name] = self.run(name, words)

    def run(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in self._environment.items() if k != "RAY_ADDRESS" or "start" not in words}
        with (self._temp / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", f"distseg-{name}", *words],
                env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def link(self, state: str) -> None:
        ip("-n", "distseg-b", "link", "set", "veth", state)

    def kill(self, name: str) -> None:
        """All that runs in it, at once: a host without power."""
        for pid in subprocess.run(
            ["ip", "netns", "pids", f"distseg-{name}"], capture_output=True, text=True
        ).stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        if name in self._nodes:
            self._nodes.pop(name).wait()

    def said(self, name: str) -> str:
        return (self._temp / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for name in HOSTS:
            self.kill(name)
            ip("netns", "del", f"distseg-{name}")
        shutil.rmtree(self._temp)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and iproute2")
    if subprocess.run(["ip", "netns", "add", "distseg-try"], capture_output=True).returncode:
        pytest.skip("this machine has no network namespaces for us")
    ip("netns", "del", "distseg-try")
    two = Hosts()
    try:
        yield two
    finally:
        two.close()


def test_a_cut_link_and_a_dead_host(hosts: Hosts, tmp_path: Path) -> None:
    cohort, run = make_cohort(tmp_path / "cohort"), tmp_path / "run"
    keys = {"train__steps": 400, "train__precision": "float64"}
    assert Forked(command("train", cohort=cohort, run=tmp_path / "one", more=TINY, **keys)).wait() == 0
    for name in HOSTS:
        hosts.start(name)
        time.sleep(5)
    words = on_ray(cohort, run, **keys, train__worker_timeout_s=30, checkpoint__every_steps=10)

    def reaches(step: int) -> None:
        assert until(lambda: steps_done(run) >= step, driver, poll_s=0.05), hosts.said("a")[-3000:]

    driver = hosts.run("a", words)
    reaches(15)
    before = steps_done(run)
    hosts.link("down")
    time.sleep(3)
    hosts.link("up")
    reaches(before + 30)
    hosts.kill("b")
    time.sleep(2)
    hosts.start("b")
    code = driver.wait(timeout=600)
    if code != 0:  # Ray may give the launch up while the host is away: the same command goes on
        again = hosts.run("a", words)
        assert again.wait(timeout=600) == 0, hosts.said("a")[-3000:]
    assert kin(driver.pid) == []
    for network in ("student", "teacher"):
        torch.testing.assert_close(weights(run, network), weights(tmp_path / "one", network), rtol=0, atol=1e-6)
    assert [row["step"] for row in rows(run)] == list(range(1, 401))
