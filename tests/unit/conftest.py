"""Fixtures of the rooms that read and train: the tiny cohort, ingested once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distseg.inference import whole_scan
from tests.unit import bone_model, tiny_cohort


@pytest.fixture(scope="session")
def cohort_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes; six labelled, two unlabelled, one validation scan. Read only."""
    return tiny_cohort.make_cohort(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def poisoned_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same images, but the labels of scans c to f are noise: hidden truth that no training may notice."""
    return tiny_cohort.make_cohort(tmp_path_factory.mktemp("poisoned"), poisoned=("c", "d", "e", "f"))


@pytest.fixture
def bone_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run whose model calls bone what is bright."""
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/model.json").write_text("{}")
    monkeypatch.setattr(whole_scan, "load_model", bone_model.bone_model)
    whole_scan.cached_model.cache_clear()
    yield str(tmp_path / "run")
    whole_scan.cached_model.cache_clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
