"""The reference index: time and labels of every way to search, on synthetic clusters (real ones: `embeddings`).

Two classes of equal size, k = 5 a class, cosine, one thread. Time is CPU time of the process, the least of `ROUNDS`
interleaved calls, so that what else runs on the machine counts little; microseconds a query. Labels: the class whose
k nearest are the most similar on average; agreement is with exact search.

Keys (R references, E the embedding's width; NAME: prototypes, torch, faiss_flat, faiss_ivf, sklearn):
  index_50k.us_per_query.NAME         50 000 references, E = 32, 2 000 queries
  index_50k.label_agreement.NAME, index_50k.recall.NAME, index_50k.build_s.NAME
  index_50k.replica_bytes.NAME, .serialize_s.NAME, .deserialize_s.NAME
  index.R.E.us_per_query.NAME         the same for other sizes, `.label_agreement`, `.build_s`
  index_50k.queries_N.us_per_query.NAME       N queries a call
  index_threads.NAME.two_over_one     wall time with two threads / with one; 0.5 is ideal, on idle cores
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from distseg.matching.index import build_index, deserialize, serialize
from tests.bench.timing import interleaved

ROUNDS = 3
K, QUERIES = 5, 2_000
SIZES = ((10_000, 32), (50_000, 16), (50_000, 32), (50_000, 64), (200_000, 32), (1_000_000, 16))
LARGE = (10_000_000, 16)
SLOW_FROM = 1_000_000  # references from which exact peers are left out: minutes, and no surprise
BACKENDS = {"torch": ("torch", "flat"), "faiss_flat": ("faiss", "flat"), "faiss_ivf": ("faiss", "ivf")}


@dataclass(frozen=True)
class Problem:
    embeddings: Tensor  # [R, E]
    classes: Tensor  # [R]
    queries: Tensor  # [N, E]


def run(large: bool = False) -> dict[str, float]:
    torch.set_num_threads(1)
    keys: dict[str, float] = {}
    for references, width in (*SIZES, LARGE) if large else SIZES:
        found = _size(references, width)
        keys |= {f"index.{references}.{width}.{key}": value for key, value in found.items()}
        if (references, width) == (50_000, 32):
            keys |= {f"index_50k.{key}": value for key, value in found.items()}
    keys |= _queries_a_call() | _threads()
    return keys


def _problem(references: int, width: int, queries: int) -> Problem:
    """Clusters, each with classes of its own shares, so that labels are a matter of degree."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(200, width, generator=random)
    share = torch.rand(200, generator=random)
    cluster = torch.randint(200, (references + queries,), generator=random)
    points = centres[cluster] + 0.5 * torch.randn(len(cluster), width, generator=random)
    classes = (torch.rand(len(cluster), generator=random) < share[cluster]).long()
    return Problem(points[:references], classes[:references], points[references:])


def _size(references: int, width: int) -> dict[str, float]:
    problem = _problem(references, width, QUERIES)
    names = [name for name in BACKENDS if name == "faiss_ivf" or references < SLOW_FROM]
    keys: dict[str, float] = {}
    searches: dict[str, Callable[[], Tensor]] = {"prototypes": _prototypes(problem)}
    for name in names:
        backend, kind = BACKENDS[name]
        begun = time.process_time()
        index = build_index(problem.embeddings, problem.classes, num_classes=2, backend=backend, kind=kind)
        keys[f"build_s.{name}"] = time.process_time() - begun
        searches[name] = lambda index=index: index.find(problem.queries, K)  # type: ignore[misc]  # mypy infers no default of a lambda
        if references < LARGE[0]:
            keys |= _replica(problem, name, index)
    if references < SLOW_FROM:
        searches["sklearn"] = _sklearn(problem)
    exact = _exact(problem)
    for name, seconds in _cpu_seconds(searches).items():
        keys[f"us_per_query.{name}"] = 1e6 * seconds / QUERIES
    for name in searches:
        found = searches[name]()
        label = found if name == "prototypes" else _label(problem, found)
        keys[f"label_agreement.{name}"] = (label == _label(problem, exact)).float().mean().item()
        if name != "prototypes":
            keys[f"recall.{name}"] = (found[..., :, None] == exact[..., None, :]).any(-1).float().mean().item()
    _print(f"{references} references, E = {width}, {QUERIES} queries", keys, list(searches))
    return keys


def _exact(problem: Problem) -> Tensor:
    return build_index(problem.embeddings, problem.classes, num_classes=2, backend="torch").find(problem.queries, K)


def _replica(problem: Problem, name: str, index: object) -> dict[str, float]:
    begun = time.process_time()
    data = serialize(index)  # type: ignore[arg-type]  # one of ours, seen through a protocol
    packed = time.process_time()
    deserialize(data, problem.embeddings, problem.classes)
    seconds = {"serialize_s": packed - begun, "deserialize_s": time.process_time() - packed}
    return {f"{key}.{name}": value for key, value in seconds.items()} | {f"replica_bytes.{name}": float(len(data))}


