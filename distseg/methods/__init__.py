"""One file per method: what it asks of student and teacher, and its loss terms (BASELINES, METHOD)."""

from __future__ import annotations

from collections.abc import Callable

from distseg.config.schema import TrainRunConfig
from distseg.errors import ConfigError
from distseg.matching.bank import Bank
from distseg.methods.bank_matching import BankMatching
from distseg.methods.base import Method, Passes
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


def uses_bank(config: TrainRunConfig) -> bool:
    return config.method.name == "embedding_matching" and config.matching.kind == "index"


def _no_bank(step: int) -> Bank:
    raise RuntimeError(f"step {step} asks for a bank, and this method was made without")  # an invariant of callers


def make_method(config: TrainRunConfig, *, num_classes: int, bank_of: Callable[[int], Bank] = _no_bank) -> Method:
    """The method that `config.method.name` names (the schema has checked that there is one).

    `bank_of` gives the bank that serves a step; who trains where `uses_bank` says so gives one. Raises ConfigError
    where the method cannot serve so many classes.
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
    if uses_bank(config):
        return BankMatching(config.method, num_classes=num_classes, matching=config.matching, bank_of=bank_of)
    if config.method.name == "embedding_matching":
        return EmbeddingMatching(
            config.method, num_classes=num_classes, matching=config.matching, draws=config.references.draws
        )
    return kind(config.method, num_classes=num_classes)


def passes_per_step(config: TrainRunConfig) -> Passes:
    """What a run costs a slot and step; a bank's embedding passes are spread over the steps it serves."""
    passes = make_method(config, num_classes=2).passes
    if not uses_bank(config):
        return passes
    made = config.references.patches * (1 + config.references.doubt_passes)
    return passes._replace(forward=passes.forward + made / (config.references.every_steps * config.train.batch_size))


def passes_a_slot(config: TrainRunConfig) -> float:
    """What a step costs, in forward passes of the network a slot: a backward counts as two, an auxiliary decoder as
    half a network, both ways."""
    passes = passes_per_step(config)
    return passes.forward + 2.0 * passes.backward + 1.5 * passes.decoders
