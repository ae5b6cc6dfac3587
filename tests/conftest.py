"""What every test shares: one thread a process, and hypothesis without wall-clock deadlines."""

from __future__ import annotations

import os

# Before torch, numpy or faiss load: two cores and two processes with two threads each crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # otherwise each report() waits about two seconds

from hypothesis import HealthCheck, settings

from tests.own_process import pytest_runtest_logreport, pytest_runtest_protocol  # noqa: F401  # hooks

settings.register_profile("distseg", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("distseg")
