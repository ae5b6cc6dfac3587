"""Everything a run needs before its first step: the plan, the networks, the feed, and where it left off."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distseg.config.schema import TrainRunConfig
from distseg.data.cohort import Cohort
from distseg.data.lattice import LabelledPatches
from distseg.data.patches import PatchReader
from distseg.data.slots import SlotSampler
from distseg.errors import ConfigError
from distseg.methods import make_method, uses_bank
from distseg.methods.base import Method
from distseg.networks.ema import make_teacher
from distseg.training.allocator import keep_large_buffers
from distseg.training.bank import Banks, MakeReferenceService
from distseg.training.bank_builder import ReferenceBuilder
from distseg.training.bank_folder import BankFolder, LocalReferences, ServiceSettings
from distseg.training.branch import parent_plan, where_it_left_off
from distseg.training.compiled import check_compiler, compile_network
from distseg.training.doubt import DoubtCentres
from distseg.training.feed import DistanceMaps, Feed
from distseg.training.optimizer import make_optimizer
from distseg.training.plan import Plan, make_plan
from distseg.training.precision import resolved_precision
from distseg.training.pseudo_labels import open_pseudo_labels
from distseg.training.reduce import Communicator, FlatGradients
from distseg.training.remote_run import run_directory
from distseg.training.run import RunDirectory
from distseg.training.start import new_networks, take_over
from distseg.training.step import Learner, StepSettings
from distseg.training.trackers import require_trackers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}  # of the weights


@dataclass(frozen=True)
class Session:
    """One rank's side of a run."""

    config: TrainRunConfig
    plan: Plan
    run: RunDirectory
    learner: Learner
    method: Method
    reader: PatchReader
    feed: Feed
    doubt: DoubtCentres | None
    banks: Banks | None
    references: ReferenceBuilder | None  # of methods that match
    settings: StepSettings
    device: torch.device
    dtype: torch.dtype
    first_step: int
    schedule_offset: int  # steps of the runs this one branched from


def open_run(config: TrainRunConfig) -> tuple[RunDirectory, Plan]:
    """The run directory of `config`, created or found, and its plan. Rank 0 or the driver only, before any rank starts.

    Raises RunMismatchError if another run lives there, ConfigError or DataError where config and data do not fit.
    """
    run, plan = check_run(config)
    make_directory(run, config, plan)
    return run, plan


def make_directory(run: RunDirectory, config: TrainRunConfig, plan: Plan) -> None:
    """Of what `check_run` returned, where it is not there."""
    if not run.config_file.exists():
        run.create(config, plan)


def check_run(config: TrainRunConfig) -> tuple[RunDirectory, Plan]:
    """What `open_run` would open; writes nothing. Raises as it does."""
    require_trackers(config.logging)
    run = run_directory(config.run)
    run.fetch_config()
    stored = run.stored()
    if stored is not None:
        run.check_same(config, stored)
        return run, stored.plan
    parent = parent_plan(config)
    plan = make_plan(config, Cohort.open(config.cohort), parent=parent)
    make_method(config, num_classes=plan.num_classes)  # refuses what it cannot serve before a directory is made
    return run, plan


def start_session(
    config: TrainRunConfig,
    communicator: Communicator,
    make_service: MakeReferenceService = LocalReferences,
    claim: str | None = None,
) -> Session:
    """Build this rank's side of a run that `open_run` has opened. `make_service`: where a bank's versions come from;
    `claim`: by which a run behind a URL is written to."""
    run = run_directory(config.run, claim)
    run.fetch(every_checkpoint=communicator.rank == 0)
    stored = run.stored()
    if stored is None:
        raise RuntimeError("open_run comes first")  # an invariant of the launchers
    plan = stored.plan
    device = torch.device("cuda", torch.cuda.current_device()) if wants_gpu(config) else torch.device("cpu")
    if device.type == "cpu":
        keep_large_buffers()
    precision = resolved_precision(config.train.precision, device)
    dtype = _DTYPES[precision]
    learner = _new_learner(config, plan, device, dtype)
    first_step, offset = _go_on(config, run, learner)
    if config.train.compile:
        check_compiler(config)
        for network in (learner.student, learner.teacher):
            compile_network(network)
    cohort = Cohort.open(config.cohort)
    reader = PatchReader(
        cohort,
        spacing_mm=plan.spacing_mm,
        intensity=plan.intensity,
        memory_nbytes=int(config.data.memory_gib * 2**30),
    )
    builder = ReferenceBuilder(
        config,
        reader,
        labelled=plan.labelled,
        patches=plan.patches,
        spacing_mm=plan.spacing_mm,
        num_classes=plan.num_classes,
        device=device,
        dtype=dtype,
    )
    banks = (
        _banks(config, plan, run, learner, builder, communicator, make_service, device) if uses_bank(config) else None
    )
    serving = {"bank_of": banks.serving} if banks else {}
    method = make_method(config, num_classes=plan.num_classes, **serving)
    doubt = _doubt(config, plan, run, reader, communicator) if method.uses_unlabelled else None
    return Session(
        config=config,
        plan=plan,
        run=run,
        learner=learner,
        method=method,
        reader=reader,
        feed=_feed(config, plan, cohort, reader, method, communicator, doubt, run),
        doubt=doubt,
        banks=banks,
        references=builder if config.method.name == "embedding_matching" else None,
        settings=_settings(config, device, precision),
        device=device,
        dtype=dtype,
        first_step=first_step,
        schedule_offset=offset,
    )


