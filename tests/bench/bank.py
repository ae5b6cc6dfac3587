"""What the bank costs: its share of a step, its making, and a search elsewhere against one's own copy.

Preset `small` at 32^3, 2 slots, 50 000 references of the student's own embeddings of noise with structure, 2 classes,
1000 queries a slot, one thread. Keys:
  index_50k.share_of_step.BACKEND    time of matching (search, similarities, votes, loss terms) / the whole step
  index_50k.over_prototypes.BACKEND  step with the bank / step with the paper's prototypes
  bank.refresh_over_step             making one version of 32 patches / one step (every references.every_steps steps)
  bank.shared_over_replica.QUERIES   a call to another process on this machine / the same search in this one
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from distseg.config.compose import train_config
from distseg.config.schema import MatchingConfig
from distseg.inference.embed import embed_patches
from distseg.matching.bank import Bank, bank_from_parts, bank_parts, build_bank_index, open_bank
from distseg.matching.references import ReferenceTable
from distseg.methods import make_method
from distseg.methods.base import At
from distseg.training.clock import Clock
from distseg.training.reduce import SingleProcess
from distseg.training.step import training_step
from tests.bench.step_parts import SLOTS, StepBench
from tests.bench.timing import interleaved

REFERENCES, QUERIES = 50_000, (1_000, 5_000, 20_000)
AT = At(1, 1000)  # the threshold is lowest, so that there are queries to fill


def run(rounds: int = 7) -> dict[str, float]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    bench = StepBench("small", torch.device("cpu"))
    keys = _share_of_step(bench, rounds)
    keys |= _round_trips(_bank(bench, "faiss"), rounds)
    Console().print({key: round(value, 3) for key, value in keys.items()})
    return keys


def _bank(bench: StepBench, backend: str) -> Bank:
    config = MatchingConfig(kind="index", backend=backend)
    embeddings = bench.output.embeddings.flatten(2).transpose(1, 2).flatten(0, 1).float()
    rows = torch.randint(len(embeddings), (REFERENCES,), generator=torch.Generator().manual_seed(0))
    jitter = 0.05 * torch.randn(REFERENCES, embeddings.shape[1], generator=torch.Generator().manual_seed(1))
    classes = torch.arange(REFERENCES) % 2
    table = ReferenceTable(0, 0, embeddings[rows] + jitter, classes, torch.zeros_like(classes), ("a",))
    index = build_bank_index(table, config, num_classes=2, seed=0, threads=torch.get_num_threads())
    return open_bank(table, config, num_classes=2, finder=index)


def _share_of_step(bench: StepBench, rounds: int) -> dict[str, float]:
    def step_with(matching: str, bank: Bank | None) -> tuple[Callable[[], object], Clock]:
        clock = Clock(torch.device("cpu"))
        # A threshold that leaves every voxel unsure fills all queries.
        overrides = {"sampling.patch_zyx": [32] * 3, "method.threshold": "fixed", "method.threshold_value": 0.0}
        config = train_config(cohort="-", run="-", matching=matching, overrides=overrides)
        method = make_method(config, num_classes=2, bank_of=lambda _step: bank)
        return lambda: training_step(
            bench.learner, bench.batch, method=method, at=AT, settings=bench.settings, communicator=SingleProcess(),
            clock=clock,
        ), clock  # fmt: skip

    steps = {"prototypes": step_with("prototypes", None)}
    steps |= {backend: step_with("index", _bank(bench, backend)) for backend in ("torch", "faiss")}
    images = torch.randn(4, 1, 32, 32, 32)

    def refresh() -> None:
        for _ in range(8):  # 32 patches
            embed_patches(bench.teacher, images, doubt_passes=0, noise_sigma=0.01, generators=None)

    functions = {name: function for name, (function, _) in steps.items()} | {"refresh": refresh}
    timings = interleaved(functions, rounds=rounds, device=torch.device("cpu"))
    table = Table(title=f"{REFERENCES} references, {SLOTS} x 1000 queries, {torch.get_num_threads()} thread(s)")
    for column in ("step with", "median ms", "min", "max", "matching, mean ms"):
        table.add_column(column)
    keys: dict[str, float] = {}
    for name, timing in timings.items():
        matching_s = steps[name][1].read().get("matching", 0.0) / (rounds + 1) if name in steps else 0.0
        figures = (timing.median, timing.minimum, timing.maximum, matching_s)
        table.add_row(name, *(f"{1e3 * s:.1f}" for s in figures))
        if name in ("torch", "faiss"):
            keys[f"index_50k.share_of_step.{name}"] = matching_s / timing.median
            keys[f"index_50k.over_prototypes.{name}"] = timing.median / timings["prototypes"].median
    keys["bank.refresh_over_step"] = timings["refresh"].median / timings["torch"].median
    Console().print(table)
    return keys


def _round_trips(bank: Bank, rounds: int) -> dict[str, float]:
    """A search by the owner's side of a call, as `placement=shared` makes it, against one's own copy."""
    import ray

    from distseg.distributed.cluster import connect

    class Searcher:
        def __init__(self, reference: list[object]) -> None:
            self._bank = bank_from_parts(ray.get(reference[0]), num_classes=2, device=torch.device("cpu"))

        def find(self, queries: np.ndarray, k: int) -> np.ndarray:
            return self._bank.finder.find(torch.from_numpy(queries.copy()), k).numpy()

    keys = {}
    with connect(workers=1):
        begun = time.perf_counter()
        reference = ray.put(bank_parts(bank))
        actor = ray.remote(Searcher).options(num_cpus=1).remote([reference])
        random = torch.Generator().manual_seed(2)
        for count in QUERIES:
            queries = torch.randn(count, bank.table.embeddings.shape[1], generator=random)
            functions = {
                "own": lambda q=queries: bank.finder.find(q, 15),
                "call": lambda q=queries: ray.get(actor.find.remote(q.numpy(), 15)),
            }
            timings = interleaved(functions, rounds=rounds, device=torch.device("cpu"), now=time.perf_counter)
            keys[f"bank.shared_over_replica.{count}"] = timings["call"].median / timings["own"].median
            keys[f"bank.us_per_query.own.{count}"] = 1e6 * timings["own"].median / count
        print(f"round trips: {time.perf_counter() - begun:.0f} s")
    return keys