def _prototypes(problem: Problem) -> Callable[[], Tensor]:
    """The paper's matching, against the whole bank: labels [N]."""
    unit = functional.normalize(problem.embeddings, dim=1)
    prototypes = torch.stack([unit[problem.classes == c].mean(0) for c in (0, 1)])
    return lambda: (functional.normalize(problem.queries, dim=1) @ prototypes.T).argmax(1)


def _sklearn(problem: Problem) -> Callable[[], Tensor]:
    """What a colleague would write: brute force on unit vectors, a class at a time."""
    unit, queries = (functional.normalize(x, dim=1).numpy() for x in (problem.embeddings, problem.queries))
    rows = [(problem.classes == c).nonzero().flatten() for c in (0, 1)]
    fitted = [NearestNeighbors(n_neighbors=K, algorithm="brute", n_jobs=1).fit(unit[r]) for r in rows]

    def search() -> Tensor:
        with threadpool_limits(1):
            found = [model.kneighbors(queries, return_distance=False) for model in fitted]
        return torch.stack([r[torch.from_numpy(f)] for r, f in zip(rows, found, strict=True)], dim=1)

    return search


def _label(problem: Problem, ids: Tensor) -> Tensor:
    unit, queries = (functional.normalize(x, dim=1) for x in (problem.embeddings, problem.queries))
    return torch.einsum("ne,ncke->nc", queries, unit[ids]).argmax(1)


def _cpu_seconds(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds a call: the least of ROUNDS, in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(ROUNDS + 1):
        for name, function in functions.items():
            begun = time.process_time()
            function()
            if number:
                seconds[name].append(time.process_time() - begun)
    return {name: min(values) for name, values in seconds.items()}


def _queries_a_call() -> dict[str, float]:
    keys = {}
    for queries in (1_000, 10_000, 100_000):
        problem = _problem(50_000, 32, queries)
        searches = {}
        for name in ("torch", "faiss_ivf"):
            backend, kind = BACKENDS[name]
            index = build_index(problem.embeddings, problem.classes, num_classes=2, backend=backend, kind=kind)
            searches[name] = lambda index=index, problem=problem: index.find(problem.queries, K)
        for name, seconds in _cpu_seconds(searches).items():
            keys[f"index_50k.queries_{queries}.us_per_query.{name}"] = 1e6 * seconds / queries
    Console().print({key.removeprefix("index_50k."): round(value, 1) for key, value in keys.items()})
    return keys


def _threads() -> dict[str, float]:
    """Wall time, for CPU time cannot show it; and a matrix product in torch right after a search in FAISS, whose
    OpenMP threads, a pool of their own, spin for a while before they sleep."""
    problem = _problem(50_000, 32, QUERIES)
    index = {
        (name, threads): build_index(
            problem.embeddings, problem.classes, num_classes=2, backend=BACKENDS[name][0], kind=BACKENDS[name][1],
            threads=threads,
        )
        for name in ("torch", "faiss_ivf") for threads in (1, 2)
    }  # fmt: skip
    square = torch.randn(1500, 1500)

    def search(name: str, threads: int, product: bool = False) -> Callable[[], None]:
        def timed() -> None:
            torch.set_num_threads(threads)
            if name:
                index[name, threads].find(problem.queries, K)
            if product:
                torch.mm(square, square)
            torch.set_num_threads(1)

        return timed

    functions = {f"{name} {n}": search(name, n) for name in ("torch", "faiss_ivf") for n in (1, 2)}
    functions |= {f"product {n}": search("", n, True) for n in (1, 2)}
    functions |= {f"faiss_ivf then product {n}": search("faiss_ivf", n, True) for n in (1, 2)}
    seconds = {n: t.minimum for n, t in interleaved(functions, rounds=7, device=torch.device("cpu")).items()}
    keys = {f"index_threads.{name}.two_over_one": seconds[f"{name} 2"] / seconds[f"{name} 1"]
            for name in ("torch", "faiss_ivf", "product", "faiss_ivf then product")}  # fmt: skip
    keys = {key.replace(" ", "_"): value for key, value in keys.items()}
    Console().print({key: round(value, 2) for key, value in keys.items()})
    return keys


def _print(title: str, keys: Mapping[str, float], names: list[str]) -> None:
    table = Table(title=title)
    columns = {
        "us_per_query": "us a query",
        "label_agreement": "labels agree",
        "recall": "recall",
        "build_s": "build s",
        "serialize_s": "to bytes s",
        "deserialize_s": "from bytes s",
        "replica_bytes": "bytes",
    }
    for column in ("", *columns.values()):
        table.add_column(column, justify="left" if not column else "right")
    for name in names:
        values = (keys.get(f"{column}.{name}") for column in columns)
        table.add_row(name, *("" if v is None else f"{v:.0f}" if v > 500 else f"{v:.4g}" for v in values))
    Console(width=100).print(table)
