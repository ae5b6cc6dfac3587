"""One file per method: what it asks of student and teacher, and its loss terms (BASELINES, METHOD)."""

from __future__ import annotations

from distseg.config.schema import TrainRunConfig
from distseg.methods.base import Method
from distseg.methods.embedding_matching import EmbeddingMatching
from distseg.methods.mean_teacher import MeanTeacher
from distseg.methods.supervised import Supervised
from distseg.methods.uamt import UncertaintyAwareMeanTeacher


def make_method(config: TrainRunConfig, *, num_classes: int) -> Method:
    """The method that `config.method.name` names (the schema has checked that there is one)."""
    kinds: dict[str, type[Method]] = {
        "supervised": Supervised,
        "mean_teacher": MeanTeacher,
        "uamt": UncertaintyAwareMeanTeacher,
        "embedding_matching": EmbeddingMatching,
    }
    return kinds[config.method.name](config.method, num_classes=num_classes)
