"""The schema of train: every key, its type, default, unit and rule; the other verbs' is `config.verbs`. YAML and
presets only name values of these.

Sizes and spacings are in Z, Y, X order. `"???"` marks a key the user must give (OmegaConf's MISSING).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distseg.config.checks import at_least, between, one_of, require

MISSING = "???"
METHOD_NAMES = ("supervised", "mean_teacher", "uamt", "cct", "mtc", "dtc", "embedding_matching")
_WITHOUT_TEACHER = ("supervised", "cct", "mtc", "dtc")  # no pass of theirs needs dropout to differ from another
PRESET_NAMES = ("small", "full", "xie2024")
LAUNCHERS = ("ray", "local")


@dataclass
class DataConfig:
    """Which scans train, and on what grid. `labeled_scans`: None takes all there are."""

    spacing_mm: list[float] | None = None  # Z Y X; None: the median spacing of the labelled training scans
    labeled_scans: int | None = None
    labeled_ids: list[str] | None = None  # names the labelled scans outright, instead of a seeded draw
    labeled_patches: int | None = None  # of the labelled scans, patches of a lattice that are labelled; None: all of it
    subset_seed: int = 0
    mirror_pairs: list[list[str]] | None = None  # classes that swap under a left-right flip
    pseudo_labels: str | None = None  # output of distseg label, whose masks of unlabelled training scans train too
    pseudo_confidence: float = 0.25  # their voxels below it, of trust/, are ignored: 0 takes every label, 1 almost none
    pseudo_share: float = 0.5  # of the labelled patches that come from them
    memory_gib: float = 4.0  # training volumes kept in RAM, a worker; the rest is read patch by patch

    def __post_init__(self) -> None:
        if self.spacing_mm is not None:
            require(
                len(self.spacing_mm) == 3 and min(self.spacing_mm) > 0,
                "data.spacing_mm",
                self.spacing_mm,
                "three positive millimetres in Z, Y, X order",
                "set data.spacing_mm=[3,4,4]",
            )
        if self.labeled_scans is not None:
            at_least("data.labeled_scans", self.labeled_scans, 1)
        if self.labeled_patches is not None:
            at_least("data.labeled_patches", self.labeled_patches, 1)
        at_least("data.subset_seed", self.subset_seed, 0)
        between("data.pseudo_confidence", self.pseudo_confidence, 0.0, 1.0)
        between("data.pseudo_share", self.pseudo_share, 0.0, 1.0)
        between("data.memory_gib", self.memory_gib, 0.0, 1e5)


@dataclass
class NetworkConfig:
    """3D U-Net (Cicek 2016) of instance norm; the embedding is its last decoder map, 2 x base_filters wide."""

    base_filters: int = 8
    levels: int = 4
    widening: str = "between"  # within: filters double inside a level (Cicek); between: from level to level
    # Monte-Carlo passes share what comes before dropout. all: after every convolution but the output's (paper);
    # decoder: not in the encoder; last: after the finest decoder level's convolutions alone.
    dropout: str = "all"
    dropout_rate: float = 0.15

    def __post_init__(self) -> None:
        at_least("network.base_filters", self.base_filters, 1)
        between("network.levels", self.levels, 2, 7)
        one_of("network.widening", self.widening, ("within", "between"))
        one_of("network.dropout", self.dropout, ("all", "decoder", "last"))
        between("network.dropout_rate", self.dropout_rate, 0.0, 0.9)


@dataclass
class SamplingConfig:
    """Where patches are placed. The labelled rest beyond `foreground_share` is uniform inside the body."""

    patch_zyx: list[int] = field(default_factory=lambda: [32, 32, 32])
    foreground_share: float = 0.33  # of the labelled patches: three seeds of protocol C against a half (RESULTS.md)
    unlabelled: str = "body"  # body: uniform inside it; doubt: a share where a coarse teacher pass is unsure
    doubt_share: float = 0.5
    doubt_every_steps: int = 100

    def __post_init__(self) -> None:
        require(
            len(self.patch_zyx) == 3 and min(self.patch_zyx) >= 8,
            "sampling.patch_zyx",
            self.patch_zyx,
            "three sizes of at least 8 voxels in Z, Y, X order",
            "set sampling.patch_zyx=[32,32,32]",
        )
        between("sampling.foreground_share", self.foreground_share, 0.0, 1.0)
        one_of("sampling.unlabelled", self.unlabelled, ("body", "doubt"))
        between("sampling.doubt_share", self.doubt_share, 0.0, 1.0)
        at_least("sampling.doubt_every_steps", self.doubt_every_steps, 1)


@dataclass
class AugmentConfig:
    """Augmentation of both halves of a slot. Intensities are z-scored, so sigmas and shifts are in those units."""

    # left_right: the one flip that leaves anatomy anatomy, where no class is lateral; all: each axis with probability
    # 1/2. In short runs none was best by far (tests/bench/RESULTS.md).
    flip: str = "none"
    intensity_scale: float = 0.1  # contrast factor in 1 +- this
    intensity_shift: float = 0.1  # brightness offset in +- this
    student_noise_sigma: float = 0.02

    def __post_init__(self) -> None:
        one_of("augment.flip", self.flip, ("none", "left_right", "all"))
        between("augment.intensity_scale", self.intensity_scale, 0.0, 1.0)
        between("augment.intensity_shift", self.intensity_shift, 0.0, 10.0)
        between("augment.student_noise_sigma", self.student_noise_sigma, 0.0, 10.0)


@dataclass
class OptimizerConfig:
    """Adam. `schedule`: constant, or poly: lr (1 - s/schedule_steps)^0.9, s counting on from the run branched from."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    schedule: str = "poly"
    schedule_steps: int | None = None  # None: to the end of this run; a run to branch from names the whole length

    def __post_init__(self) -> None:
        between("optimizer.lr", self.lr, 1e-8, 10.0)
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            self.betas,
            "two numbers in [0, 1)",
            "set optimizer.betas=[0.9,0.99]",
        )
        one_of("optimizer.schedule", self.schedule, ("constant", "poly"))
        if self.schedule_steps is not None:
            at_least("optimizer.schedule_steps", self.schedule_steps, 1)


