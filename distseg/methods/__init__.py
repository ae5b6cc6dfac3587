"""One file per method: what it asks of student and teacher, and its loss terms (BASELINES, METHOD)."""

from __future__ import annotations

from collections.abc import Callable

from distseg.config.schema import TrainRunConfig
from distseg.matching.bank import Bank
from distseg.methods.bank_matching import BankMatching
from distseg.methods.base import Method
from distseg.methods.embedding_matching import EmbeddingMatching
from distseg.methods.mean_teacher import MeanTeacher
from distseg.methods.supervised import Supervised
from distseg.methods.uamt import UncertaintyAwareMeanTeacher


def uses_bank(config: TrainRunConfig) -> bool:
    return config.method.name == "embedding_matching" and config.matching.kind == "index"


def make_method(config: TrainRunConfig, *, num_classes: int, bank_of: Callable[[int], Bank] | None = None) -> Method:
    """The method that `config.method.name` names (the schema has checked that there is one).

    `bank_of` gives the bank that serves a step; needed where `uses_bank` says so.
    """
    if uses_bank(config):
        assert bank_of is not None, "who trains with a bank gives one"
        return BankMatching(config.method, num_classes=num_classes, matching=config.matching, bank_of=bank_of)
    if config.method.name == "embedding_matching":
        return EmbeddingMatching(
            config.method, num_classes=num_classes, matching=config.matching, draws=config.references.draws
        )
    kinds: dict[str, type[Method]] = {
        "supervised": Supervised,
        "mean_teacher": MeanTeacher,
        "uamt": UncertaintyAwareMeanTeacher,
    }
    return kinds[config.method.name](config.method, num_classes=num_classes)


def passes_a_slot(config: TrainRunConfig) -> float:
    """What a step costs, in forward passes of the network a slot; a backward counts as two."""
    method = make_method(config, num_classes=2, bank_of=_no_bank)
    return 3.0 + (3.0 if method.uses_unlabelled else 0.0) + method.teacher_passes


def _no_bank(_step: int) -> Bank:
    raise AssertionError("a method that is only asked for its cost takes no step")
