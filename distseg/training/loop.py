"""The training loop of one rank: plain torch, given who to talk to. Ray Train and one process run the same loop."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from distseg.config.schema import TrainRunConfig
from distseg.data.arrays import reader_of
from distseg.inference.model import ModelInfo, save_model
from distseg.losses.schedules import threshold_nats
from distseg.methods.base import At
from distseg.networks.ema import make_teacher
from distseg.networks.unet import PASSES
from distseg.training.bank import MakeReferenceService
from distseg.training.bank_folder import LocalReferences
from distseg.training.checkpoint import (
    Checkpoint,
    checkpoint_dir,
    load_checkpoint,
    oldest_step,
    prune_checkpoints,
    save_checkpoint,
)
from distseg.training.checkpoint_timer import CheckpointTimer
from distseg.training.clock import Clock
from distseg.training.log import Reporter, StepLog
from distseg.training.memory import out_of_memory_told
from distseg.training.profile import StepProfiler
from distseg.training.reduce import Communicator
from distseg.training.run import RunDirectory
from distseg.training.setup import Session, start_session
from distseg.training.step import Learner, training_step
from distseg.training.validation import ValidationPatches

# Validations in a run where validate_every_steps is not given: four cost under 5 % of protocol C's time (DESIGN
# section 8); choosing a checkpoint by them wants more.
LOOKS, LOOKS_TO_SELECT = 4, 10


@dataclass(frozen=True)
class TrainResult:
    """`resumed_from`: the step whose checkpoint this went on from, 0 for a fresh start."""

    run: str
    steps: int
    resumed_from: int
    last: dict[str, Any]  # the last line of metrics.jsonl


def train_rank(
    config: TrainRunConfig,
    *,
    communicator: Communicator,
    reporter: Reporter,
    make_service: MakeReferenceService = LocalReferences,
    claim: str | None = None,
) -> TrainResult:
    """Train to the last step on this rank's slots, from the newest checkpoint. A collective: all ranks must call.

    `open_run` has been called by rank 0 or the driver, who holds `claim` where the run lies behind a URL.
    """
    leads = communicator.rank == 0
    with out_of_memory_told():
        session = start_session(config, communicator, make_service, claim)
        if leads:
            session.run.cut_metrics(session.first_step - 1)
            for note in (*session.plan.notes, f"patches are read by {reader_of(config.cohort)}"):
                reporter.note(note)
        if session.first_step <= config.train.steps:
            train_session(session, communicator, reporter)
        if leads:
            _prune(session)  # a run killed between its last checkpoint and this has not
            _write_model(session)
            session.run.push_model()
    communicator.barrier()
    return TrainResult(config.run, config.train.steps, session.first_step - 1, session.run.last_metrics() or {})


def train_session(session: Session, communicator: Communicator, reporter: Reporter) -> None:
    """From the session's first step to the last. A collective: all ranks must call."""
    config, learner, device = session.config, session.learner, session.device
    leads, total = communicator.rank == 0, config.train.steps
    clock = _clock(learner, device)
    log = StepLog(
        session.run,
        method=session.method,
        clock=clock,
        reporter=reporter if leads else None,
        config=config,
        flush_steps=StepLog.GPU_FLUSH_STEPS if device.type == "cuda" else 1,
        first_step=session.first_step,
        scan_ids=session.feed.scan_ids,
    )
    looks = _Looks.of(session, communicator)
    timer = CheckpointTimer(config.checkpoint.every_minutes, communicator, device)
    if session.doubt and config.train.init_from is not None and session.first_step == 1:
        session.doubt.refresh_after(0, learner.teacher, device, session.dtype)
    if session.banks:
        session.banks.start(session.first_step, learner.teacher)
        if leads:
            reporter.note(f"bank: {session.banks.serving(session.first_step).chosen}")
    profiler = StepProfiler(session.run.path / "profile", enabled=config.train.profile and leads)
    with profiler, closing(session.feed.ahead(session.first_step, total)) as batches, closing(log):
        for step in range(session.first_step, total + 1):
            with log.waiting():
                batch = next(batches)
            _set_lr(session, step)
            logged = training_step(
                learner,
                batch.to(device, session.dtype),
                method=session.method,
                at=At(step, total),
                settings=session.settings,
                communicator=communicator,
                clock=clock,
            )
            extra = _refresh_bank(session, step, clock)
            with log.pausing():
                validated = looks.due(step) if looks else {}
                if session.doubt:
                    session.doubt.refresh_after(step, learner.teacher, device, session.dtype)
            log.add(At(step, total), logged, {**extra, **validated})
            with log.pausing():
                profiler.step()
            timed = timer.due(step)
            if timed or step % config.checkpoint.every_steps == 0 or step == total or _to_keep(session, validated):
                log.flush()
                with log.pausing():
                    if session.banks:
                        session.banks.settle(step)
                    if leads:
                        _checkpoint(session, step)
                    communicator.barrier()
                    reporter.checkpoint(step)
                    timer.restart()


def _clock(learner: Learner, device: torch.device) -> Clock:
    """One that tells the passes of each network apart."""
    clock = Clock(device)
    for network in (learner.student, learner.teacher):
        clock.watch(network, *PASSES)
    if learner.heads is not None:
        clock.watch(learner.heads, "forward")
    return clock


