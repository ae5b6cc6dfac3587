"""`launcher=local`: the loop in this process, or under torchrun in as many as it started. No Ray."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import torch

from distseg.config.schema import TrainRunConfig
from distseg.errors import ConfigError, DistsegError
from distseg.training.compiled import check_compiler
from distseg.training.loop import TrainResult, set_threads, train_rank
from distseg.training.progress import TerminalReporter
from distseg.training.reduce import Communicator, SingleProcess, TorchDistributed
from distseg.training.setup import open_run, wants_gpu

# Holds a run, by its path or URL, while the context lasts; gives the claim by which to write to it.
Claim = Callable[[str], AbstractContextManager[str | None]]


def unclaimed(_run: str) -> AbstractContextManager[str | None]:
    return nullcontext()


def train_local(config: TrainRunConfig, *, claim: Claim = unclaimed) -> TrainResult:
    """Train in this process. Under torchrun (WORLD_SIZE set) the ranks share the slots; all of them call this."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 and config.resources.workers > 1:
        raise ConfigError(
            "launcher=local is one process",
            where="resources.workers",
            value=config.resources.workers,
            fix="set launcher=ray, or start the command under torchrun",
        )
    if world_size > config.train.batch_size:
        raise ConfigError(
            "more processes than slots",
            where="WORLD_SIZE",
            value=world_size,
            rule=f"at most train.batch_size = {config.train.batch_size}",
        )
    wants_gpu(config)  # before anything is written
    check_compiler(config)
    cores = len(os.sched_getaffinity(0))
    set_threads(config, max(1, cores // world_size))
    if world_size == 1:
        return _train(config, SingleProcess(), claim)
    on_gpu = config.resources.gpus_per_worker > 0
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=config.train.worker_timeout_s)
    )
    try:
        return _train(config, TorchDistributed(), claim)
    finally:
        torch.distributed.destroy_process_group()


def _train(config: TrainRunConfig, communicator: Communicator, claim: Claim) -> TrainResult:
    with ExitStack() as held:
        claimed = _open_once(config, communicator, claim, held)
        reporter = TerminalReporter(
            title=Path(config.run).name, enabled=config.logging.progress and communicator.rank == 0
        )
        return train_rank(config, communicator=communicator, reporter=held.enter_context(reporter), claim=claimed)


def _open_once(config: TrainRunConfig, communicator: Communicator, claim: Claim, held: ExitStack) -> str | None:
    """Rank 0 claims and opens the run; where it cannot, it alone says why and all ranks stop. All ranks must call."""
    error: DistsegError | None = None
    claimed = None
    if communicator.rank == 0:
        try:
            claimed = held.enter_context(claim(config.run))
            open_run(config)
        except DistsegError as refused:
            error = refused
    if communicator.world_size > 1:
        exit_codes = [None if error is None else error.exit_code]
        torch.distributed.broadcast_object_list(exit_codes)
        if communicator.rank > 0 and exit_codes[0] is not None:
            raise SystemExit(exit_codes[0])
    if error is not None:
        raise error
    return claimed