@dataclass
class MethodConfig:
    """What turns unlabelled patches into loss terms. A weight is the value its ramp reaches (Eq 1); those of
    `loss_sdf` and `loss_reconstruction` are constant."""

    name: str = "embedding_matching"
    weight_ua: float = 0.25
    weight_nn: float = 0.125
    weight_en: float = 0.125
    weight_consistency: float = 0.1
    weight_sdf: float = 0.3  # of DTC's regression of signed distances on labelled patches
    weight_reconstruction: float = 1.0  # of MTC's, on labelled and unlabelled patches
    consistency_ramp: float = 1.0  # share of the run over which weight_consistency ramps up
    passes: int = 5  # Monte-Carlo dropout passes of the teacher, M
    teacher_noise_sigma: float = 0.01
    teacher_noise_clip: float | None = None  # None: not clipped
    uncertainty: str = "mean_of_entropies"  # Eq 2; entropy_of_mean is UA-MT's
    # paper: [0.75 + ramp(0.25)] ln C; fixed: value x ln C; quantile: of the slot's entropies; per_class: the paper's,
    # but never under the quantile of the entropies of a class's own voxels, so that no class is left without any.
    threshold: str = "paper"
    threshold_value: float = 0.75
    temperature: float = 1.0  # of Eq 4; 1 is the paper's
    entropy_over: str = "unreliable"  # voxels that L_EN is taken over: those that are matched, or all (Eq 4 as written)
    mask_gradient: bool = True  # MTC: gradients reach the segmentation through the masks of the reconstruction's target
    sdf_sharpness: float = 1500.0  # DTC: k of sigmoid(-k z), which turns distances back into a mask
    sdf_truncation_mm: float | None = None  # DTC: None divides by the patch's largest distance (the paper)

    def __post_init__(self) -> None:
        one_of("method", self.name, METHOD_NAMES)
        weights = [key for key in vars(self) if key.startswith("weight_")]
        for key in (*weights, "teacher_noise_sigma"):
            between(f"method.{key}", getattr(self, key), 0.0, 1e3)
        between("method.consistency_ramp", self.consistency_ramp, 0.0, 1.0)
        between("method.sdf_sharpness", self.sdf_sharpness, 1.0, 1e5)
        if self.sdf_truncation_mm is not None:
            between("method.sdf_truncation_mm", self.sdf_truncation_mm, 1e-3, 1e4)
        between("method.passes", self.passes, 1, 64)
        one_of("method.uncertainty", self.uncertainty, ("mean_of_entropies", "entropy_of_mean"))
        one_of("method.threshold", self.threshold, ("paper", "fixed", "quantile", "per_class"))
        one_of("method.entropy_over", self.entropy_over, ("all", "unreliable"))
        between("method.threshold_value", self.threshold_value, 0.0, 1.0)
        between("method.temperature", self.temperature, 1e-3, 1e3)


