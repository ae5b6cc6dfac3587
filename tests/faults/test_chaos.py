"""A full disk, storage that fails or dawdles, a worker that hangs, no memory; ingest and tune killed: nothing is lost,
nothing is there twice, no process is left, and a message says what happened."""

from __future__ import annotations

import csv
import errno
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distseg.cli import main
from distseg.data import patches
from distseg.data.cohort import Cohort
from distseg.inference.model import load_model
from distseg.training import loop
from distseg.work import label_task
from tests.faults.killing import ROOT, TINY, Forked, command, differences, gone, kin, started, steps_done, until
from tests.unit.tiny_cohort import make_cohort, write_source

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


def train(cohort: str, run: Path, **keys: object) -> list[str]:
    return command("train", cohort=cohort, run=run, more=TINY, **{"train__steps": 30, **keys})


def here(words: list[str]) -> int:
    """The command line in this process."""
    return main(words[words.index("distseg.cli") + 1 :])


@pytest.fixture(scope="module")
def undisturbed(cohort: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert Forked(train(cohort, run)).wait() == 0
    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "distseg", disk]).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_while_training(
    cohort: str, undisturbed: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = small_disk / "filler"
    words = train(cohort, small_disk / "run")
    for room in (12_000, 40_000):  # full at the first checkpoint, and at a later one
        filler.write_bytes(b"\0" * (free(small_disk) - room))
        assert here(words) == 2
        said = capsys.readouterr().err
        assert re.search(r"^.*No space left on device.*$", said, re.MULTILINE), said
        assert "Traceback" not in said
        filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert here(words) == 0
    assert differences(small_disk / "run", undisturbed) == []


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def test_storage_that_fails_and_dawdles(
    cohort: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading fails three times at a random step, and takes its time; the same command each time goes on."""
    read, rng = patches.PatchReader._read, random.Random(3)
    words = train(cohort, tmp_path / "run", data__memory_gib=0)
    for _ in range(3):
        good = itertools.repeat(True, rng.randint(10, 35))

        def fails(reader: Any, *arguments: Any, good: Iterator[bool] = good) -> Any:
            time.sleep(0.01)
            if not next(good, False):
                raise OSError(errno.EIO, "Input/output error", "cohort")
            return read(reader, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(patches.PatchReader, "_read", fails)
            assert here(words) == 2
        assert "Input/output error" in capsys.readouterr().err
    assert here(words) == 0
    assert differences(tmp_path / "run", undisturbed) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12 GiB"),
    ],
    ids=["python", "cuda", "torch"],
)
def test_no_memory(
    cohort: str,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    step = loop.training_step

    def fails(*arguments: Any, at: Any, **more: Any) -> Any:
        if at.step == 8:
            raise error
        return step(*arguments, at=at, **more)

    words = train(cohort, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", fails)
        assert here(words) == 2
    assert "train: out of memory" in capsys.readouterr().err
    assert here(words) == 0
    assert differences(tmp_path / "run", undisturbed) == []


def test_memory_that_is_really_not_there(cohort: str, tmp_path: Path) -> None:
    """A process that may grow by half a GiB, which its libraries' threads need, and a patch that needs far more."""
    words = train(cohort, tmp_path / "run", sampling__patch_zyx="[96,96,96]", network__base_filters=16)
    limited = (
        "import resource, sys; from distseg.cli import main; import distseg.training.local; "
        "n = int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**29; "
        "resource.setrlimit(resource.RLIMIT_AS, (n, n)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, *words[words.index("distseg.cli") + 1 :]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "out of memory" in done.stderr) == (2, True), done.stderr


def under_torchrun(words: list[str], workers: int) -> list[str]:
    ours = words[words.index("distseg.cli") + 1 :]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    return [sys.executable, *launcher, "-m", "distseg.cli", *ours]


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process of torchrun's workers."""
    found = {}
    for pid in kin(launcher):
        try:
            environment = dict(
                item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item
            )
        except OSError:
            continue
        if "RANK" in environment and "LOCAL_WORLD_SIZE" in environment:
            found.setdefault(int(environment["RANK"]), pid)
    return found


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_worker_that_hangs_is_named(cohort: str, tmp_path: Path, hanging: int) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = [under_torchrun(train(cohort, r, train__worker_timeout_s=5, resources__workers=2), 2) for r in (whole, run)]
    subprocess.run(words[0], cwd=ROOT, check=True, capture_output=True)
    with started(words[1]) as launcher:
        assert until(lambda: steps_done(run) >= 12, launcher)
        workers = ranks_of(launcher.pid)
        os.kill(workers[hanging], signal.SIGSTOP)
        said = launcher.communicate(timeout=240)[0]
        assert launcher.returncode != 0
        assert f"rank {hanging} does not answer: it may hang or have died" in said, said[-3000:]
        assert gone(list(workers.values()), within_s=60) == []
    subprocess.run(words[1], cwd=ROOT, check=True, capture_output=True)
    assert differences(run, whole) == []


def test_fewer_and_more_workers_go_on(cohort: str, tmp_path: Path) -> None:
    """Two, then one, then three of the same three slots: one undisturbed process, up to the order of sums."""
    keys = {"train__batch_size": 3, "train__precision": "float64"}
    assert Forked(train(cohort, tmp_path / "one", **keys)).wait() == 0
    run = tmp_path / "run"
    for workers, stop_at in ((2, 8), (1, 17), (3, None)):
        words = under_torchrun(train(cohort, run, **keys, resources__workers=workers), workers)
        with started(words) as launcher:
            if stop_at is None:
                assert launcher.wait() == 0
                break
            assert until(lambda stop_at=stop_at: steps_done(run) >= stop_at, launcher)
            for pid in [launcher.pid, *kin(launcher.pid)]:
                os.kill(pid, signal.SIGKILL)
    ours, theirs = (load_model(r).networks["student"].state_dict() for r in (run, tmp_path / "one"))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in theirs)
    losses = [[row["loss"] for row in loop.RunDirectory(r).metrics()] for r in (run, tmp_path / "one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)


def test_ten_kills_of_ingest(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    keys = {"source": source, "launcher": "local", "resources__workers": 2, "logging__progress": "false"}
    words = {name: command("ingest", cohort=tmp_path / f"{name}.zarr", **keys) for name in ("u", "k")}
    assert Forked(words["u"]).wait() == 0
    rng, kills, path = random.Random(7), 0, tmp_path / "k.zarr"
    index, committed = tmp_path / "k.index.jsonl", {}
    for number in range(10):
        wanted = number * 8 // 10  # of the nine scans
        kills += killed_once(words["k"], lambda wanted=wanted: len(list(path.glob("*/zarr.json"))) > wanted, rng)
        whole = complete(path)
        assert committed.items() <= whole.items(), "a committed scan was done again"
        committed = whole
    assert Forked(words["k"]).wait() == 0
    assert kills >= 8
    assert committed.items() <= complete(path).items()
    ours, theirs = Cohort.open(path), Cohort.open(tmp_path / "u.zarr")
    assert ours.records == theirs.records
    lines = [line for line in index.read_text().splitlines() if line]
    assert len(lines) == len(theirs.records) + lines_twice(lines)
    assert not list(path.rglob(".*partial*"))


def killed_once(words: list[str], due: Callable[[], bool], rng: random.Random) -> bool:
    """Start a command and SIGKILL it a moment after `due`; whether that came before its end. Nobody of it stays."""
    process = Forked(words)
    until(due, process)
    time.sleep(rng.random() * 0.15)
    family = kin(process.pid)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    ended_well = process.wait() == 0
    assert gone(family, within_s=30) == []
    return not ended_well


def complete(path: Path) -> dict[str, int]:
    """Scans that are whole, and when they became so."""
    files = [file for file in path.glob("*/zarr.json") if '"complete": true' in file.read_text()]
    return {file.parent.name: file.stat().st_mtime_ns for file in files}


def lines_twice(lines: list[str]) -> int:
    return len(lines) - len(set(lines))


def test_ten_kills_of_tune(cohort: str, tmp_path: Path) -> None:
    small = ("space=thresholds", "tune.trials=4", "tune.looks=3", "tune.validation_share=0.5", "train.steps=12")
    words = {
        name: command("tune", cohort=cohort, run=tmp_path / name, more=(*TINY, *small), tune__scheduler="none")
        for name in ("u", "k")
    }
    assert Forked(words["u"]).wait() == 0
    rng, kills, run = random.Random(9), 0, tmp_path / "k"
    for number in range(10):
        wanted = (number + 1) * 60 // 12  # of the warm-up's and four trials' steps
        kills += killed_once(words["k"], lambda wanted=wanted: steps_of_all(run) >= wanted, rng)
    assert Forked(words["k"]).wait() == 0
    assert kills >= 8
    told = [trials(tmp_path / name) for name in ("k", "u")]
    assert told[0] == told[1]
    assert len(told[0]) == 4
    ours, theirs = (load_model(tmp_path / name / "best").networks["student"].state_dict() for name in ("k", "u"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def steps_of_all(run: Path) -> int:
    files = [file for pattern in ("*/metrics.jsonl", "*/*/metrics.jsonl") for file in run.glob(pattern)]  # none below
    return sum(file.read_bytes().count(b"\n") for file in files)


def trials(run: Path) -> list[dict[str, str]]:
    with (run / "trials.csv").open() as file:
        return [
            {k: v for k, v in row.items() if not re.search(r"(_s$|seconds|time)", k)} for row in csv.DictReader(file)
        ]


def label(cohort: str, run: Path, output: Path) -> list[str]:
    keys = {"launcher": "local", "label__passes": 2, "logging__progress": "false"}
    return command("label", run=run, cohort=cohort, output=output, **keys)


def made_by_label(output: Path) -> dict[str, bytes]:
    """Every mask and trust map, and the table but its times."""
    files = {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("*.nii.gz")}
    with (output / "scans.csv").open() as file:
        lines = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    return {**files, "scans.csv": repr(lines).encode()}


def test_a_full_disk_while_labelling(
    cohort: str, undisturbed: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(label(cohort, undisturbed, tmp_path / "u")) == 0
    filler, words = small_disk / "filler", label(cohort, undisturbed, small_disk / "out")
    for room in (6_000, 60_000):  # full at the first scan, and at a later one
        filler.write_bytes(b"\0" * (free(small_disk) - room))
        assert here(words) in (2, 3)
        said = capsys.readouterr().err
        assert "No space left on device" in said, said
        assert "Traceback" not in said
        filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert here(words) == 0
    assert made_by_label(small_disk / "out") == made_by_label(tmp_path / "u")


def test_a_full_disk_while_tuning(cohort: str, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("space=thresholds", "tune.trials=2", "tune.looks=2", "tune.validation_share=0.5", "train.steps=8")
    words = command("tune", cohort=cohort, run=small_disk / "run", more=(*TINY, *small), tune__scheduler="none")
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (free(small_disk) - 120_000))
    assert here(words) in (2, 3)
    said = capsys.readouterr().err
    assert "No space left on device" in said, said
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert here(words) == 0
    assert [row["state"] for row in trials(small_disk / "run")] == ["finished"] * 2


def sweep(cohort: str, run: Path) -> list[str]:
    """No patch is kept in memory: each is read, every time."""
    small = ("space=thresholds", "tune.trials=3", "tune.looks=2", "tune.validation_share=0.5", "train.steps=8")
    return command("tune", cohort=cohort, run=run, more=(*TINY, *small), tune__scheduler="none", data__memory_gib=0)


@pytest.fixture(scope="module")
def undisturbed_sweep(cohort: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed_sweep") / "run"
    assert Forked(sweep(cohort, run)).wait() == 0
    return run


def reads_that_fail(fails: Callable[[int], bool]) -> Callable[..., Any]:
    """In the place of PatchReader._read: each takes its time, and that number `fails`."""
    read, calls = patches.PatchReader._read, itertools.count(1)

    def _read(reader: Any, *arguments: Any) -> Any:
        time.sleep(0.005)
        if fails(next(calls)):
            raise OSError(errno.EIO, "Input/output error", "cohort")
        return read(reader, *arguments)

    return _read


def test_tuning_from_storage_that_fails(
    cohort: str,
    undisturbed_sweep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Reading fails in the warm-up, then in a trial, for good each time; what was finished stays as it was."""
    words = sweep(cohort, tmp_path / "k")
    for good_reads in (20, 90):
        with monkeypatch.context() as patch:
            patch.setattr(patches.PatchReader, "_read", reads_that_fail(lambda n, good=good_reads: n > good))
            assert here(words) in (2, 3)
        said = capsys.readouterr().err
        assert "Input/output error" in said
        assert "Traceback" not in said
    assert here(words) == 0
    assert trials(tmp_path / "k") == trials(undisturbed_sweep)


def test_tuning_from_storage_whose_every_nth_read_fails(
    cohort: str,
    undisturbed_sweep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same command again and again gets through, by what each one leaves: no trial is lost, none is there twice."""
    words, codes = sweep(cohort, tmp_path / "k"), []
    with monkeypatch.context() as patch:
        patch.setattr(patches.PatchReader, "_read", reads_that_fail(lambda n: n % 70 == 0))
        while len(codes) < 12 and codes[-1:] != [0]:
            codes.append(here(words))
            said = capsys.readouterr().err
            assert codes[-1] == 0 or "Input/output error" in said
            assert "Traceback" not in said
    assert set(codes[:-1]) <= {2, 3}
    assert (len(codes) > 1, codes[-1]) == (True, 0), codes
    assert trials(tmp_path / "k") == trials(undisturbed_sweep)


def test_labelling_from_storage_that_fails(
    cohort: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every third read of a scan fails, and takes its time; the same command goes on with what is not done."""
    assert here(label(cohort, undisturbed, tmp_path / "u")) == 0
    opened, calls = label_task.label_open_scan, itertools.count(1)

    def fails(*arguments: Any, **more: Any) -> Any:
        time.sleep(0.01)
        if next(calls) % 3 == 0:
            raise OSError(errno.EIO, "Input/output error", "cohort")
        return opened(*arguments, **more)

    words = label(cohort, undisturbed, tmp_path / "k")
    with monkeypatch.context() as patch:
        patch.setattr(label_task, "label_open_scan", fails)
        assert here(words) in (0, 3)  # tried again, and set aside where that failed too
    assert here(words) == 0
    assert made_by_label(tmp_path / "k") == made_by_label(tmp_path / "u")
