"""Runs a command of ours, kills it at a given progress, and looks for what it left running."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 300.0

TINY = (
    "launcher=local", "method=embedding_matching", "matching=index", "network.base_filters=2", "network.levels=2",
    "sampling.patch_zyx=[8,8,8]", "train.validation_patches=4", "train.threads=1", "method.passes=2",
    "method.threshold=fixed", "method.threshold_value=0.9", "references.every_steps=3", "references.patches=4",
    "references.per_patch=20", "matching.k=3", "matching.queries=50", "checkpoint.every_steps=5",
    "logging.progress=false", "logging.tensorboard=false",
)  # fmt: skip


def command(verb: str, **keys: object) -> list[str]:
    """Double underscores are dots; a tuple `more` is taken as it is."""
    more = keys.pop("more", ())
    words = [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
    return [sys.executable, "-m", "distseg.cli", verb, *more, *words]


@contextmanager
def started(words: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """In a session of its own, ended by SIGKILL with all its kin whatever happens here."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *kin(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if process.stdout is not None and not process.stdout.closed:
            process.communicate()


class Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...


class Forked:
    """The command line in a process that begins with everything imported: a start costs a second less of each kill.

    `hold_at`: a training that has written this step waits there, to be killed by whoever comes late.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["tests.faults.killing", "distseg.training.local", "distseg.api"])

    def __init__(self, words: list[str], hold_at: int | None = None) -> None:
        self._process = self._context.Process(target=_main, args=(words, hold_at))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _main(words: list[str], hold_at: int | None) -> None:
    from distseg.cli import main

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if hold_at is not None:
        _hold(hold_at)
    sys.exit(main(words[words.index("distseg.cli") + 1 :]))


def _hold(step: int) -> None:
    from distseg.training.run import RunDirectory

    written = RunDirectory.append_metrics

    def append_metrics(run: RunDirectory, row: Mapping[str, Any]) -> None:
        written(run, row)
        if row["step"] >= step:
            time.sleep(DEADLINE_S)

    RunDirectory.append_metrics = append_metrics  # type: ignore[method-assign]  # in this process alone


def until(ready: Callable[[], bool], process: Process, *, poll_s: float = 0.002) -> bool:
    """Whether `ready` came true before the process ended."""
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "no progress"
        time.sleep(poll_s)
    return True


def kin(pid: int) -> list[int]:
    """Living processes of the session that `pid` began, and what descends from them, but for `pid` itself."""
    parents, sessions = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, ValueError, IndexError):
            continue
        if state != "Z":
            parents[int(folder.name)], sessions[int(folder.name)] = int(parent), int(session)
    found = {p for p, session in sessions.items() if session == pid and p != pid}
    grown = True
    while grown:
        below = {p for p, parent in parents.items() if parent in found | {pid}} - found - {pid}
        grown = bool(below)
        found |= below
    return sorted(found)


def gone(pids: list[int], within_s: float) -> list[int]:
    """Those still alive after `within_s`."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        pids = [pid for pid in pids if alive(pid)]
        if not pids:
            break
        time.sleep(0.2)
    return pids


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# --- runs ----------------------------------------------------------------------------------------------------------


def steps_done(run: Path) -> int:
    """Whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def checkpoint_step(run: Path) -> int:
    return max((int(f.name.removeprefix("step_")) for f in (run / "checkpoints").glob("step_*")), default=0)


def differences(run: Path, undisturbed: Path) -> list[str]:
    """What is not bit for bit the same: networks, optimizer, every number but the times, the bank."""
    found = []
    newest = sorted((undisturbed / "checkpoints").glob("step_*"))[-1].name
    for network in ("student", "teacher"):
        for folder in (f"checkpoints/{newest}", "model"):
            file = f"{folder}/{network}.safetensors"
            ours, theirs = (load_file(r / file) for r in (run, undisturbed))
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
                found.append(file)
    moments = [torch.load(r / f"checkpoints/{newest}/optimizer.pt", weights_only=True) for r in (run, undisturbed)]
    for index, state in moments[1]["state"].items():
        if not all(torch.equal(moments[0]["state"][index][name], value) for name, value in state.items()):
            found.append(f"optimizer {index}")
    numbers = [rows(r) for r in (run, undisturbed)]
    if len(numbers[0]) != len(numbers[1]):
        found.append(f"{len(numbers[0])} steps, not {len(numbers[1])}")
    found += [f"metrics of step {row['step']}" for row, other in zip(*numbers, strict=False) if row != other]
    banks = [{str(f.relative_to(r)): f for f in (r / "bank").rglob("*.safetensors")} for r in (run, undisturbed)]
    if banks[0].keys() != banks[1].keys():
        found.append(f"bank {sorted(banks[0].keys() ^ banks[1].keys())}")
    for name in banks[0].keys() & banks[1].keys():  # by tensor: the header's order is not fixed
        ours, theirs = (load_file(bank[name]) for bank in banks)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            found.append(name)
    return found


def rows(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time_")} for line in lines]


def half_written(run: Path, pattern: str) -> bool:
    return next(run.glob(pattern), None) is not None


@dataclass
class Kills:
    """`lost`: steps that were done and are done again, a kill. `how`: each in words."""

    tried: int = 0
    lost: list[int] = field(default_factory=list)
    how: list[str] = field(default_factory=list)


def kill_often(words: list[str], run: Path, *, kills: int, steps: int, seed: int) -> Kills:
    """Start the same command again and again and kill it at seeded progress; the last one is left alone.

    A kill falls a random moment after a step is written; every fifth while a checkpoint is half written, every seventh
    while a version of the bank is. Every fourth is Ctrl-C.
    """
    rng, done = random.Random(seed), Kills()
    for number in range(kills):
        reached = steps_done(run)
        wanted = min(reached + rng.randint(1, 2 * max(1, (steps - reached) // (kills - number + 1))), steps - 1)
        half = {4: "checkpoints/.step_*", 6: "bank/.v_*"}.get(number % 7)
        process = Forked(words, hold_at=steps)
        # What is done again after a kill counts from the checkpoint on.
        until(lambda reached=reached: steps_done(run) < reached or checkpoint_step(run) == reached, process)
        until(lambda wanted=wanted: steps_done(run) >= wanted, process)
        if half is not None:
            until(lambda half=half: half_written(run, half) or steps_done(run) >= steps, process, poll_s=0.0005)
        else:
            time.sleep(rng.random() * 0.05)
        stop = signal.SIGINT if number % 4 == 3 else signal.SIGKILL
        if process.poll() is None:
            os.kill(process.pid, stop)
        code = process.wait()
        assert code == (130 if stop == signal.SIGINT else -signal.SIGKILL), code
        done.tried += 1
        done.how.append(
            f"{stop.name} at {steps_done(run)}" + (f" in {half}" if half and half_written(run, half) else "")
        )
        done.lost.append(steps_done(run) - checkpoint_step(run))
    assert Forked(words).wait() == 0
    return done
