"""Long tests of a real Ray, and those marked `own_process`, each in a process of its own.

Ray keeps state in its process: whether tokens are asked for, the cluster that tokens were made for, what its workers
inherit of the environment. A test of a cluster without tokens would leave the next one unable to start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_REPORTS = "DISTSEG_TEST_REPORTS"  # set in such a process: the file its reports go to
_SHOWN = 10_000  # characters of what a process said that ended without a report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    long = item.get_closest_marker("slow") or item.get_closest_marker("chaos")
    apart = item.get_closest_marker("own_process") or item.get_closest_marker("ray")
    if not (long and apart) or _REPORTS in os.environ:
        return None
    if item.config.pluginmanager.hasplugin("timeout"):
        item.ihook.pytest_timeout_cancel_timer(item=item)  # the process has its own
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # of fixtures that its module shared with the item before it
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = os.environ.get(_REPORTS)
    if file is not None:
        with Path(file).open("a") as lines:
            lines.write(json.dumps(report._to_json()) + "\n")


def _reports_of(item: pytest.Item) -> Iterator[pytest.TestReport]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reports.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "slow or chaos", "-p", "no:cacheprovider", item.nodeid],
            cwd=item.config.rootpath,
            env={**os.environ, _REPORTS: str(file)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        lines = file.read_text().splitlines() if file.exists() else []
    reports = [pytest.TestReport._from_json(json.loads(line)) for line in lines]
    yield from reports
    if not any(report.when == "teardown" for report in reports):  # it died on the way, or never began
        yield pytest.TestReport(
            item.nodeid,
            item.location,
            dict.fromkeys(item.keywords, 1),
            outcome="failed",
            longrepr=f"its process ended with {done.returncode}:\n{done.stdout[-_SHOWN:]}",
            when="call",
        )