@dataclass
class MatchingConfig:
    """How unreliable voxels find their references.

    `prototypes`: all references of the slot's own labelled patch at once (the paper). `index`: the `k` nearest of each
    class in a bank over all labelled scans, searched by FAISS or torch; the default, by tests/bench/RESULTS.md.
    """

    kind: str = "index"
    similarity: str = "cosine"  # euclid: 1 / (1 + distance)
    reduction: str = "mean"  # how a class's references speak as one: mean, max, or softmax-weighted mean
    temperature: float = 0.1  # of the softmax-weighted mean
    k: int = 15  # index: nearest references of each class
    vote: str = (
        "score"  # index, the pseudo-label: score: highest class score; majority: of the k nearest of all classes
    )
    queries: int | None = 1000  # index: unreliable voxels a slot that are matched, drawn afresh each step; None: all
    queries_from: str = "student"  # index: whose embeddings give the pseudo-label (the paper: the student's)
    min_similarity: float | None = None  # a voxel less similar than this to every class is not matched
    backend: str = "auto"  # faiss, torch
    index: str = "auto"  # flat: exact; ivf: FAISS's inverted lists, approximate
    device: str = "auto"  # of the index: cpu, cuda; auto: where the network is
    placement: str = "replica"  # where Ray's workers search: a copy in each, one a node, or one for all

    def __post_init__(self) -> None:
        one_of("matching", self.kind, ("prototypes", "index"))
        one_of("matching.similarity", self.similarity, ("cosine", "euclid"))
        one_of("matching.reduction", self.reduction, ("mean", "max", "softmax"))
        between("matching.temperature", self.temperature, 1e-4, 1e3)
        between("matching.k", self.k, 1, 2048)  # FAISS's bound on a GPU
        one_of("matching.vote", self.vote, ("score", "majority"))
        if self.queries is not None:
            at_least("matching.queries", self.queries, 1)
        one_of("matching.queries_from", self.queries_from, ("student", "teacher"))
        if self.min_similarity is not None:
            between("matching.min_similarity", self.min_similarity, -1.0, 1.0)
        one_of("matching.backend", self.backend, ("auto", "faiss", "torch"))
        one_of("matching.index", self.index, ("auto", "flat", "ivf"))
        one_of("matching.device", self.device, ("auto", "cpu", "cuda"))
        one_of("matching.placement", self.placement, ("replica", "per_node", "shared"))


