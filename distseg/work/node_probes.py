"""What the doctor tries out on a node: files on the storage, and a sum over a process group."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distseg.data.place import as_place, is_url, os_errors, remove_folder
from distseg.errors import InputError

PIECE_NBYTES = 8 * 2**20  # held in memory; an object's part must have 5 MiB
GROUP_NBYTES = 6 * 2**20  # gradients of preset small, rounded up
GROUP_TIMEOUT_S = 30.0
_REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """Of one transfer; `error` is one line where it could not be done."""

    mib_per_s: float = 0.0
    error: str | None = None


def write_probe(file: str, nbytes: int, seed: int) -> Speed:
    """Write `nbytes` that do not compress to `file`, down to the disk. The folder above the file's must exist; behind
    a URL there are none."""
    return _speed(file, nbytes, lambda place: _write(place, nbytes, seed))


def read_probe(file: str, nbytes: int, seed: int) -> Speed:
    """Read what `write_probe` wrote, here or on another node, and compare it."""
    return _speed(file, nbytes, lambda place: _read(place, nbytes, seed))


def remove_probes(folder: str) -> None:
    """What probes wrote into it, as far as it can be reached."""
    with contextlib.suppress(OSError, InputError):
        place = as_place(folder, key="storage")
        with os_errors():
            remove_folder(place)


def _speed(file: str, nbytes: int, transfer: Callable[[Path], float]) -> Speed:
    try:
        place = as_place(file, key="storage")
        with os_errors():
            return Speed(nbytes / 2**20 / max(transfer(place), 1e-9))
    except OSError as error:
        return Speed(error=error.strerror or str(error))
    except InputError as error:  # a URL that this node lacks the package for
        return Speed(error=str(error))


def _write(place: Path, nbytes: int, seed: int) -> float:
    """Seconds of it, without those that make the content."""
    if not is_url(place):
        if not place.parent.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place.parent.parent} is no folder there")
        place.parent.mkdir(exist_ok=True)
    seconds = 0.0
    with _opened(place, "wb") as out:
        for piece in _pieces(nbytes, seed):
            begun = time.perf_counter()
            out.write(piece)
            seconds += time.perf_counter() - begun
        begun = time.perf_counter()
        if not is_url(place):
            out.flush()
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read next comes from the storage
        out.close()  # sends the last piece of an object
    return seconds + time.perf_counter() - begun


def _read(place: Path, nbytes: int, seed: int) -> float:
    """Seconds of it, without those that compare."""
    seconds = 0.0
    with _opened(place, "rb") as file:
        for piece in _pieces(nbytes, seed):
            begun = time.perf_counter()
            found = file.read(len(piece))
            seconds += time.perf_counter() - begun
            if found != piece:
                raise OSError(errno.EIO, "the bytes read are not those written")
        if file.read(1):
            raise OSError(errno.EIO, "more bytes are read than were written")
    return seconds


def _opened(place: Path, mode: str) -> Any:
    if not is_url(place):
        return place.open(mode)
    store: Any = place
    return store.fs.open(store.path, mode, block_size=PIECE_NBYTES, cache_type="none")  # one request a piece


def _pieces(nbytes: int, seed: int) -> Iterator[bytes]:
    """Random bytes, the same for the same seed; one piece at a time, so that a probe of any size fits the memory."""
    for number, start in enumerate(range(0, nbytes, PIECE_NBYTES)):
        yield np.random.default_rng((seed, number)).bytes(min(PIECE_NBYTES, nbytes - start))


def group_round_trip(rank: int, world_size: int, init_method: str) -> float:
    """Seconds of one all-reduce of `GROUP_NBYTES` over gloo, the fastest of a few. A collective: all ranks must call.

    Raises RuntimeError (torch's, or ours where the sum is wrong) within `GROUP_TIMEOUT_S`.
    """
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    try:
        seconds = []
        for _ in range(_REPEATS):
            tensor = torch.full((GROUP_NBYTES // 4,), float(rank + 1))
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(tensor)
            seconds.append(time.perf_counter() - begun)
            if not bool((tensor == world_size * (world_size + 1) / 2).all()):
                raise RuntimeError("the sum over the process group is wrong")
        return min(seconds)
    finally:
        dist.destroy_process_group()


def local_round_trip() -> float:
    """`group_round_trip` of two processes on this machine, as torchrun would start them."""
    call = (
        "import sys; from distseg.work.node_probes import group_round_trip as sum_up; "
        "print(sum_up(int(sys.argv[1]), 2, sys.argv[2]))"
    )
    with tempfile.TemporaryDirectory(prefix="distseg-doctor-") as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", call, str(rank), f"file://{folder}/store"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            answers = [process.communicate(timeout=4 * GROUP_TIMEOUT_S) for process in processes]
        except subprocess.TimeoutExpired:
            raise RuntimeError("two processes on this machine do not reach each other") from None
        finally:
            for process in processes:
                process.kill()
    for process, (_, said) in zip(processes, answers, strict=True):
        if process.returncode != 0:
            raise RuntimeError(said.strip().splitlines()[-1] if said.strip() else "a process died")
    return max(float(seconds) for seconds, _ in answers)
