"""A Ray that does not start: told in one line where the machine was busy, else passed on; one that others could reach
is shut down. No Ray runs."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray._private import ray_constants

from distseg.distributed.cluster import connect
from distseg.errors import InputError


@pytest.mark.parametrize(
    ("said", "kind", "match"),
    [
        (
            "The current node timed out during startup. This could happen because",
            InputError,
            r"^launcher: Ray did not start in time \(got ray\); this machine's load is \d+ on \d+ cores; .*local$",
        ),
        ("something else", Exception, "^something else$"),
    ],
)
def test_why_ray_did_not_start(monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception], match: str) -> None:
    def init(*_: object, **__: object) -> None:
        raise Exception(said)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(kind, match=match) as error:
        connect()
    assert type(error.value) is kind


def test_an_embedded_ray_stays_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray reads is set while it starts and not after; a Ray that did not heed it is stopped."""
    seen: list[Any] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(ray, "init", lambda *_, **__: seen.append(ray_constants.ENABLE_RAY_CLUSTER))
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append("shut down"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "127.0.0.1"}])
    connect()
    assert (seen, ray_constants.ENABLE_RAY_CLUSTER) == ([False], True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "10.0.0.7"}])
    with pytest.raises(
        InputError, match=r"^launcher: Ray listens where other machines .*\(got 10\.0\.0\.7\); .*local$"
    ):
        connect()
    assert seen == [False, False, "shut down"]
