"""The bank's owner without Ray around it: shares of two ranks are the bank of one, and what a new life has lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from distseg.config.compose import to_plain, train_config
from distseg.distributed.index_service import IndexOwner
from distseg.matching.references import load_table
from distseg.training.bank_builder import Piece
from distseg.training.bank_folder import BankFolder, LocalReferences, ServiceSettings
from distseg.training.reduce import SingleProcess

SCANS = ("a", "b")
CONFIG = train_config(
    cohort="c",
    run="r",
    matching="index",
    overrides={"references.patches": 4, "references.per_patch": 6, "matching.k": 2},
)


def pieces(seed: int = 0) -> list[Piece]:
    random = torch.Generator().manual_seed(seed)
    return [(n, n % 2, torch.randn(6, 3, generator=random), torch.arange(6) % 2) for n in range(4)]


def share(of_rank: list[Piece]) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    return [(number, scan, e.numpy(), c.numpy()) for number, scan, e, c in of_rank]


def owner(root: Path) -> IndexOwner:
    """Its bank is `root`/bank."""
    return IndexOwner(to_plain(dataclasses.replace(CONFIG, run=str(root))), 2, SCANS)


def test_two_shares_are_the_bank_of_one(tmp_path: Path) -> None:
    asked = ServiceSettings(
        folder=BankFolder(tmp_path / "local", CONFIG, num_classes=2), config=CONFIG, scan_ids=SCANS, num_classes=2,
        width=3, communicator=SingleProcess(), device=torch.device("cpu"),
    )  # fmt: skip
    local = LocalReferences(asked)
    local.offer(3, 60, pieces())
    ours = owner(tmp_path / "ray")
    ours.offer(3, 60, share(pieces()[1::2]), 1, 2)
    assert not ours.ready(3)[0]
    ours.offer(3, 60, share(pieces()[0::2]), 0, 2)
    assert ours.ready(3)[0]
    one, two = (load_table(tmp_path / side / "v_0003") for side in ("local", "ray/bank"))
    assert torch.equal(one.embeddings, two.embeddings)
    assert torch.equal(one.classes, two.classes)
    queries = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(ours.find(3, queries.numpy(), 2), local.take(3).find(queries).numpy())


def test_a_new_life_has_lost_the_shares_but_not_what_is_on_disk(tmp_path: Path) -> None:
    first = owner(tmp_path)
    first.offer(0, 0, share(pieces()), 0, 1)
    first.offer(1, 20, share(pieces(1)[0::2]), 0, 2)
    second = owner(tmp_path)
    assert second.ready(0) != first.ready(0)  # another life says so
    assert (second.ready(0)[0], second.ready(1)[0]) == (True, False)
    second.offer(1, 20, share(pieces(1)[1::2]), 1, 2)
    assert not second.ready(1)[0]
    second.offer(1, 20, share(pieces(1)[0::2]), 0, 2)
    assert second.ready(1)[0]


def test_a_group_of_another_size_starts_a_version_anew(tmp_path: Path) -> None:
    """After a worker died, the shares of two that are left over do not mix with those of one."""
    ours = owner(tmp_path)
    ours.offer(0, 0, share(pieces()[1::2]), 1, 2)
    ours.offer(0, 0, share(pieces()), 0, 1)
    assert ours.ready(0)[0]
    assert len(load_table(tmp_path / "bank/v_0000").classes) == 24


@pytest.mark.parametrize(("before", "after", "left"), [(1, None, [1, 2]), (None, 0, [0])])
def test_discarded_versions_are_gone(tmp_path: Path, before: int | None, after: int | None, left: list[int]) -> None:
    ours = owner(tmp_path)
    for version in range(3):
        ours.offer(version, version, share(pieces(version)), 0, 1)
        assert ours.find(version, np.zeros((1, 3), np.float32), 1).shape == (1, 2, 1)
    ours.discard(before, after)
    assert [version for version in range(3) if ours.ready(version)[0]] == left


def test_a_version_that_has_gone_has_nothing_to_say(tmp_path: Path) -> None:
    """The driver's follower may ask for a version that was pruned since its step was written."""
    ours = owner(tmp_path)
    for version in (0, 1):
        ours.offer(version, 20 * version, share(pieces(version)), 0, 1)
    assert "24 rows" in str(ours.chosen(0))
    ours.discard(before=1, after=None)
    assert (ours.chosen(0), "24 rows" in str(ours.chosen(1))) == (None, True)