@dataclass
class ReferencesConfig:
    """Where references come from.

    For prototypes: `k` voxels per class a draw, `draws` fresh draws whose similarity maps are averaged (l). For the
    index: `patches` patches of labelled scans, `per_patch` voxels of each, made anew every `every_steps` steps.
    """

    k: int = 16
    draws: int = 5
    # Where the slot's labelled patch shows no surface: scan takes another patch of its scan, none leaves L_NN and L_EN
    # out for the slot (METHOD section 2b).
    without_surface: str = "scan"
    # Of the bank: surface: in bands just inside and outside objects; random: anywhere; doubt: where the teacher is
    # least sure, the way queries arise (METHOD trap 10).
    draw: str = "doubt"
    balanced: bool = True  # as many references of each class of a patch; false: as often as they occur (not surface)
    patches: int = 32  # labelled patches embedded for a version, scans and classes in turn
    per_patch: int = 200
    max_count: int = 50_000  # hard cap on the references of a version: 6.4 MB at E = 32
    every_steps: int = 50
    doubt_passes: int = 0  # Monte-Carlo passes that tell doubt; 0: the entropy of the deterministic pass, far cheaper
    band_inside_mm: float | None = None  # width of the surface bands; None: one voxel (6 neighbours)
    band_outside_mm: float | None = None

    def __post_init__(self) -> None:
        one_of("references.without_surface", self.without_surface, ("scan", "none"))
        one_of("references.draw", self.draw, ("surface", "random", "doubt"))
        for name in ("k", "draws", "patches", "per_patch", "max_count", "every_steps"):
            at_least(f"references.{name}", getattr(self, name), 1)
        require(
            self.max_count >= self.patches,
            "references.max_count",
            self.max_count,
            f"at least references.patches = {self.patches}: each patch gives a reference",
            "raise it, or lower references.patches",
        )
        between("references.doubt_passes", self.doubt_passes, 0, 64)
        for name in ("band_inside_mm", "band_outside_mm"):
            if getattr(self, name) is not None:
                between(f"references.{name}", getattr(self, name), 0.0, 1e3)


@dataclass
class TrainConfig:
    """`batch_size` counts slots over all workers; a slot is one labelled and one unlabelled patch."""

    steps: int = 1000
    batch_size: int = 2
    slots_per_pass: int | None = None  # slots a worker runs as one batch; None: all it has. Fewer take less memory
    init_from: str | None = None  # a run to branch from: student and optimizer copied, teacher := student, step 1
    select: str = "last"  # last: the final checkpoint is the model; val: the best on validation
    validate_every_steps: int | None = None  # None: four looks a run, where there is a val split
    validation_patches: int = 64
    ema_decay: float = 0.99
    # auto: bfloat16 on a GPU that has it, float32 elsewhere. bfloat16 is faster on CPUs with AVX512_BF16 or AMX too;
    # float64 is for tests.
    precision: str = "auto"
    channels_last: bool = False  # maps as channels_last_3d: GPUs' convolutions prefer it
    compile: bool = False  # torch.compile the networks; the first steps take minutes
    activation_checkpointing: bool = False  # GPU only: recompute maps in the backward pass instead of keeping them
    profile: bool = False  # a trace and a table of a few steps in RUN/profile
    diagnostics: bool = False  # open hidden truth of unlabelled scans to measure matched_accuracy; never trains on it
    threads: int | None = None  # torch threads a worker; None: this machine's cores over its workers
    skips_in_a_row: int = 5  # steps in a row: each whose loss or gradient is not finite is skipped and told
    worker_timeout_s: int = 900  # others wait no longer for a worker; longer than compiling or a slow disk take

    def __post_init__(self) -> None:
        at_least("train.steps", self.steps, 1)
        at_least("train.batch_size", self.batch_size, 1)
        one_of("train.select", self.select, ("last", "val"))
        one_of("train.precision", self.precision, ("auto", "float32", "bfloat16", "float64"))
        between("train.ema_decay", self.ema_decay, 0.0, 1.0)
        at_least("train.validation_patches", self.validation_patches, 1)
        at_least("train.skips_in_a_row", self.skips_in_a_row, 1)
        at_least("train.worker_timeout_s", self.worker_timeout_s, 1)
        for name in ("slots_per_pass", "validate_every_steps", "threads"):
            if getattr(self, name) is not None:
                at_least(f"train.{name}", getattr(self, name), 1)


