"""Which FAISS is installed, and whether a search on it finds what a matrix product finds.

`faiss-cpu` and `faiss-gpu` own the same Python module: with both installed the later one has overwritten the other's
files, and removing either breaks the one that stays, which pip does not see. So what pip believes is compared with
what can be imported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from distseg.matching.index import faiss_module

DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11")
_REFERENCES, _QUERIES, _WIDTH, _NEIGHBOURS = 5000, 200, 32, 5


@dataclass(frozen=True)
class FaissReport:
    """`error`: why the module cannot be used, None where it works or is not there."""

    distributions: tuple[str, ...]  # "faiss-cpu 1.15.1", all that own the module
    importable: bool = False
    error: str | None = None
    gpus: int = 0  # that FAISS itself can use
    microseconds_a_query: float | None = None  # exact, 5000 references of width 32, k = 5, this process' threads


def faiss_report() -> FaissReport:
    """Look at the installed distributions, import the module, search once on the CPU."""
    found = tuple(f"{name} {installed}" for name in DISTRIBUTIONS if (installed := _version(name)))
    try:
        faiss = faiss_module()
    except (ImportError, AttributeError, OSError) as error:  # half of a package: missing names, missing libraries
        missing = isinstance(error, ModuleNotFoundError) and error.name == "faiss"
        return FaissReport(found, error=None if missing and not found else f"{type(error).__name__}: {error}")
    try:
        return _searched(faiss, found)
    except (AttributeError, RuntimeError, TypeError) as error:  # an empty folder imports too, as a namespace
        return FaissReport(found, error=f"{type(error).__name__}: {error}")


def _searched(module: Any, found: tuple[str, ...]) -> FaissReport:
    rng = np.random.default_rng(0)
    references = rng.standard_normal((_REFERENCES, _WIDTH)).astype(np.float32)
    queries = rng.standard_normal((_QUERIES, _WIDTH)).astype(np.float32)
    index = module.IndexFlatIP(_WIDTH)
    index.add(references)
    begun = time.perf_counter()
    similarity, _ = index.search(queries, _NEIGHBOURS)
    seconds = time.perf_counter() - begun
    expected = torch.topk(torch.from_numpy(queries @ references.T), _NEIGHBOURS).values.numpy()
    agrees = bool(np.allclose(similarity, expected, rtol=1e-4, atol=1e-4))
    count = getattr(module, "get_num_gpus", None)
    return FaissReport(
        found,
        importable=True,
        error=None if agrees else "its search finds other neighbours than a matrix product",
        gpus=int(count()) if count is not None else 0,
        microseconds_a_query=seconds / _QUERIES * 1e6,
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
