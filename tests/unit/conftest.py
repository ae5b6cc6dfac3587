"""Fixtures of the rooms that read and train: the tiny cohort, ingested once a session."""

from __future__ import annotations

import pytest

from tests.unit import tiny_cohort


@pytest.fixture(scope="session")
def cohort_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes; six labelled, two unlabelled, one validation scan. Read only."""
    return tiny_cohort.make_cohort(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def poisoned_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same images, but the labels of scans c to f are noise: hidden truth that no training may notice."""
    return tiny_cohort.make_cohort(tmp_path_factory.mktemp("poisoned"), poisoned=("c", "d", "e", "f"))