@dataclass
class CheckpointConfig:
    """A checkpoint every so many steps, every so many minutes and at the end; the newest `keep` stay, and the best on
    validation."""

    every_steps: int = 100
    every_minutes: float | None = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        at_least("checkpoint.every_steps", self.every_steps, 1)
        if self.every_minutes is not None:
            between("checkpoint.every_minutes", self.every_minutes, 0.0, 1e5)
        at_least("checkpoint.keep", self.keep, 1)


@dataclass
class ResourcesConfig:
    workers: int = 1
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        at_least("resources.workers", self.workers, 1)
        between("resources.gpus_per_worker", self.gpus_per_worker, 0.0, 1.0)


@dataclass
class LoggingConfig:
    progress: bool = True
    tensorboard: bool = True
    tensorboard_every_steps: int = 10  # of the two below as well
    mlflow: str | None = None  # a tracking server's URI (distseg[mlflow]); its experiment is `distseg`
    wandb: str | None = None  # a project of Weights & Biases (pip install wandb)

    def __post_init__(self) -> None:
        at_least("logging.tensorboard_every_steps", self.tensorboard_every_steps, 1)


@dataclass
class PostprocessConfig:
    """What becomes of the network's masks; part of the model."""

    # auto: of classes that are one piece in the labelled scans the largest component alone; largest: of every class
    components: str = "auto"

    def __post_init__(self) -> None:
        one_of("postprocess.components", self.components, ("auto", "all", "largest"))


@dataclass
class TrainRunConfig:
    """`distseg train`."""

    cohort: str = MISSING
    run: str = MISSING
    preset: str = "small"
    seed: int = 0
    launcher: str = "ray"
    dry_run: bool = False  # train 20 steps elsewhere and say what the run would take; nothing is written to `run`
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    references: ReferencesConfig = field(default_factory=ReferencesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        one_of("preset", self.preset, PRESET_NAMES)
        one_of("launcher", self.launcher, LAUNCHERS)
        at_least("seed", self.seed, 0)
        require(
            self.method.name in _WITHOUT_TEACHER or self.network.dropout_rate > 0,
            "network.dropout_rate",
            self.network.dropout_rate,
            f"above 0 with method={self.method.name}: its teacher's passes differ by dropout",
            "set network.dropout_rate=0.15",
        )
        require(
            not self.train.activation_checkpointing or self.resources.gpus_per_worker > 0,
            "train.activation_checkpointing",
            True,
            "false on a CPU: a recomputed pass would draw other dropout masks than the first",
            "set train.slots_per_pass=1 to save memory on a CPU",
        )
        stride = 2 ** (self.network.levels - 1)
        require(
            all(size % stride == 0 for size in self.sampling.patch_zyx),
            "sampling.patch_zyx",
            self.sampling.patch_zyx,
            f"every size a multiple of 2^(network.levels - 1) = {stride}",
            f"set sampling.patch_zyx to multiples of {stride} or lower network.levels",
        )
        require(
            max(self.sampling.patch_zyx) > stride,
            "sampling.patch_zyx",
            self.sampling.patch_zyx,
            f"larger than {stride} along one axis at least: instance norm needs two voxels at the coarsest level",
            f"set one size to {2 * stride} or lower network.levels",
        )
        require(
            self.resources.workers <= self.train.batch_size,
            "resources.workers",
            self.resources.workers,
            f"at most train.batch_size = {self.train.batch_size}: a worker without a slot would idle",
            "raise train.batch_size or lower resources.workers",
        )
