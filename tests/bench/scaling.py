"""A model, not a measurement: what a step of preset `full` moves on 1, 8 and 64 GPUs, from measured constants.

Keys: allreduce_share.GPUS, storage_mib_s.GPUS, index_mib_s.GPUS. Constants that say `assumed` were not measured: no GPU
has run this yet. `distseg doctor` and `dry_run=true` measure theirs on a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from distseg.config.compose import train_config
from distseg.inference.model import build_network

STEP_S = 0.5  # assumed, of two 96^3 patches, `embedding_matching`, M = 5
NETWORK_GB_S = {"25 Gbit/s": 3.1, "200 Gbit/s": 25.0}  # assumed, between nodes of 8 GPUs
PATCH_READ_S = 0.017  # one 96^3 box of the store, one core (64^3 chunks, zstd-3 with bitshuffle)
COMPRESSED_SHARE = 0.38  # of int16, the same measurement
CHUNK, PATCH, PATCHES_A_SLOT = 64, 96, 2
REFERENCE_NBYTES = 4  # a float of the reference table
LOAD_S = 0.015  # of a version's index in a worker (13 MB)
GPUS_A_NODE = 8
GPUS = (1, 8, 64)
MIB = 2**20


@dataclass(frozen=True)
class Load:
    """Of one step, with one slot a GPU."""

    gpus: int
    storage_mib_s: float  # that all workers read together where no volume is kept in RAM
    decode_share: float  # of the step, on the one core that reads ahead
    allreduce_share: dict[str, float]  # of the step, by network; one flat sum, not overlapped with the backward pass
    index_mib_s: float  # of new versions, to all workers
    index_share: float  # of the step that a worker spends on loading them


def load(gpus: int) -> Load:
    config = train_config(cohort="c", run="r", preset="full", overrides={"resources.gpus_per_worker": 1.0})
    network = build_network(config.network, num_classes=2)
    gradient_nbytes = sum(4 * p.numel() for p in network.parameters())
    chunks = (PATCH / CHUNK + 1) ** 3  # that a box at a random place touches, on average
    read_nbytes = PATCHES_A_SLOT * chunks * CHUNK**3 * 2 * COMPRESSED_SHARE
    every = config.references.every_steps
    table_nbytes = config.references.max_count * network.embedding_width * REFERENCE_NBYTES
    nodes = -(-gpus // GPUS_A_NODE)
    rounds = 2 * (nodes - 1) / nodes  # a ring between nodes; inside one it is free beside it
    return Load(
        gpus=gpus,
        storage_mib_s=gpus * read_nbytes / MIB / STEP_S,
        decode_share=PATCHES_A_SLOT * PATCH_READ_S / STEP_S,
        allreduce_share={n: rounds * gradient_nbytes / (speed * 1e9) / STEP_S for n, speed in NETWORK_GB_S.items()},
        index_mib_s=gpus * table_nbytes / MIB / (every * STEP_S),
        index_share=LOAD_S / (every * STEP_S),
    )


def table() -> str:
    """As deploy/guides/scaling.md shows it."""
    names = list(NETWORK_GB_S)
    lines = [
        f"| GPUs | storage, MiB/s | all-reduce, {names[0]} | {names[1]} | index, MiB/s |",
        "|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        found = load(gpus)
        shares = " | ".join(f"{share:.1%}" for share in found.allreduce_share.values())
        lines.append(f"| {gpus} | {found.storage_mib_s:.0f} | {shares} | {found.index_mib_s:.1f} |")
    return "\n".join(lines)


def run() -> dict[str, float]:
    Console().print(table(), markup=False)
    keys: dict[str, float] = {}
    for gpus in GPUS:
        found = load(gpus)
        keys[f"storage_mib_s.{gpus}"] = found.storage_mib_s
        keys[f"index_mib_s.{gpus}"] = found.index_mib_s
        keys[f"allreduce_share.{gpus}"] = max(found.allreduce_share.values())
    return keys
