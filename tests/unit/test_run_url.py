"""A run behind a URL, in fsspec's memory and (slow) in a real S3 server, is the local run bit for bit, whoever is
killed and whatever machine is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import distseg
from distseg.config.compose import to_plain
from distseg.config.schema import TrainRunConfig
from distseg.data import carry
from distseg.data.carry import files_below, get_folder, marked, patiently, put_folder
from distseg.data.place import as_place
from distseg.distributed.index_service import IndexOwner
from distseg.errors import DataError, InputError, RunMismatchError
from distseg.inference import whole_scan
from distseg.training import remote_run
from distseg.training.dry_run import steps_of_same_run
from distseg.training.local import train_local
from distseg.training.remote_run import run_directory, working_folder
from distseg.work import url_owner
from distseg.work.url_owner import owning_run
from tests.faults.killing import TINY, differences, started, steps_done, until
from tests.unit.test_cohort_url import StoreAwayError, distseg_command, empty_memory, s3_bucket
from tests.unit.test_index_owner import CONFIG, SCANS, pieces, share
from tests.unit.test_training import assert_same_run, config, newest, train_on

__all__ = ["s3_bucket"]  # a fixture
URL = "memory://bucket/runs/run"
# Versions of the bank and of doubt come and go, the best on validation is spared, all within twelve steps.
LONG: dict[str, Any] = {
    "matching": "index", "train__steps": 12, "train__select": "val", "train__validate_every_steps": 3,
    "references__every_steps": 3, "references__patches": 4, "references__per_patch": 20, "matching__k": 3,
    "sampling__unlabelled": "doubt", "sampling__doubt_every_steps": 4, "checkpoint__keep": 2, "train__threads": 1,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's copies lie in a folder of the test; stores answer at once or never."""
    monkeypatch.setenv("DISTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(carry, "RETRY_S", 0.6)
    monkeypatch.setattr(carry, "_FIRST_PAUSE_S", 0.05)
    empty_memory()
    yield
    empty_memory()


def at(cohort: str, url: str = URL, **more: Any) -> TrainRunConfig:
    settings = config(cohort, Path("anywhere"), **{**LONG, **more})
    settings.run = url
    return settings


@pytest.fixture(scope="module")
def undisturbed(cohort_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on this file system."""
    settings = at(cohort_path, str(tmp_path_factory.mktemp("undisturbed") / "run"))
    train_local(settings)
    return Path(settings.run)


def downloaded(url: str, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    get_folder(as_place(url), to)
    return to


def names(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name[0] != ".")


def check(url: str, undisturbed: Path, tmp_path: Path) -> None:
    copy = downloaded(url, tmp_path / "copy")
    assert_same_run(copy, undisturbed)
    assert names(copy) == names(undisturbed)  # the bank's versions and doubt's too; no lock is left


def lose_this_machine() -> None:
    shutil.rmtree(working_folder(URL).parent, ignore_errors=True)


def test_a_run_behind_a_url_is_the_local_one(cohort_path: str, undisturbed: Path, tmp_path: Path) -> None:
    """Trained to its end; the same command again finds nothing to do, on another machine too; another run is refused
    by its URL."""
    settings = at(cohort_path)
    assert train_local(settings, claim=owning_run).resumed_from == 0
    check(URL, undisturbed, tmp_path)
    lose_this_machine()
    again = train_local(settings, claim=owning_run)
    assert (again.resumed_from, again.last["step"], again.run) == (12, 12, URL)
    check(URL, undisturbed, tmp_path)
    with pytest.raises(RunMismatchError, match=rf"{URL}: another run lives here.*optimizer.lr"):
        train_local(at(cohort_path, optimizer__lr=0.5), claim=owning_run)
    fsspec.filesystem("memory").rm("/bucket/runs", recursive=True)
    assert train_local(at(cohort_path, train__steps=2)).resumed_from == 0  # what lay here was that run's


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(request: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The store's writes and deletions so far; the process is killed before the one with this number."""
    memory = type(fsspec.filesystem("memory"))
    done: list[str] = []

    def counted(name: str) -> Any:
        whole = getattr(memory, name)

        def call(self: Any, *arguments: Any, **more: Any) -> Any:
            place = str(arguments[-1] if name == "put_file" else arguments[0])
            if not place.endswith(carry.OWNER):
                if len(done) == request:
                    raise Killed(f"{name} {place}")
                done.append(f"{name} {place}")
            return whole(self, *arguments, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("put_file", "pipe_file", "rm_file"):
            patch.setattr(memory, name, counted(name))
        yield done


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_write_it_ends_as_the_undisturbed(
    cohort_path: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """At seeded uploads and deletions, again and again; every other time the machine is gone with its disk."""
    rng, settings, deaths = random.Random(seed), at(cohort_path), 0
    for number in range(40):
        try:
            with killed_at(rng.randint(1, 45), monkeypatch):
                train_local(settings, claim=owning_run)
            break
        except Killed:
            deaths += 1
            fsspec.filesystem("memory").store.pop("/bucket/runs/run/owner.json", None)
        if number % 2:
            lose_this_machine()
    assert 3 <= deaths < 40
    train_local(settings, claim=owning_run)
    check(URL, undisturbed, tmp_path)


def test_folders_of_runs_long_gone_make_room(cohort_path: str) -> None:
    runs = working_folder(URL).parent
    long_ago = time.time() - (remote_run.KEPT_DAYS + 1) * 86400
    for name in ("old", "training", "new"):
        (runs / name / "checkpoints").mkdir(parents=True)
        (runs / name / "metrics.jsonl").touch()
        os.utime(runs / name / "metrics.jsonl", (long_ago, long_ago) if name == "old" else None)
        os.utime(runs / name, None if name == "new" else (long_ago, long_ago))
    train_local(at(cohort_path, train__steps=2))
    assert sorted(path.name for path in runs.glob("[!.]*")) == sorted(["new", "training", working_folder(URL).name])


def test_machines_need_no_file_system_in_common(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, each with its own folder; then rank 0's machine is gone, and the other's leads."""
    local = at(cohort_path, str(tmp_path / "local"), train__steps=16)
    train_on(2, local, monkeypatch)
    settings, places = at(cohort_path, train__steps=16), dict[int, Path]()

    def own_folder(_url: str) -> Path:
        place = places.setdefault(threading.get_ident(), tmp_path / f"machine{len(places)}")
        return place / "run"

    monkeypatch.setattr(remote_run, "working_folder", own_folder)
    with killed_at(28, monkeypatch), pytest.raises((Killed, threading.BrokenBarrierError)):
        train_on(2, settings, monkeypatch)
    assert 0 < run_directory(URL).newest_step() < 16
    assert len(places) == 3  # this thread opened the run
    places.clear()
    shutil.rmtree(tmp_path / "machine0")
    (tmp_path / "machine1").rename(tmp_path / "other")
    (tmp_path / "machine2").rename(tmp_path / "machine1")
    train_on(2, settings, monkeypatch)
    check(URL, Path(local.run), tmp_path)


def test_the_banks_owner_may_start_again_on_another_machine() -> None:
    ours = dataclasses.replace(CONFIG, run=URL)
    first = IndexOwner(to_plain(ours), 2, SCANS)
    for version in (0, 1):
        first.offer(version, 20 * version, share(pieces(version)), 0, 1)
    assert marked(files_below(as_place(f"{URL}/bank")), "bank.json") == ["v_0000", "v_0001"]
    lose_this_machine()
    second = IndexOwner(to_plain(ours), 2, SCANS)
    assert [second.ready(version)[0] for version in range(3)] == [True, True, False]
    second.discard(before=1, after=None)
    assert not second.ready(0)[0]
    assert marked(files_below(as_place(f"{URL}/bank")), "bank.json") == ["v_0001"]
    lose_this_machine()
    assert second.find(1, np.zeros((1, 3), np.float32), 1).shape == (1, 2, 1)  # fetched anew


@contextlib.contextmanager
def away(monkeypatch: pytest.MonkeyPatch, *, after: int, requests: int) -> Iterator[list[str]]:
    """A store that does not answer so many requests, once it has answered some; the heartbeat's do not count."""
    memory, me, asked = type(fsspec.filesystem("memory")), threading.current_thread(), list[str]()

    def failing(name: str) -> Any:
        whole = getattr(memory, name)

        def call(self: Any, *arguments: Any, **more: Any) -> Any:
            if threading.current_thread() is me:
                asked.append(name)
                if after < len(asked) <= after + requests:
                    raise StoreAwayError("nobody answers")
            return whole(self, *arguments, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("put_file", "pipe_file", "rm_file", "find", "cat_file"):
            patch.setattr(memory, name, failing(name))
        yield asked


def test_a_store_that_is_away(
    cohort_path: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while: nobody notices. For longer: one line, and the same command goes on from the last checkpoint."""
    settings = at(cohort_path)
    with away(monkeypatch, after=45, requests=1000), pytest.raises(InputError) as told:
        train_local(settings, claim=owning_run)
    said = str(told.value)
    assert re.match(rf"{URL}\S*: storage does not answer \(got .*StoreAwayError: nobody answers", said)
    assert "the same command goes on from what is there" in said
    assert "\n" not in said
    assert told.value.exit_code == 2
    reached = run_directory(URL).newest_step()
    assert 0 < reached < 12
    assert as_place(URL).joinpath("owner.json").exists()  # as it could not be taken away
    as_place(URL).joinpath("owner.json").unlink()
    lose_this_machine()
    with away(monkeypatch, after=20, requests=3) as asked:
        assert train_local(settings, claim=owning_run).resumed_from == reached
    assert len(asked) > 40
    check(URL, undisturbed, tmp_path)


def test_what_waiting_does_not_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "RETRY_S", 60.0)
    asked = []

    def answers(error: Exception) -> Any:
        def request() -> None:
            asked.append(error)
            raise error

        return request

    with pytest.raises(InputError, match=r"storage does not answer.*PermissionError"):
        patiently(answers(PermissionError("not yours")), where="s3://b/run")
    with pytest.raises(OSError, match=r"No space left"):
        patiently(answers(OSError(errno.ENOSPC, "No space left on device")), where="s3://b/run")
    with pytest.raises(FileNotFoundError):
        patiently(answers(FileNotFoundError("gone")), where="s3://b/run")
    assert len(asked) == 3
    place = as_place("memory://bucket/x")
    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "find", lambda *_: ["/bucket/x/../../etc/passwd"])
        with pytest.raises(DataError, match="a name that leads out of its folder"):
            get_folder(place, tmp_path / "x")


@pytest.mark.parametrize("harm", ["bytes", "cut", "marker"])
def test_a_checkpoint_that_is_damaged_there_leaves_the_one_before(
    cohort_path: str, undisturbed: Path, tmp_path: Path, harm: str
) -> None:
    train_local(at(cohort_path))
    newest = as_place(URL) / "checkpoints/step_0000012"
    if harm == "marker":  # an upload that was cut off
        newest.joinpath("state.json").unlink()
    else:
        file = newest / "student.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-4] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    lose_this_machine()
    warned = pytest.warns(UserWarning, match="passing over a damaged checkpoint, memory:.*step_0000012")
    with contextlib.nullcontext() if harm == "marker" else warned:
        assert train_local(at(cohort_path)).resumed_from == 10
    check(URL, undisturbed, tmp_path)


def test_one_driver_at_a_time(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is refused before it does anything; who was taken over writes no more."""
    monkeypatch.setattr(url_owner, "HEARTBEAT_S", 0.05)
    settings = at(cohort_path)
    with owning_run(URL) as claim:
        with pytest.raises(InputError, match=rf"{URL}: another process writes this run \(got process {os.getpid()} "):
            train_local(settings, claim=owning_run)
        assert files_below(as_place(URL)) == ["owner.json"]
        assert claim is not None
        (as_place(URL) / "owner.json").write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "theirs"}))
        with pytest.raises(InputError, match=r"took this run over while.*host elsewhere, process 7"):
            train_local(settings, claim=lambda _: contextlib.nullcontext(claim))
    assert run_directory(URL).newest_step() == 0
    assert json.loads((as_place(URL) / "owner.json").read_text())["token"] == "theirs"
    with owning_run(str(tmp_path)) as nothing:  # of this file system
        assert nothing is None

    def refused(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(url_owner, "create_text", refused)
    with pytest.raises(InputError, match=r"run: cannot write there \(got memory://b/r\); PermissionError: not yours"):
        owning_run("memory://b/r").__enter__()


@pytest.fixture
def both(undisturbed: Path) -> tuple[str, str]:
    """The run on this file system and a copy of it behind the URL."""
    for name in ("model.json", "config.yaml"):
        assert next(undisturbed.rglob(name), None) is not None
    put_folder(undisturbed, as_place(URL), marker="config.yaml")
    whole_scan.cached_model.cache_clear()
    return str(undisturbed), URL


def test_what_reads_a_run_reads_it_from_a_url(
    cohort_path: str, both: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """predict, evaluate, label, export and a branch: what they give of the run here, they give of the run there."""
    image = sorted(Path(cohort_path).parent.glob("source/imagesTr/v_*"))[0]
    common: dict[str, Any] = {"launcher": "local", "progress": False}
    found: dict[str, list[Any]] = {}
    for number, run in enumerate(both):
        out = tmp_path / str(number)
        distseg.predict(run=run, input=image, output=out / "mask.nii.gz", **common)
        metrics = distseg.evaluate(run=run, cohort=cohort_path, split="val", **common)
        distseg.label(run=run, cohort=cohort_path, output=out / "labels", passes=2, review_scans=1, **common)
        distseg.export(run=run, output=out / "graph", format="torchscript")
        branch = config(cohort_path, out / "branch", train__init_from=run, train__steps=2)
        tried = distseg.api.train_from_config(dataclasses.replace(branch, dry_run=False, launcher="local"))
        found.setdefault("masks", []).append((out / "mask.nii.gz").read_bytes())
        found.setdefault("metrics", []).append(metrics)
        found.setdefault("labels", []).append([f.read_bytes() for f in sorted((out / "labels").rglob("*.nii.gz"))])
        found.setdefault("graph", []).append(json.loads((out / "graph/model.json").read_text()))
        found.setdefault("branch", []).append((newest(out / "branch") / "student.safetensors").read_bytes())
        assert tried.steps == 2
    for what, (one, other) in found.items():
        assert one == other, what
    assert len(found["labels"][0]) == 18
    page = (as_place(URL) / "evaluation/val/report.html").read_text()
    assert page == (Path(both[0]) / "evaluation/val/report.html").read_text()
    kept = [name for name in files_below(as_place(URL)) if name.startswith("evaluation/")]
    assert {"evaluation/val/metrics.json", "evaluation/val/figures/curves.png"} <= set(kept)
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match=r"memory://bucket/none: no trained model here"):
        distseg.predict(run="memory://bucket/none", input=image, output=tmp_path / "m.nii.gz", **common)


def test_what_is_looked_at_before_anything_starts(
    cohort_path: str, both: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run counts the steps behind the URL and leaves nothing; a store that is not there is told at once."""
    assert steps_of_same_run(at(cohort_path)) == 12
    with pytest.raises(RunMismatchError, match="another run lives here"):
        steps_of_same_run(at(cohort_path, seed=5))
    assert not working_folder(URL).parent.exists()

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(carry, "RETRY_S", 60.0)
    monkeypatch.setattr(type(as_place(URL)), "exists", gone)
    for call in (
        lambda: distseg.predict(run=URL, input=tmp_path, output=tmp_path, launcher="local"),
        lambda: distseg.evaluate(run=URL, cohort=cohort_path, launcher="local"),
        lambda: distseg.label(run=URL, cohort=cohort_path, output=tmp_path, launcher="local"),
        lambda: distseg.export(run=URL, output=tmp_path),
        lambda: distseg.api.train_from_config(at(cohort_path, launcher="local")),
        lambda: distseg.api.train_from_config(at(cohort_path, launcher="local", dry_run=True)),
    ):
        with pytest.raises(InputError, match=rf"run: storage cannot be reached \(got {URL}\).*nobody answers"):
            call()
    with pytest.raises(InputError, match=r"train.init_from: storage cannot be reached"):
        train_local(config(cohort_path, tmp_path / "branch", train__init_from=URL))


# A real server


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_line_trains_to_s3(cohort_path: str, tmp_path: Path, s3_bucket: str) -> None:
    """Killed with SIGKILL and the machine's folder gone, the same command ends as the run on this file system; what
    reads it then reads it there."""
    url, local = f"{s3_bucket}/runs/run", tmp_path / "local"
    words = [*TINY, f"cohort={cohort_path}", "train.steps=30"]
    assert distseg_command("train", *words, f"run={local}") == 0
    to_url = [sys.executable, "-m", "distseg.cli", "train", *words, f"run={url}"]
    for kill_at in (8, 17):
        with started(to_url) as process:
            assert until(lambda at=kill_at: steps_done(working_folder(url)) >= at, process)
            process.kill()
        shutil.rmtree(tmp_path / "cache")
    (as_place(url) / "owner.json").unlink()
    with owning_run(url):
        assert distseg_command("train", *words, f"run={url}") == 2  # one driver at a time
    assert distseg_command("train", *words, f"run={url}") == 0
    copy = downloaded(url, tmp_path / "copy")
    assert differences(copy, local) == []
    assert names(copy) == names(local)
    image = sorted(Path(cohort_path).parent.glob("source/imagesTr/v_*"))[0]
    for run, mask in ((url, "there"), (str(local), "here")):
        out = tmp_path / mask
        assert distseg_command("predict", f"run={run}", f"input={image}", f"output={out}.nii.gz", "launcher=local") == 0
    assert (tmp_path / "there.nii.gz").read_bytes() == (tmp_path / "here.nii.gz").read_bytes()
    evaluate = ("evaluate", f"run={url}", f"cohort={cohort_path}", "split=val", "launcher=local", "resources.workers=2")
    assert distseg_command(*evaluate) == 0
    assert (as_place(url) / "evaluation/val/report.html").exists()
    assert distseg_command("train", *words, "run=s3://nobucket/run") == 2
