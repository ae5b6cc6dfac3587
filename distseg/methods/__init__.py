"""One file per method: what it asks of student and teacher, and its loss terms (BASELINES, METHOD).

Here: the method that a config names, what a step of it costs, and which keys decide anything about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

_MATCHES = ("embedding_matching",)
_UNSURE = ("uamt", "embedding_matching")  # whose teacher tells where it is unsure
_CONSISTENT = ("mean_teacher", "uamt", "cct", "dtc")  # whose loss has `weight_consistency`
_NOISY = ("mean_teacher", "uamt", "embedding_matching")  # whose teacher makes stochastic passes
_UNLABELLED = tuple(name for name, kind in KINDS.items() if kind.uses_unlabelled)
# Keys and sections that some methods alone read. All others of a recipe are read by every method.
_READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("matching", "references"), _MATCHES),
    **{f"method.{name}": _MATCHES for name in ("weight_ua", "weight_nn", "weight_en", "temperature", "entropy_over")},
    **{f"method.{name}": _UNSURE for name in ("passes", "uncertainty", "threshold", "threshold_value")},
    **{f"method.{name}": _NOISY for name in ("teacher_noise_sigma", "teacher_noise_clip")},
    **{f"method.{name}": _CONSISTENT for name in ("weight_consistency", "consistency_ramp")},
    **{f"method.{name}": ("dtc",) for name in ("weight_sdf", "sdf_sharpness", "sdf_truncation_mm")},
    **{f"method.{name}": ("mtc",) for name in ("weight_reconstruction", "mask_gradient")},
    **{f"sampling.{name}": _UNLABELLED for name in ("unlabelled", "doubt_share", "doubt_every_steps")},
}
_With = dict[str, tuple[Any, ...]]
_BANK: _With = {"matching.kind": ("index",)}
_PROTOTYPES: _With = {"matching.kind": ("prototypes",)}
# Keys that count only beside these values of others; several conditions must all hold. (The references that a run with
# prototypes leaves beside its model for `label` are a bank's whatever it trained with, and no part of its training.)
_READ_WITH: dict[str, _With] = {
    "method.threshold_value": {"method.threshold": ("fixed", "quantile", "per_class")},
    **{f"sampling.{name}": {"sampling.unlabelled": ("doubt",)} for name in ("doubt_share", "doubt_every_steps")},
    "optimizer.schedule_steps": {"optimizer.schedule": ("poly",)},
    "matching.temperature": {"matching.reduction": ("softmax",)},
    **{f"matching.{name}": _BANK for name in ("k", "vote", "queries", "queries_from", "backend", "index")},
    **{f"references.{name}": _PROTOTYPES for name in ("k", "draws", "without_surface")},
    **{f"references.{name}": _BANK for name in ("draw", "patches", "per_patch", "max_count", "every_steps")},
    "references.doubt_passes": {**_BANK, "references.draw": ("doubt",)},
    "references.balanced": {**_BANK, "references.draw": ("doubt", "random")},
}


def why_unread(config: TrainRunConfig, key: str) -> str | None:
    """Why the dotted `key` decides nothing about the training of this config; None where it does."""
    readers = _READ_BY.get(key, _READ_BY.get(key.partition(".")[0]))
    if readers is not None and config.method.name not in readers:
        return f"method={config.method.name} does not read it"
    for other, values in _READ_WITH.get(key, {}).items():
        if _value(config, other) not in values:
            return f"read with {other}={' or '.join(values)} alone"
    if key.startswith("data.pseudo_") and key != "data.pseudo_labels" and config.data.pseudo_labels is None:
        return "read with data.pseudo_labels alone"
    # The bands of the slot's own patch are always at surfaces; a bank's where it draws there.
    if key.startswith("references.band_") and config.matching.kind == "index" and config.references.draw != "surface":
        return "read with references.draw=surface or matching.kind=prototypes alone"
    return None


def _value(config: TrainRunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


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
