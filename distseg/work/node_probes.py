"""What the doctor tries out on a node: files on the storage, and a sum over a process group."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

_PIECE_NBYTES = 2**20
GROUP_NBYTES = 6 * 2**20  # gradients of preset small, rounded up
GROUP_TIMEOUT_S = 30.0
_REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """Of one transfer; `error` is one line where it could not be done."""

    mib_per_s: float = 0.0
    error: str | None = None


def write_probe(file: str, nbytes: int, seed: int) -> Speed:
    """Write `nbytes` that do not compress to `file`, down to the disk. The folder above the file's must exist."""
    data = _content(nbytes, seed)
    try:
        if not Path(file).parent.parent.is_dir():
            return Speed(error=f"{Path(file).parent.parent} is no folder there")
        Path(file).parent.mkdir(exist_ok=True)
        begun = time.perf_counter()
        with open(file, "wb") as out:
            for start in range(0, nbytes, _PIECE_NBYTES):
                out.write(data[start : start + _PIECE_NBYTES])
            out.flush()
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read next comes from the storage
        return Speed(nbytes / 2**20 / (time.perf_counter() - begun))
    except OSError as error:
        return Speed(error=error.strerror or str(error))


def read_probe(file: str, nbytes: int, seed: int) -> Speed:
    """Read what `write_probe` wrote, here or on another node, and compare it."""
    begun = time.perf_counter()
    try:
        found = Path(file).read_bytes()
    except OSError as error:
        return Speed(error=error.strerror or str(error))
    seconds = time.perf_counter() - begun
    if hashlib.sha256(found).digest() != hashlib.sha256(_content(nbytes, seed)).digest():
        return Speed(error="the bytes read are not those written")
    return Speed(nbytes / 2**20 / seconds)


def _content(nbytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


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
