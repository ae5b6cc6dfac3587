"""Two hosts on one machine: network namespaces joined by a veth pair, a Ray node in each, shared storage. The link is
cut for a while, then one host dies and comes back: the run ends as one process would."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.hosts import ADDRESSES, Hosts, no_hosts_here
from tests.faults.killing import TINY, Forked, command, kin, rows, steps_done, until
from tests.faults.test_ray_chaos import on_ray
from tests.ray.test_ray_train import weights
from tests.unit.tiny_cohort import make_cohort

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1500)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    why_not = no_hosts_here()
    if why_not:
        pytest.skip(why_not)
    two = Hosts(RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="30")
    try:
        yield two
    finally:
        two.close()


def test_a_cut_link_and_a_dead_host(hosts: Hosts, tmp_path: Path) -> None:
    cohort, run = make_cohort(tmp_path / "cohort"), tmp_path / "run"
    keys = {"train__steps": 400, "train__precision": "float64"}
    assert Forked(command("train", cohort=cohort, run=tmp_path / "one", more=TINY, **keys)).wait() == 0
    for name in ADDRESSES:
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
