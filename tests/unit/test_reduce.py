"""Who is named when a process group gives up: ranks as threads over one store, no group."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from distseg.errors import WorkersLostError
from distseg.training import reduce
from distseg.training.reduce import TorchDistributed


def gave_up(world_size: int, ranks: list[int], error: Callable[[], Exception]) -> dict[int, Exception]:
    """What each of `ranks` raises when its collective ends with `error` and the others never come."""
    raised: dict[int, Exception] = {}

    def one(rank: int) -> None:
        group = TorchDistributed.__new__(TorchDistributed)
        group.rank, group.world_size, group._calls = rank, world_size, 7
        try:
            with group._lost_ones_named():
                raise error()
        except Exception as told:
            raised[rank] = told

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(reduce, "ROLL_CALL_S", 0.5)
    monkeypatch.setattr(reduce, "LINGER_S", 0.1)


@pytest.mark.parametrize(("there", "lost"), [([0, 1, 3], [2]), ([1, 2], [0, 3]), ([2], [0, 1, 3])])
def test_those_that_do_not_answer_are_named(there: list[int], lost: list[int]) -> None:
    raised = gave_up(4, there, lambda: RuntimeError("Connection closed by peer\nmore"))
    assert sorted(raised) == there
    for error in raised.values():
        assert isinstance(error, WorkersLostError)
        assert error.ranks == tuple(lost)
        assert str(error).endswith("; Connection closed by peer")
        assert ("others wait for it" in str(error)) == (len(lost) > 1)  # one that waits is not to blame


def test_an_error_of_all_or_of_this_rank_alone_blames_nobody() -> None:
    raised = gave_up(2, [0, 1], lambda: RuntimeError("shapes differ"))
    assert [str(error) for error in raised.values()] == ["shapes differ"] * 2
    (alone,) = gave_up(2, [1], lambda: torch.OutOfMemoryError("CUDA out of memory")).values()
    assert isinstance(alone, torch.OutOfMemoryError)
