"""`dry_run=true` of a sweep: its steps, bytes and, as far as it is known, hours, before anything runs.

Nothing is trained for it, so memory is not measured, nor is the cluster asked whether the workers fit.
"""

from __future__ import annotations

import math
import statistics

from distseg.config.schema import TrainRunConfig
from distseg.inference.model import build_network
from distseg.methods import passes_a_slot, uses_bank
from distseg.training.remote_run import readable_run
from distseg.work.tune_sweep import Sweep

PBT_SHARE = 0.25  # of a population that may take over another's state at a look: Ray's default
_FLOAT32_NBYTES = 4
_MIB = 2**20


def estimate(sweep: Sweep) -> list[str]:
    """What the whole sweep would take at most, by the default's network and keys."""
    warmup = sweep.warmup.train.steps if sweep.warmup is not None else 0
    total = sweep.trials * sweep.steps
    trained = "distseg train with the same keys and dry_run=true"
    hours = _hours(sweep, total)
    return [
        f"{sweep.trials} trials of {sweep.steps} steps, at most {total} steps, and {warmup} of warm-up",
        _disk(sweep),
        f"time: about {hours:.2f} hours of one worker, by the steps of train.init_from on its machine"
        if hours is not None
        else f"time: not known before a step was timed; train.init_from=RUN would tell, or {trained}",
        f"memory, and whether the workers fit: not looked at here; {trained} tells what a worker takes",
    ]


def _hours(sweep: Sweep, total_steps: int) -> float | None:
    """By the run that trials branch from; None where there is none, or none that was timed."""
    if sweep.base.train.init_from is None or sweep.warmup is not None:
        return None
    with readable_run(sweep.base.train.init_from) as parent:
        stored, rows = parent.stored(), parent.metrics()
    times = [row["time_step_s"] for row in rows if row.get("time_step_s") is not None]
    if stored is None or not times:
        return None
    ratio = passes_a_slot(sweep.base) / passes_a_slot(stored.config)
    return float(statistics.median(times)) * ratio * total_steps / 3600


def _disk(sweep: Sweep) -> str:
    a_trial = run_nbytes(sweep.base)
    warmup = run_nbytes(sweep.warmup) if sweep.warmup is not None else 0
    # Each take-over goes on in a run directory of its own, and what was left stays.
    looks = math.ceil(sweep.steps / sweep.every)
    taken = math.floor(sweep.trials * PBT_SHARE) * (looks - 1) if sweep.settings.scheduler == "pbt" else 0
    total = a_trial * (sweep.trials + 1 + taken) + warmup
    parts = [f"{a_trial / _MIB:.1f} MiB a trial", "as much again for best"]
    parts += [f"{warmup / _MIB:.1f} MiB of warm-up"] if warmup else []
    parts += [f"up to {taken} take-overs of PBT, each a trial's"] if taken else []
    return f"on disk: at most about {total / _MIB:.0f} MiB ({', '.join(parts)})"


def run_nbytes(config: TrainRunConfig) -> int:
    """Of a run directory at its fullest: kept checkpoints and one being written (student, teacher and Adam's two
    moments), the model (two networks) and the bank's versions. Metrics and TensorBoard are small beside them."""
    network = build_network(config.network, num_classes=2)
    checkpoints = config.checkpoint.keep + 1 + (config.train.select == "val")
    weights = sum(p.numel() for p in network.parameters()) * _FLOAT32_NBYTES
    nbytes = weights * (4 * checkpoints + 2)
    if uses_bank(config):
        c = config.references
        steps = min(config.checkpoint.keep * config.checkpoint.every_steps, config.train.steps)
        versions = math.ceil(steps / c.every_steps) + 2  # those that a kept checkpoint may go on with, and the model's
        vectors = min(c.patches * c.per_patch, c.max_count) * network.embedding_width
        nbytes += 2 * versions * vectors * _FLOAT32_NBYTES  # in the table and in its index
    return nbytes
