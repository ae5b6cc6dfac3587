"""Which index fits a table: by its size, where it lies and what is installed; and whether FAISS is installed soundly.

The thresholds are measurements (tests/bench/RESULTS.md, "The reference index").
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from distseg.config.checks import one_of
from distseg.errors import ConfigError

BACKENDS = ("auto", "faiss", "torch")
KINDS = ("auto", "flat", "ivf")
DEVICES = ("auto", "cpu", "cuda")
BACKEND_KEY, KIND_KEY, DEVICE_KEY = "matching.backend", "matching.index", "matching.device"  # what messages name
# Rows from which IVF is worth its 0.5 to 1 % of neighbours missed: exact search then takes 15-25 us a query on a core.
IVF_FROM = 20_000


@dataclass(frozen=True)
class Choice:
    backend: str  # faiss | torch
    kind: str  # flat | ivf
    device: str  # cpu | cuda
    reason: str


def choose(
    count: int, *, backend: str, kind: str, device: str, table_device: str, faiss_gpus: Callable[[], int | None]
) -> Choice:
    """Fill in what was left to "auto" for a table of `count` rows on `table_device`.

    `faiss_gpus` says how many GPUs FAISS sees, None where it is not installed; it is asked only where that matters.
    Raises ConfigError for a combination that does not exist here.
    """
    one_of(BACKEND_KEY, backend, BACKENDS)
    one_of(KIND_KEY, kind, KINDS)
    one_of(DEVICE_KEY, device, DEVICES)
    where, why_there = (device, "as asked") if device != "auto" else (table_device, "where the table is")
    if where == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no GPU for the reference index", value="cuda", fix="set matching.device=cpu")
    if backend == "torch" and kind == "ivf":
        fix = "set matching.index=flat, or matching.backend=faiss"
        raise ConfigError("torch searches exactly", value="matching.index=ivf", fix=fix)
    if backend == "torch":
        return Choice("torch", "flat", where, f"torch as asked, exact; {where} {why_there}")
    if backend == "auto" and kind != "ivf":
        if where == "cuda":
            return Choice("torch", "flat", where, f"exact on the GPU in torch: FAISS on one is unproven; {why_there}")
        if kind == "flat":
            return Choice("torch", "flat", where, "exact as asked; torch's is the faster one on a CPU")
        if count < IVF_FROM:
            return Choice("torch", "flat", where, f"exact: {count} rows are fewer than {IVF_FROM}")
    gpus = faiss_gpus()
    if gpus is None:
        if backend == "auto" and kind == "auto":
            return Choice("torch", "flat", where, f"exact: {count} rows would do with IVF, but FAISS is not installed")
        fix = "pip install 'distseg[cpu]' (or [gpu]), or set matching.backend=torch"
        raise ConfigError("FAISS is not installed", value=f"matching.backend={backend} matching.index={kind}", fix=fix)
    if where == "cuda" and gpus == 0:
        if device == "cuda":
            fix = "install distseg[gpu] in place of distseg[cpu], or set matching.backend=torch"
            raise ConfigError("FAISS sees no GPU here", value="matching.device=cuda", fix=fix)
        where, why_there = "cpu", "for FAISS sees no GPU here"
    kept = kind if kind != "auto" else "ivf" if count >= IVF_FROM else "flat"
    sized = "as asked" if kind != "auto" else f"at {count} rows (IVF from {IVF_FROM})"
    return Choice("faiss", kept, where, f"{kept} {sized}, FAISS on {where} {why_there}")


def faiss_packages() -> tuple[str, ...]:
    """Installed distributions that own the module `faiss`, e.g. ("faiss-cpu",): one at most is sound."""
    names = {re.sub(r"[-_.]+", "-", d.name).lower() for d in importlib.metadata.distributions() if d.name}
    return tuple(sorted(name for name in names if re.fullmatch(r"faiss(-cpu|-gpu)?(-cu\d+.*|-cuvs.*)?", name)))


def check_faiss_packages() -> None:
    """Raises ConfigError where two packages own the module `faiss`: each overwrote files of the other."""
    found = faiss_packages()
    if len(found) > 1:
        raise ConfigError(
            "more than one FAISS is installed",
            value=", ".join(found),
            rule="all of them own the Python module faiss, and pip does not see it",
            fix=f"pip uninstall -y {' '.join(found)}, then install one again; or set matching.backend=torch",
        )


def broken_faiss(why: object) -> ConfigError:
    packages = faiss_packages() or ("faiss-cpu",)
    return ConfigError(
        "FAISS is installed but does not load",
        value=why,
        fix=f"pip install --force-reinstall --no-deps {' '.join(packages)}; or set {BACKEND_KEY}=torch",
    )