def _refresh_bank(session: Session, step: int, clock: Clock) -> dict[str, float]:
    """The age of the bank that served `step`; and the next version, where one is due. All ranks must call."""
    if session.banks is None:
        return {}
    age = step - session.banks.serving(step).step
    with clock.section("bank"):
        session.banks.refresh_after(step, session.learner.teacher)
    return {"bank_age_steps": age, "time_bank_wait_s": session.banks.waited_s()}


def _set_lr(session: Session, step: int) -> None:
    """poly: lr (1 - s / schedule_steps)^0.9, with s steps done before this one, over all runs of the branch."""
    settings = session.config.optimizer
    done = session.schedule_offset + step - 1
    length = settings.schedule_steps or session.schedule_offset + session.config.train.steps
    factor = max(0.0, 1.0 - done / length) ** 0.9 if settings.schedule == "poly" else 1.0
    for group in session.learner.optimizer.param_groups:
        group["lr"] = settings.lr * factor


class _Looks:
    """Validation every so many steps and at the last."""

    def __init__(self, session: Session, patches: ValidationPatches) -> None:
        self._session, self._patches = session, patches
        train = session.config.train
        looks = LOOKS_TO_SELECT if train.select == "val" else LOOKS
        self._every = train.validate_every_steps or max(1, math.ceil(train.steps / looks))

    @classmethod
    def of(cls, session: Session, communicator: Communicator) -> _Looks | None:
        """None where the cohort has no labelled validation scan."""
        if not session.plan.validation:
            return None
        patches = ValidationPatches(
            session.reader,
            scan_ids=session.plan.validation,
            count=session.config.train.validation_patches,
            patch_zyx=session.config.sampling.patch_zyx,
            num_classes=session.plan.num_classes,
            seed=session.config.data.subset_seed,
            communicator=communicator,
        )
        return cls(session, patches)

    def due(self, step: int) -> dict[str, float]:
        """The student's val_dice if a look is due at `step`. A collective: all ranks must call."""
        session = self._session
        if step % self._every and step != session.config.train.steps:
            return {}
        return {"val_dice": self._patches.dice(session.learner.student, session.device, session.dtype)}


def _to_keep(session: Session, validated: dict[str, float]) -> bool:
    """Whether this step may become the model: with select=val every look is checkpointed, the best one spared."""
    return bool(validated) and session.config.train.select == "val"


def _checkpoint(session: Session, step: int) -> None:
    learner = session.learner
    checkpoint = Checkpoint(
        step=step,
        schedule_step=session.schedule_offset + step,
        student=learner.student.state_dict(),
        teacher=learner.teacher.state_dict(),
        optimizer=learner.optimizer.state_dict(),
        heads={} if learner.heads is None else learner.heads.state_dict(),
    )
    session.run.sync_metrics()  # on disk before the checkpoint that follows them
    save_checkpoint(session.run.checkpoints, checkpoint)
    session.run.push_checkpoint(step)
    _prune(session)


def _prune(session: Session) -> None:
    """Remove checkpoints and versions of the bank that nothing will ask for any more. Rank 0 only."""
    best = _best_step(session.run) if session.config.train.select == "val" else None
    spare = {best} if best is not None else set()
    prune_checkpoints(session.run.checkpoints, keep=session.config.checkpoint.keep, spare=spare)
    session.run.push_pruned()
    if session.banks:
        session.banks.prune(oldest_step(session.run.checkpoints))


def _best_step(run: RunDirectory) -> int | None:
    """The first step with the highest val_dice."""
    looks = [row for row in run.metrics() if row.get("val_dice") is not None]
    return int(max(looks, key=lambda row: row["val_dice"])["step"]) if looks else None


def _write_model(session: Session) -> None:
    config, plan = session.config, session.plan
    step = config.train.steps
    if config.train.select == "val":
        step = _best_step(session.run) or step
    chosen = load_checkpoint(checkpoint_dir(session.run.checkpoints, step))
    z, y, x = config.sampling.patch_zyx
    info = ModelInfo(
        class_names=plan.class_names,
        modality=plan.modality,
        spacing_mm=plan.spacing_mm,
        patch_zyx=(z, y, x),
        network=config.network,
        intensity=plan.intensity,
        method=config.method.name,
        threshold_nats=threshold_nats(0, config.train.steps, plan.num_classes),
        step=step,
        checkpoint=config.train.select,
        passes=config.method.passes,
        teacher_noise_sigma=config.method.teacher_noise_sigma,
        teacher_noise_clip=config.method.teacher_noise_clip,
        uncertainty=config.method.uncertainty,
        whole=plan.whole,
    )
    references = None
    if session.references is not None:
        teacher = make_teacher(session.learner.teacher)
        teacher.load_state_dict(chosen.teacher)
        references = session.references.table(teacher, version=step, step=step)
    save_model(
        session.run.model,
        info,
        {"student": chosen.student, "teacher": chosen.teacher},
        references=references,
        matching=config.matching,
    )


def set_threads(config: TrainRunConfig, cores: int) -> None:
    """Torch's threads of this worker: asked for, or its share of the cores. Two workers with two threads each on two
    cores run 1.5 times slower than with one each."""
    torch.set_num_threads(config.train.threads or max(1, cores // config.resources.workers))
