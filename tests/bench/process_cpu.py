"""CPU time of a command and of all that it started, by process, while it runs. Linux."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(root: int) -> dict[int, float]:
    """Process id -> user and system seconds so far, of `root` and everything below it that is alive."""
    parents, seconds = _all(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {pid: seconds[pid] for pid in seconds if _below(pid, root, parents)}


def cpu_seconds_of(pids: Iterable[int]) -> dict[int, float]:
    """The same of these, where they are alive."""
    return _all(pids)[1]


def _all(pids: Iterable[int]) -> tuple[dict[int, int], dict[int, float]]:
    """Process id -> its parent; -> its seconds."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue  # gone meanwhile
        fields = stat[stat.rindex(")") + 2 :].split()  # from the third field on: a name may hold blanks
        parents[pid] = int(fields[1])
        seconds[pid] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return parents, seconds


def _below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid != root and pid in parents:
        pid = parents[pid]
    return pid == root
