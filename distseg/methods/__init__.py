"""One file per method: what it asks of student and teacher, and its loss terms (BASELINES, METHOD)."""

from __future__ import annotations

from distseg.config.schema import TrainRunConfig
from distseg.errors import ConfigError
from distseg.methods.base import Method
from distseg.methods.cct import CrossConsistency
from distseg.methods.dtc import DualTaskConsistency
from distseg.methods.embedding_matching import EmbeddingMatching
from distseg.methods.mean_teacher import MeanTeacher
from distseg.methods.mtc import MultiTaskConsistency
from distseg.methods.supervised import Supervised
from distseg.methods.uamt import UncertaintyAwareMeanTeacher

KINDS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "mean_teacher": MeanTeacher,
    "uamt": UncertaintyAwareMeanTeacher,
    "cct": CrossConsistency,
    "mtc": MultiTaskConsistency,
    "dtc": DualTaskConsistency,
    "embedding_matching": EmbeddingMatching,
}


def make_method(config: TrainRunConfig, *, num_classes: int) -> Method:
    """The method that `config.method.name` names (the schema has checked that there is one).

    Raises ConfigError where it cannot serve so many classes.
    """
    kind = KINDS[config.method.name]
    if kind.max_classes is not None and num_classes > kind.max_classes:
        raise ConfigError(
            "more classes than this method can serve",
            where="method",
            value=config.method.name,
            rule=f"at most {kind.max_classes} with the background, the cohort has {num_classes}",
            fix="choose another method",
        )
    return kind(config.method, num_classes=num_classes)
