"""The schema of the verbs beside train: every key, its type, default, unit and rule, as in `config.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field

from distseg.config.checks import at_least, at_least_one_of, between, one_of, require
from distseg.config.schema import LAUNCHERS, MISSING, DataConfig, LoggingConfig, ResourcesConfig, TrainRunConfig

# What training measures on validation patches, keys of metrics.jsonl, and whether more of it is better.
OBJECTIVES = {"val_dice": "max"}
EXPORT_FORMATS = ("monai_bundle", "onnx", "torchscript")
MASK_FORMATS = ("nifti", "dicom_seg")
# Short for a key of a section. (A plain `space` would be Hydra's group of that name: conf/space is a folder.)
SHORT_KEYS = {"space": "tune.space"}


@dataclass
class TuneConfig:
    """What a sweep tries and how. A trial is a run of `train.steps` in its own directory."""

    space: str = MISSING  # one of conf/space, or the path of a YAML file; `space=` for short
    trials: int | None = None  # in all, the default among them; None: 16, or every point of a grid
    search: str = "random"  # random; grid: all values of choices; optuna: its TPE, from the extra `tune`
    scheduler: str | None = None  # asha, pbt or none; None: asha with Ray, none without
    runner: str | None = None  # inline, train; None: inline where a trial has one worker
    # Trials at once. None: as many as the cluster has room for as it stands, or 1 with launcher=local. A number is what
    # a cluster that grows is asked for and waited on (DISTSEG_WAIT_FOR_NODES_S); fewer run where it brings fewer.
    concurrent: int | None = None
    objective: str = "val_dice"  # a key of metrics.jsonl, measured on validation patches only
    looks: int = 9  # at the objective, evenly over a trial: with `reduction` 3, ASHA decides after 1/9 and 1/3 of it
    reduction: int = 3  # ASHA lets one in so many go on at each rung
    validation_share: float = 0.05  # of a trial's network passes that looking may take; fewer patches if need be
    warmup_steps: int | None = None  # supervised steps all trials branch from; None: train.steps if the space allows
    default_first: bool = True  # the configuration as it stands is the first trial

    def __post_init__(self) -> None:
        one_of("tune.search", self.search, ("random", "grid", "optuna"))
        if self.scheduler is not None:
            one_of("tune.scheduler", self.scheduler, ("none", "asha", "pbt"))
        if self.runner is not None:
            one_of("tune.runner", self.runner, ("inline", "train"))
        one_of("tune.objective", self.objective, tuple(OBJECTIVES))
        at_least("tune.looks", self.looks, 1)
        at_least("tune.reduction", self.reduction, 2)
        between("tune.validation_share", self.validation_share, 0.001, 1.0)
        for name, least in (("trials", 1), ("concurrent", 1), ("warmup_steps", 0)):
            if getattr(self, name) is not None:
                at_least(f"tune.{name}", getattr(self, name), least)


@dataclass
class TuneRunConfig(TrainRunConfig):
    """`distseg tune`: the configuration every trial starts from, and how to sweep."""

    tune: TuneConfig = field(default_factory=TuneConfig)
    dry_run: bool = False  # say what it would take, and stop


@dataclass
class IngestDataConfig:
    spacing_mm: list[float] | None = None  # Z Y X; None keeps the native spacing
    split: list[float] | None = None  # train, val, test shares, used where the source brings no splits.json
    # TotalSegmentator's masks, or DICOM's segments and ROIs, that become classes 1, 2, ...; []: take no labels.
    structures: list[str] | None = None

    def __post_init__(self) -> None:
        if self.spacing_mm is not None:
            DataConfig(spacing_mm=self.spacing_mm)
        if self.structures is not None:
            names = [name.strip() for name in self.structures]
            require(
                len(set(names)) == len(names) <= 255 and not {"", "background"} & set(names),
                "data.structures",
                self.structures,
                "at most 255 names, each once, without background",
                "set data.structures=[hip_left,hip_right]",
            )
        if self.split is not None:
            require(
                len(self.split) == 3 and min(self.split) >= 0 and abs(sum(self.split) - 1) < 1e-6,
                "data.split",
                self.split,
                "three shares (train, val, test) that sum to 1",
                "set data.split=[.8,.1,.1]",
            )


@dataclass
class IngestConfig:
    """`distseg ingest`."""

    source: str = MISSING
    cohort: str = MISSING
    launcher: str = "ray"
    data: IngestDataConfig = field(default_factory=IngestDataConfig)
    resources: ResourcesConfig = field(default_factory=lambda: ResourcesConfig(workers=2))
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        one_of("launcher", self.launcher, LAUNCHERS)


@dataclass
class CohortConfig:
    """`distseg cohort`."""

    cohort: str = MISSING
    action: str = "list"
    scan: str | None = None  # the scan that action=remove takes out

    def __post_init__(self) -> None:
        one_of("action", self.action, ("list", "remove", "repair"))


@dataclass
class EvaluateConfig:
    """`distseg evaluate`."""

    run: str = MISSING
    cohort: str = MISSING
    split: str = "val"
    name: str | None = None  # folder under RUN/evaluation; None: the split's name
    network: str = "student"  # whose figures are the table's; the other's stand beside
    overlap: float = 0.5  # share of a window that its neighbour covers too
    components: str = "model"  # model: filtered as the run's postprocess.components said; all: as the network has them
    launcher: str = "local"
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        one_of("network", self.network, ("student", "teacher"))
        between("overlap", self.overlap, 0.0, 0.9)
        one_of("launcher", self.launcher, LAUNCHERS)
        one_of("components", self.components, ("model", "all"))


@dataclass
class LabelRuleConfig:
    """How a scan is pseudo-labelled: the teacher where it is sure, matching elsewhere."""

    threshold: float | None = None  # nats of entropy from which a voxel is doubtful; None: the run's at T = 0
    quantile: float | None = None  # in place of it: this quantile of the scan's own entropies
    min_similarity: float | None = None  # a voxel less similar than this to every class is not matched; None: all are
    passes: int | None = None  # of the teacher; None: the run's
    overlap: float = 0.5
    seed: int = 0
    components: str = "model"  # model: filtered as the run's postprocess.components said; all: not filtered

    def __post_init__(self) -> None:
        one_of("label.components", self.components, ("model", "all"))
        if self.threshold is not None:
            between("label.threshold", self.threshold, 0.0, 100.0)
        if self.quantile is not None:
            between("label.quantile", self.quantile, 0.0, 1.0)
            require(
                self.threshold is None,
                "label.threshold",
                self.threshold,
                "null with label.quantile: one rule says which voxels are doubtful",
                "give one of the two",
            )
        if self.min_similarity is not None:
            between("label.min_similarity", self.min_similarity, -1.0, 1.0)
        if self.passes is not None:
            between("label.passes", self.passes, 1, 64)
        between("label.overlap", self.overlap, 0.0, 0.9)
        at_least("label.seed", self.seed, 0)


@dataclass
class LabelSectionConfig(LabelRuleConfig):
    """Which scans, how often a failing one is tried, and how many are shown."""

    only: str = "all"  # unlabelled: leave annotated scans out
    attempts: int = 2
    review_scans: int = 12  # shown in review.html, the ones to distrust first
    next_scans: int = 10  # in next_to_label.csv

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("label.only", self.only, ("all", "unlabelled"))
        for name in ("attempts", "next_scans"):
            at_least(f"label.{name}", getattr(self, name), 1)
        at_least("label.review_scans", self.review_scans, 0)


@dataclass
class LabelConfig:
    """`distseg label`."""

    run: str = MISSING
    cohort: str = MISSING  # a cohort store, or a folder of images that is read directly
    output: str = MISSING
    dry_run: bool = False  # say what it would take, from a measured sample, and write nothing
    launcher: str = "ray"
    label: LabelSectionConfig = field(default_factory=LabelSectionConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        one_of("launcher", self.launcher, LAUNCHERS)


@dataclass
class PredictConfig:
    """`distseg predict`."""

    run: str = MISSING
    input: str = MISSING
    output: str = MISSING
    by: str = "network"  # network: its argmax, as evaluate; label: the teacher's passes and matching, as distseg label
    network: str = "student"  # by=network
    overlap: float = 0.5  # by=network
    components: str = "model"  # by=network; model: filtered as the run's postprocess.components said; all: not filtered
    label: LabelRuleConfig = field(default_factory=LabelRuleConfig)  # by=label
    format: str = "nifti"  # dicom_seg: of DICOM series; names patient and study, as the standard has it (distseg[io])
    launcher: str = "local"
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        one_of("by", self.by, ("network", "label"))
        one_of("format", self.format, MASK_FORMATS)
        one_of("network", self.network, ("student", "teacher"))
        between("overlap", self.overlap, 0.0, 0.9)
        one_of("launcher", self.launcher, LAUNCHERS)
        one_of("components", self.components, ("model", "all"))


@dataclass
class DemoConfig:
    """`distseg demo`."""

    run: str = "distseg-demo"
    scans: int = 16  # training scans
    labelled: int = 4
    validation: int = 4  # labelled scans beside `scans`, held out
    warmup_steps: int = 100
    steps: int = 30
    seed: int = 0
    launcher: str = "ray"
    resources: ResourcesConfig = field(default_factory=lambda: ResourcesConfig(workers=2))
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        one_of("launcher", self.launcher, LAUNCHERS)
        at_least_one_of("labelled", self.labelled, self.scans)
        at_least("validation", self.validation, 1)
        at_least("warmup_steps", self.warmup_steps, 1)
        at_least("steps", self.steps, 1)


@dataclass
class ExportConfig:
    """`distseg export`. `output`: a folder that is new; onnx and torchscript also take a file's name."""

    run: str = MISSING
    output: str = MISSING
    format: str = "monai_bundle"
    network: str = "student"
    overlap: float = 0.5  # of the bundle's windows

    def __post_init__(self) -> None:
        one_of("format", self.format, EXPORT_FORMATS)
        one_of("network", self.network, ("student", "teacher"))
        between("overlap", self.overlap, 0.0, 0.9)