def _new_learner(config: TrainRunConfig, plan: Plan, device: torch.device, dtype: torch.dtype) -> Learner:
    """Networks, optimizer and gradients of a run at its beginning."""
    method = make_method(config, num_classes=plan.num_classes)
    student, heads = new_networks(config, method, device=device, dtype=dtype)
    optimizer = make_optimizer([*student.parameters(), *(heads.parameters() if heads else ())], config.optimizer)
    teacher = make_teacher(student)
    gradients = FlatGradients(optimizer.param_groups[0]["params"], slots=config.train.batch_size)
    return Learner(student.train(), teacher, optimizer, gradients, heads)


def _go_on(config: TrainRunConfig, run: RunDirectory, learner: Learner) -> tuple[int, int]:
    """Load what there is to go on from; the first step to do, and steps of the schedule that came before step 1."""
    checkpoint, branched = where_it_left_off(config, run)
    if checkpoint is None:
        return 1, 0
    take_over(learner, checkpoint, branched=branched)
    for group in learner.optimizer.param_groups:
        group["betas"] = tuple(config.optimizer.betas)  # this run's, not those of the run it branches from
    if branched:
        return 1, checkpoint.schedule_step
    return checkpoint.step + 1, checkpoint.schedule_step - checkpoint.step


def _banks(
    config: TrainRunConfig,
    plan: Plan,
    run: RunDirectory,
    learner: Learner,
    builder: ReferenceBuilder,
    communicator: Communicator,
    make_service: MakeReferenceService,
    device: torch.device,
) -> Banks:
    asked = ServiceSettings(
        folder=BankFolder(run.path / "bank", config, num_classes=plan.num_classes, behind=run.behind("bank")),
        config=config,
        scan_ids=plan.labelled,
        num_classes=plan.num_classes,
        width=learner.student.embedding_width,
        communicator=communicator,
        device=device,
    )
    return Banks(builder, make_service(asked), every_steps=config.references.every_steps, communicator=communicator)


def _settings(config: TrainRunConfig, device: torch.device, precision: str) -> StepSettings:
    return StepSettings(
        seed=config.seed,
        batch_size=config.train.batch_size,
        slots_per_pass=config.train.slots_per_pass or config.train.batch_size,
        keyed=device.type == "cpu",
        ema_decay=config.train.ema_decay,
        student_noise_sigma=config.augment.student_noise_sigma,
        autocast=torch.bfloat16 if precision == "bfloat16" else None,
    )


def _feed(
    config: TrainRunConfig,
    plan: Plan,
    cohort: Cohort,
    reader: PatchReader,
    method: Method,
    communicator: Communicator,
    doubt: DoubtCentres | None,
    run: RunDirectory,
) -> Feed:
    size = config.sampling.patch_zyx
    sampler = SlotSampler(
        reader,
        labelled=plan.labelled,
        unlabelled=plan.unlabelled,
        patch_zyx=size,
        patches=LabelledPatches(reader, plan.patches, size) if plan.patches else None,
        foreground_share=config.sampling.foreground_share,
        augmentation=plan.augmentation(config),
        seed=config.seed,
        pseudo=open_pseudo_labels(
            config,
            scans=plan.pseudo,
            model=plan.pseudo_model,
            spacing_mm=plan.spacing_mm,
            cohort=cohort,
            reader=reader,
            folder=run.path / "pseudo",
        ),
        pseudo_share=config.data.pseudo_share,
        doubt_share=config.sampling.doubt_share,
        doubt=doubt,
    )
    # A scan whose own voxels are references would be measured against itself.
    annotated = frozenset(r.scan_id for r in cohort.records if r.labelled) - set(plan.labelled)
    return Feed(
        sampler,
        slots=tuple(range(communicator.rank, config.train.batch_size, communicator.world_size)),
        num_classes=plan.num_classes,
        references=config.references if method.needs_references else None,
        spacing_mm=plan.spacing_mm,
        needs_unlabelled=method.uses_unlabelled,
        distances=DistanceMaps(plan.spacing_mm, config.method.sdf_truncation_mm) if method.needs_distances else None,
        truth_of=annotated if config.train.diagnostics else frozenset(),
        pin=config.resources.gpus_per_worker > 0,
    )


def _doubt(
    config: TrainRunConfig, plan: Plan, run: RunDirectory, reader: PatchReader, communicator: Communicator
) -> DoubtCentres | None:
    if config.sampling.unlabelled != "doubt":
        return None
    return DoubtCentres(
        run.path / "doubt",
        reader=reader,
        scan_ids=plan.unlabelled,
        patch_zyx=config.sampling.patch_zyx,
        every_steps=config.sampling.doubt_every_steps,
        seed=config.seed,
        communicator=communicator,
    )


def wants_gpu(config: TrainRunConfig) -> bool:
    """Whether this process trains on a GPU. Raises ConfigError if it should and sees none."""
    if config.resources.gpus_per_worker <= 0:
        return False
    if not torch.cuda.is_available():
        raise ConfigError(
            "this worker sees no GPU",
            where="resources.gpus_per_worker",
            value=config.resources.gpus_per_worker,
            fix="set resources.gpus_per_worker=0, or run where torch.cuda.is_available()",
        )
    return True
