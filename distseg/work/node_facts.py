"""What the doctor wants to know of one machine, gathered there. Plain data: it crosses Ray's process borders.

Nothing here judges (`doctor_checks` does) or imports Ray.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from distseg import __version__
from distseg.data.arrays import reader_name
from distseg.matching.index_check import FaissReport, faiss_report
from distseg.work.executor import available_cores

AGREE = ("distseg", "python", "torch", "ray", "faiss-cpu", "faiss-gpu", "zarr")  # must be equal on every node
_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
_SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it; Ray's object store lies there


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float


@dataclass(frozen=True)
class Disk:
    """Free and total GiB of the file system under `path`."""

    path: str
    free_gib: float
    total_gib: float

    @classmethod
    def under(cls, path: str | Path) -> Disk:
        usage = shutil.disk_usage(path)
        return cls(str(path), usage.free / _GIB, usage.total / _GIB)


@dataclass(frozen=True)
class NodeFacts:
    """One machine as a worker on it sees it. Packages that are not installed are not in `versions`."""

    node: str
    versions: dict[str, str]
    out_of_range: tuple[str, ...]  # installed versions that pyproject's ranges exclude, and packages that are missing
    cores: int
    cpu_limit: float | None  # cores the container may use up, None: no limit
    memory_gib: float
    gpus: tuple[Gpu, ...]
    torch_cuda: str | None  # CUDA that torch was built for
    has_nvidia_driver: bool
    faiss: FaissReport
    shared_memory: Disk | None
    temporary: Disk
    ray_auth_mode: str | None  # RAY_AUTH_MODE as a worker has it
    reader: str = "zarr"  # of the store's arrays: tensorstore or zarr


def gather_facts(node: str | None = None) -> NodeFacts:
    """Of this machine, by this process; about a second, most of it the import of torch and FAISS."""
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return NodeFacts(
        node=node or socket.gethostname(),
        versions={"python": platform.python_version(), "distseg": __version__, **_versions()},
        out_of_range=_out_of_range(),
        cores=available_cores(),
        cpu_limit=_cpu_limit(_CGROUP),
        memory_gib=_memory_nbytes(_CGROUP) / _GIB,
        gpus=tuple(Gpu(properties.name, properties.total_memory / _GIB) for properties in gpus),
        torch_cuda=torch.version.cuda,
        has_nvidia_driver=Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists(),
        faiss=faiss_report(),
        shared_memory=Disk.under(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None,
        temporary=Disk.under(tempfile.gettempdir()),
        ray_auth_mode=os.environ.get("RAY_AUTH_MODE"),
        reader=reader_name(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in AGREE[2:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _out_of_range() -> tuple[str, ...]:
    """Dependencies of the installed distseg that are missing or outside its ranges; () where it runs from a checkout
    that was never installed."""
    try:
        lines = requires("distseg") or []
    except PackageNotFoundError:
        return ()
    wrong = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if requirement.name != "ray":  # launcher=local does without; the check of versions says so
                wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    return tuple(wrong)


def _cpu_limit(cgroup: Path) -> float | None:
    """Cores by cgroup v2's quota, which `nproc` does not know of."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _memory_nbytes(cgroup: Path) -> int:
    """Of the machine, or of the container where that is less."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
    except OSError:
        return there
    return there if limit == "max" else min(there, int(limit))
