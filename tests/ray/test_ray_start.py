"""A Ray that does not start: told in one line where the machine was busy, else passed on. No Ray runs."""

from __future__ import annotations

import pytest
import ray

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