@dataclass
class DoctorConfig:
    """`distseg doctor`. `resources` are those of the job you mean to start: the check is whether they fit."""

    storage: str = "."  # a folder or URL that every node should reach, e.g. the one where cohort and runs lie
    storage_mib: int = 64  # written and read on each node, then removed
    launcher: str = "ray"
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        between("storage_mib", self.storage_mib, 1, 65_536)
        one_of("launcher", self.launcher, LAUNCHERS)


@dataclass
class BenchmarkConfig:
    """`distseg benchmark`. `rows`, `labelled` and `seeds` run and report a part of the suite; None: what it says."""

    cohort: str = MISSING
    run: str = MISSING
    suite: str = "smoke"  # one of conf/suites, or the path of a YAML file
    rows: list[str] | None = None
    labelled: list[str] | None = None
    seeds: list[int] | None = None
    cells_from: str | None = None  # another benchmark's directory: its cells of the same configuration are read there
    side_by_side: int = 2  # cells that run at once, one process each
    launcher: str = "local"
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)  # of one cell
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        at_least("side_by_side", self.side_by_side, 1)
        one_of("launcher", self.launcher, LAUNCHERS)
        require(
            self.resources.workers == 1,
            "resources.workers",
            self.resources.workers,
            "1: a cell is one process",
            "set side_by_side to run more cells at once",
        )
