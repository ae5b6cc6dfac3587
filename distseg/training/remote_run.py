"""A run behind a URL: worked on in a folder of each machine that trains it, and carried there at each checkpoint.

What lies behind the URL is the run; the folder here is a cache of it (DISTSEG_CACHE, else ~/.cache/distseg) that may go
at any time, and does once nothing has trained in it for `KEPT_DAYS`. A start takes what the URL has and forgets what
did not get there, so that all machines go on from the same step and a run whose machine is gone is the undisturbed run
all the same. A checkpoint is there with its state.json, which comes last: after its files, the metrics up to it, and
the versions of the bank and of doubt that its next step asks for. Only the newest are kept, and what goes, goes after.

URL/   as training/run.py draws it, without ray/, profile/ and pseudo/
  owner.json   whose run it is while it trains, see work/url_owner.py
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from distseg.data.carry import (
    OWNER,
    alone,
    files_below,
    get_files,
    get_folder,
    marked,
    put_files,
    put_folder,
    read_file,
    take_out,
    write_file,
)
from distseg.data.place import as_place, is_url
from distseg.errors import DataError, InputError
from distseg.training.checkpoint import list_checkpoints, load_checkpoint
from distseg.training.run import RunDirectory

_MARKER = "state.json"
_RUNS = "runs"
_NAME = re.compile(r"step_\d{7,12}")
_SMALL = ("metrics.jsonl", "trackers.json")
KEPT_DAYS = 30


def run_directory(run: str, claim: str | None = None) -> RunDirectory:
    """The directory of a run on this file system or behind a URL. `claim`: the token of the owner on whose behalf it is
    written to; None where nobody claimed it."""
    return RemoteRun(run, claim) if is_url(run) else RunDirectory(run)


@contextlib.contextmanager
def readable_run(run: str, *, checkpoint: bool = False) -> Iterator[RunDirectory]:
    """A run to read from: the directory itself; of one behind a URL a copy of its configuration and metrics, with
    `checkpoint` of its newest whole checkpoint, which goes away again."""
    if not is_url(run):
        yield RunDirectory(run)
        return
    with tempfile.TemporaryDirectory(prefix="distseg-run-") as folder:
        copy = RemoteRun(run, folder=Path(folder) / "run")
        copy.fetch_metrics()
        if checkpoint:
            copy.fetch(every_checkpoint=False)
        yield copy


def working_folder(url: str) -> Path:
    """Of this machine, for the run at `url`."""
    cache = os.environ.get("DISTSEG_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distseg"
    # With the host's name, as homes are often shared: each machine has what it fetched itself.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{socket.gethostname()}"
    return Path(cache).expanduser().absolute() / _RUNS / name


class RemoteRun(RunDirectory):
    """The folder of this machine, and what it exchanges with the URL. `push_...` is rank 0's; `fetch...` is whoever
    reads a file, from several processes at once too. All wait for a store that is away, see data/carry.py, and raise
    InputError where it stays away."""

    def __init__(self, url: str, claim: str | None = None, *, folder: Path | None = None) -> None:
        super().__init__(folder or working_folder(url))
        self.where = url
        self._place, self._claim = as_place(url, key="run"), claim
        self._carried: dict[str, tuple[int, int]] = {}  # curves: size and time of what is behind the URL

    def behind(self, name: str) -> Path | None:
        return self._place / name

    def newest_step(self) -> int:
        return max((int(name.removeprefix("step_")) for name in self._whole()), default=0)

    def fetch_config(self) -> None:
        with alone(self.path):
            self._fetch_config()

    def fetch_metrics(self) -> None:
        with alone(self.path):
            self._fetch_config()
            self._fetch_small()

    def fetch(self, *, every_checkpoint: bool) -> None:
        _forget_old(self.path)
        with alone(self.path):
            self._fetch_config()
            self._fetch_small()
            self._fetch_doubt()
            self._fetch_checkpoints(every=every_checkpoint)

    def push_checkpoint(self, step: int) -> None:
        self._check_mine()
        put_files(self.path, self._place, [name for name in _SMALL if (self.path / name).exists()])
        there = set(files_below(self._place / "doubt"))
        put_files(self.path / "doubt", self._place / "doubt", [n for n in self._doubt() if n not in there])
        name = f"step_{step:07d}"
        put_folder(self.checkpoints / name, self._place / "checkpoints" / name, marker=_MARKER)
        self._push_curves()

    def push_pruned(self) -> None:
        kept = {folder.name for folder in list_checkpoints(self.checkpoints)}
        there = {name.split("/")[0] for name in files_below(self._place / "checkpoints")}
        for name in sorted(filter(_NAME.fullmatch, there - kept)):
            take_out(self._place / "checkpoints" / name, marker=_MARKER)

    def push_model(self) -> None:
        self._check_mine()
        put_folder(self.model, self._place / "model", marker="model.json")
        self._push_curves()

    def _write_config(self, text: str) -> None:
        # There first: a reader that finds it here and not there takes the folder for one whose run was removed.
        write_file(self._place / "config.yaml", text.encode())
        super()._write_config(text)

    def _check_mine(self) -> None:
        """Raises InputError where another process trains this run by now."""
        if self._claim is None:
            return
        try:
            owner = json.loads(read_file(self._place / OWNER) or b"{}")
        except ValueError:
            owner = {}
        if not isinstance(owner, dict) or owner.get("token") != self._claim:
            found = owner if isinstance(owner, dict) else {}
            raise InputError(
                "another process took this run over while this one did not respond",
                where=self.where,
                value=f"host {found.get('host', 'unknown')}, process {found.get('pid', 'unknown')}",
                fix="let it go on",
            )

    def _whole(self) -> list[str]:
        """Names of the checkpoints behind the URL that have their marker, oldest first."""
        return list(filter(_NAME.fullmatch, marked(files_below(self._place / "checkpoints"), _MARKER)))

    def _fetch_config(self) -> None:
        """A folder of another run, or of one that is not behind the URL any more, is emptied first."""
        there = read_file(self._place / "config.yaml")
        here = self.config_file.read_bytes() if self.config_file.exists() else None
        if there is not None and there == here:
            return
        if self.path.exists():
            shutil.rmtree(self.path)
        if there is not None:
            self.path.mkdir(parents=True)
            _write(self.config_file, there)

    def _fetch_small(self) -> None:
        for name in _SMALL:
            file, there = self.path / name, read_file(self._place / name)
            if there is None:
                file.unlink(missing_ok=True)
            elif not file.exists() or file.read_bytes() != there:
                self.path.mkdir(parents=True, exist_ok=True)
                _write(file, there)

    def _fetch_doubt(self) -> None:
        there, here = set(files_below(self._place / "doubt")), set(self._doubt())
        for name in here - there:
            (self.path / "doubt" / name).unlink()
        get_files(self._place / "doubt", self.path / "doubt", sorted(there - here))

    def _fetch_checkpoints(self, *, every: bool) -> None:
        """The newest that is whole, or all, rank 0's to prune; none stays here that is not there."""
        there = self._whole()
        for folder in list_checkpoints(self.checkpoints):
            marker = folder / _MARKER
            same = folder.name in there and marker.exists()
            if not same or marker.read_bytes() != read_file(self._place / "checkpoints" / folder.name / _MARKER):
                shutil.rmtree(folder)
        for name in reversed(there):
            if (self._has(name) or self._get_checkpoint(name)) and not every:
                return

    def _has(self, name: str) -> bool:
        return (self.checkpoints / name).exists()

    def _get_checkpoint(self, name: str) -> bool:
        """Whether it came whole; one that did not is passed over with a warning, as those on a disk are."""
        place = self._place / "checkpoints" / name
        try:
            get_folder(place, self.checkpoints / name)
            load_checkpoint(self.checkpoints / name)
        except (DataError, FileNotFoundError) as error:
            shutil.rmtree(self.checkpoints / name, ignore_errors=True)
            warnings.warn(f"passing over a damaged checkpoint, {place}: {error}", stacklevel=2)
            return False
        return True

    def _doubt(self) -> list[str]:
        return sorted(file.name for file in (self.path / "doubt").glob("v_*.json"))

    def _push_curves(self) -> None:
        """TensorBoard's files that have grown; each start of a run has its own."""
        files = [file for file in sorted((self.path / "tensorboard").rglob("*")) if file.is_file()]
        state = {str(f.relative_to(self.path)): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}
        put_files(self.path, self._place, [name for name in state if state[name] != self._carried.get(name)])
        self._carried = state


def _forget_old(mine: Path) -> None:
    """Remove the folders beside `mine` that nobody needs."""
    for folder in mine.parent.glob("[!.]*") if mine.parent.name == _RUNS else ():
        if folder != mine and _idle_s(folder) > KEPT_DAYS * 86400:
            with alone(folder):
                if _idle_s(folder) > KEPT_DAYS * 86400:
                    shutil.rmtree(folder, ignore_errors=True)


def _idle_s(folder: Path) -> float:
    """Since it was last trained in, or made; 0 for one that has just gone."""
    times = []
    for path in (folder, folder / "metrics.jsonl"):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times) if times else 0.0


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)
