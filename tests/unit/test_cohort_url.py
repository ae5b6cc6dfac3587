"""A cohort behind a URL, in fsspec's memory and (slow) in a real S3 server, holds what a local one holds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import distseg
from distseg.data import publish
from distseg.data.cohort import Cohort, beside, index_path, sources_path
from distseg.data.intensity import Intensity
from distseg.data.patches import PatchReader
from distseg.data.place import as_place, create_text
from distseg.errors import ConfigError, DataError, InputError
from distseg.work import node_probes, url_owner
from distseg.work.cohort_actions import list_cohort, remove_scan, repair_cohort
from distseg.work.executor import LocalExecutor
from distseg.work.url_owner import owning_url
from tests.unit.test_ingest import image_file, ingest, labelled_source


@pytest.fixture
def in_memory() -> Iterator[str]:
    empty_memory()
    yield "memory://bucket/c.zarr"
    empty_memory()


def empty_memory() -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def check_against_local(source: Path, url: str, path: Path) -> None:
    """Index, attributes and voxels of the cohort at `url` are those of one ingested to `path`."""
    local, remote = Cohort.open(path), Cohort.open(url)
    assert (local.records, local.classes, local.channel_names) == (remote.records, remote.classes, remote.channel_names)
    assert list_cohort(url) == list_cohort(str(path))
    for record in local.records:
        one, other = local.scan(record.scan_id), remote.scan(record.scan_id)
        assert one.attrs == other.attrs
        assert np.array_equal(one.image[...], other.image[...])
        assert np.array_equal(one.body_samples, other.body_samples)
        assert (one.annotation is None) == (other.annotation is None)
        if one.annotation is not None and other.annotation is not None:
            assert np.array_equal(one.annotation[...], other.annotation[...])
    readers = [
        PatchReader(cohort, spacing_mm=(2.0, 2.0, 2.0), intensity=Intensity("CT", -900, 900, 0, 1), memory_nbytes=0)
        for cohort in (local, remote)
    ]
    first, second = (reader.image("a", (-1, 0, 1), (4, 4, 4)) for reader in readers)
    assert np.array_equal(first, second)


def check_life(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ingest and cohort do, against a local cohort that has been through the same."""
    source, path = labelled_source(tmp_path / "s", ("a", "b", "c")), tmp_path / "c.zarr"
    assert ingest(source, path).added == ingest(source, url).added == ["a", "b", "c"]
    check_against_local(source, url, path)
    image_file(source / "imagesTr/b_0000.nii.gz", seed=9)  # a changed file is noticed by its hash
    (source / "labelsTr/c.nii.gz").unlink()
    for place in (path, url):
        report = ingest(source, place)
        assert (report.added, report.skipped) == (["b", "c"], ["a"])
        remove_scan(str(place), scan="a")
    assert Cohort.open(url).scan("c").annotation is None
    assert not as_place(f"{url}/c/labels").exists()
    for place in (path, url):
        ingest(source, place)
    check_against_local(source, url, path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    image_file(source / "imagesTr/d_0000.nii.gz", seed=3)
    monkeypatch.setattr(publish, "upload", killed)
    with pytest.raises(KeyboardInterrupt):
        ingest(source, url)
    monkeypatch.undo()
    assert len(Cohort.open(url).records) == 3
    assert (as_place(url) / "d/zarr.json").exists()  # it says that it is not complete
    assert repair_cohort(url).dropped == ["d"]
    assert ingest(source, url).added == ingest(source, path).added == ["d"]
    check_against_local(source, url, path)
    as_place(url.replace(".zarr", ".index.jsonl")).unlink()
    with pytest.raises(DataError, match="index is missing"):
        Cohort.open(url)
    assert repair_cohort(url).scans == 4
    check_against_local(source, url, path)


def test_a_cohort_in_memory_is_a_local_one(tmp_path: Path, in_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_life(tmp_path, in_memory, monkeypatch)


def test_one_writer_at_a_time_behind_a_url(in_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_owner, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(url_owner, "LAPSE_S", 0.6)
    lock = as_place("memory://bucket/c.lock")
    with owning_url(lock, what="cohort", name="c"):
        begun = time.monotonic()
        with pytest.raises(InputError, match=rf"another process writes this cohort \(got process {os.getpid()} on "):
            owning_url(lock, what="cohort", name="c").__enter__()
        assert time.monotonic() - begun < 0.5
    assert not lock.exists()
    silent = {"host": "elsewhere", "pid": 1, "token": "t", "count": 7}
    create_text(lock, json.dumps(silent))
    with owning_url(lock, what="cohort", name="c"):  # its count stood still
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock.write_text(json.dumps({**silent, "host": url_owner.socket.gethostname(), "pid": dead.pid}))
    begun = time.monotonic()
    with owning_url(lock, what="cohort", name="c"):
        assert time.monotonic() - begun < 0.5
    assert threading.active_count() < 20


class StoreAwayError(Exception):
    """As a backend of fsspec has them: no OSError."""


@pytest.fixture
def away(in_memory: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Reads of the store made by this thread fail while the list is not empty, one for each True in it; a False is a
    read that works. Other threads are not concerned."""
    monkeypatch.setattr(url_owner, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(url_owner, "LAPSE_S", 0.4)
    plan: list[bool] = []
    kind, me = type(as_place(in_memory)), threading.current_thread()
    whole = kind.read_bytes

    def read_bytes(self: Path) -> bytes:
        if threading.current_thread() is me and plan and plan.pop(0):
            raise StoreAwayError("nobody answers")
        return bytes(whole(self))

    monkeypatch.setattr(kind, "read_bytes", read_bytes)
    return plan


def test_a_watcher_that_cannot_read_takes_no_living_lock_over(away: list[bool]) -> None:
    lock = as_place("memory://bucket/c.lock")
    with owning_url(lock, what="cohort", name="c") as owner:
        away[:] = [False, True, True, True]  # the lock was seen, then the store is away
        with pytest.raises(InputError, match="another process writes this cohort"):
            owning_url(lock, what="cohort", name="c").__enter__()
        assert owner.is_mine()
        away[:] = [False, *[True] * 1000]  # it stays away: nobody knows
        with pytest.raises(OSError, match="StoreAwayError: nobody answers"):
            owning_url(lock, what="cohort", name="c").__enter__()
        away.clear()
        assert owner.is_mine()
    create_text(lock, json.dumps({"host": "elsewhere", "pid": 1, "token": "t", "count": 7}))
    away[:] = [False, True, True, False]  # an owner that stands still is found out all the same
    with owning_url(lock, what="cohort", name="c") as owner:
        owner.check()
        away[:] = [True]
        with pytest.raises(OSError, match="nobody answers"):
            owner.check()
    assert not lock.exists()


@pytest.mark.parametrize("call", ["read_bytes", "write_text"])
def test_an_owner_outlives_requests_that_fail(in_memory: str, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(url_owner, "HEARTBEAT_S", 0.02)
    lock, failed = as_place("memory://bucket/c.lock"), threading.Event()

    def fails(*_: object, **__: object) -> None:
        failed.set()
        raise StoreAwayError("nobody answers")

    with owning_url(lock, what="cohort", name="c"):
        with monkeypatch.context() as patch:
            patch.setattr(type(lock), call, fails)
            assert failed.wait(5)
        before, until = json.loads(lock.read_text())["count"], time.monotonic() + 5
        while json.loads(lock.read_text())["count"] <= before + 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert json.loads(lock.read_text())["count"] > before + 1  # it counts again
    assert not lock.exists()


class TakenOver(LocalExecutor):
    """After the first scan another process has the cohort."""

    def __init__(self, lock: Path) -> None:
        super().__init__(1)
        self._lock = lock

    def map(self, *arguments: Any, **more: Any) -> Iterator[Any]:
        for number, outcome in enumerate(super().map(*arguments, **more)):
            if number == 1:
                self._lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "theirs"}))
            yield outcome


@pytest.mark.parametrize("behind_url", [False, True])
def test_an_ingest_that_was_taken_over_writes_no_more(tmp_path: Path, in_memory: str, behind_url: bool) -> None:
    source = labelled_source(tmp_path / "s", ("a", "b", "c"))
    path = as_place(in_memory if behind_url else tmp_path / "c.zarr")
    lock, index = beside(path, "lock"), index_path(path)
    with pytest.raises(InputError, match=r"took this cohort over while.*host elsewhere, process 7"):
        ingest(source, path, executor=TakenOver(lock))
    assert json.loads(lock.read_text())["token"] == "theirs"
    booked = [json.loads(line)["id"] for line in index.read_text().splitlines()]
    # Behind a URL lines wait for the next put, which is the other process's to make; it finds the scan in the store.
    assert booked == ([] if behind_url else ["a"])
    assert sources_path(path).exists() != behind_url
    assert beside(path, "staging").exists() != behind_url  # it may be the other's
    lock.unlink()
    report = ingest(source, path)
    assert (report.added, report.skipped) == (["c"], ["a", "b"])


class Killed(LocalExecutor):
    """Dies once the first scan is in the store, before it is written down."""

    def map(self, *arguments: Any, **more: Any) -> Iterator[Any]:
        next(iter(super().map(*arguments, **more)))
        raise KeyboardInterrupt
        yield


def test_a_removal_that_is_cut_off_leaves_no_zeros_to_train_on(
    tmp_path: Path, in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each of its deletions: who opens the scan is refused, and either command again ends it."""
    source, path = labelled_source(tmp_path / "s"), tmp_path / "c.zarr"
    ingest(source, path)
    ingest(source, in_memory)
    memory = type(fsspec.filesystem("memory"))
    rm_file, left, deletions = memory.rm_file, 0, 0

    def rm(self: Any, name: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        rm_file(self, name)

    while True:
        with monkeypatch.context() as patch:
            patch.setattr(memory, "rm_file", rm)
            left = deletions
            with contextlib.suppress(KeyboardInterrupt):
                remove_scan(in_memory, scan="a")
        if left > 0:  # it came to its end
            break
        as_place(in_memory.replace(".zarr", ".lock")).unlink(missing_ok=True)  # as if its owner's time were up
        listed = [record.scan_id for record in Cohort.open(in_memory).records] == ["a", "b"]
        if listed:
            with pytest.raises(DataError, match="a: scan is not complete in the store"):
                _ = Cohort.open(in_memory).scan("a").image
        if listed and deletions % 4:
            remove_scan(in_memory, scan="a")
            assert not as_place(f"{in_memory}/a").exists()
        report = ingest(source, in_memory)  # notices what is not whole
        assert (report.added, report.skipped) == (["a"], ["b"])
        check_against_local(source, in_memory, path)
        deletions += 2
    assert deletions > 8
    assert [record.scan_id for record in Cohort.open(in_memory).records] == ["b"]


@pytest.mark.parametrize("killed", ["uploading", "uploaded"])
def test_a_replacement_that_is_cut_off_and_the_old_source_again(
    tmp_path: Path, in_memory: str, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    """The index still has the old scan, the store does not: nothing is left as it is unseen."""
    source, path, image = labelled_source(tmp_path / "s"), tmp_path / "c.zarr", tmp_path / "s/imagesTr/a_0000.nii.gz"
    ingest(source, path)
    ingest(source, in_memory)
    old = image.read_bytes()
    image_file(image, seed=9)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed == "uploading":
            patch.setattr(publish, "upload", stop)
        with pytest.raises(KeyboardInterrupt):
            ingest(source, in_memory, executor=Killed(1))
    image.write_bytes(old)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.nii.gz").write_bytes(old)
    image_file(tmp_path / "plain/z.nii.gz", seed=4)
    ((name, why),) = ingest(tmp_path / "plain", in_memory).failed
    assert (name, why.split(";")[0]) == (
        "a",
        "a: the store no longer holds this scan as the index has it, with a label",
    )
    remove_scan(in_memory, scan="z")
    report = ingest(source, in_memory)
    assert (report.added, report.skipped) == (["a"], ["b"])
    check_against_local(source, in_memory, path)


def test_urls_that_cannot_be_read(tmp_path: Path, in_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"cohort: URL that cannot be read here \(got nosuch://x/c.zarr\)"):
        Cohort.open("nosuch://x/c.zarr")
    with pytest.raises(InputError, match="no cohort there"):
        Cohort.open(in_memory)

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("nobody answers")

    with monkeypatch.context() as patch:
        patch.setattr(type(as_place(in_memory)), "exists", away)
        with pytest.raises(
            InputError, match=r"storage cannot be reached \(got memory:.*ConnectionError: nobody answers"
        ):
            Cohort.open(in_memory)
    told = r"run: not a local path \(got s3://b/run\).*a URL may be cohort=, run= of train, evaluate, predict"
    with pytest.raises(ConfigError, match=told):
        distseg.benchmark(cohort=str(tmp_path), run="s3://b/run")
    with pytest.raises(ConfigError, match=told):
        distseg.tune(cohort=str(tmp_path), run="s3://b/run", space="thresholds")
    with pytest.raises(ConfigError, match=r"output: not a local path \(got s3://b/masks\)"):
        distseg.predict(run="s3://b/run", input=str(tmp_path), output="s3://b/masks")
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(InputError, match=r"URL that cannot be read here.*pip install 'distseg\[remote\]'"):
        Cohort.open(in_memory)


@pytest.fixture(scope="module")
def s3_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of moto's server, in a process of its own; the address and keys are in the environment."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="the extra remote is not installed")
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stdout=file, stderr=file
        )
    with pytest.MonkeyPatch.context() as patch:
        try:
            address = _address(log, server)
            for name, value in {
                "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "k",
                "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1",
            }.items():  # fmt: skip
                patch.setenv(name, value)
            fsspec.filesystem("s3").mkdir("bucket")
            yield "s3://bucket"
        finally:
            server.terminate()
            server.wait()


def _address(log: Path, server: subprocess.Popen[bytes]) -> str:
    """Where the server says that it listens, once it answers."""
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        words = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1:")]
        if words:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{words[0]}/moto-api/") as answer:
                assert answer.status == 200
            return words[0]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_a_cohort_in_s3_is_a_local_one(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_life(tmp_path, f"{s3_bucket}/sub/c.zarr", monkeypatch)


@pytest.mark.slow
def test_the_command_line_trains_from_s3(tmp_path: Path, s3_bucket: str) -> None:
    """ingest, cohort, train and evaluate, each a process of its own with two workers, as users do."""
    source, url = labelled_source(tmp_path / "s", ("a", "b", "c")), f"{s3_bucket}/c.zarr"
    (source / "splits.json").write_text(json.dumps({"train": ["a", "b"], "val": ["c"]}))
    small = [
        "launcher=local", "preset=small", "method=supervised", "train.steps=2", "train.batch_size=1",
        "sampling.patch_zyx=[8,8,8]", "network.base_filters=2", "network.levels=2", "train.validation_patches=2",
        f"cohort={url}", f"run={tmp_path / 'run'}",
    ]  # fmt: skip
    assert distseg_command("ingest", f"source={source}", f"cohort={url}", "resources.workers=2", "launcher=local") == 0
    assert distseg_command("cohort", f"cohort={url}") == 0
    assert distseg_command("train", *small) == 0
    evaluate = ("evaluate", f"run={tmp_path / 'run'}", f"cohort={url}", "split=val", "launcher=local")
    assert distseg_command(*evaluate) == 0
    metrics: dict[str, Any] = json.loads((tmp_path / "run/evaluation/val/metrics.json").read_text())
    assert metrics["scans"] == 1
    assert distseg_command("cohort", "cohort=s3://nobucket/c.zarr") == 2


def distseg_command(*words: str) -> int:
    done = subprocess.run([sys.executable, "-m", "distseg.cli", *words], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    print(words, done.returncode, done.stdout, done.stderr)  # shown where a test fails
    return done.returncode


@pytest.mark.slow
def test_the_doctors_probes_reach_s3(s3_bucket: str) -> None:
    file, nbytes = f"{s3_bucket}/sub/probe/0", 2 * node_probes.PIECE_NBYTES + 5
    assert node_probes.write_probe(file, nbytes, 1).error is None
    assert node_probes.read_probe(file, nbytes, 1).mib_per_s > 0
    assert node_probes.read_probe(file, nbytes, 2).error == "the bytes read are not those written"
    node_probes.remove_probes(f"{s3_bucket}/sub/probe")
    assert not as_place(file).exists()
    assert node_probes.read_probe(file, nbytes, 1).error is not None
    assert node_probes.write_probe("s3://no-such-bucket/probe/0", 1, 1).error is not None
