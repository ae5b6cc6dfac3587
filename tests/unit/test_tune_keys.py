"""What a method is said not to read decides nothing: a run with all of it changed, beside one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distseg.config.compose import NOT_IDENTITY, flatten, to_plain, train_config, with_overrides
from distseg.config.schema import METHOD_NAMES, TrainRunConfig
from distseg.methods import why_unread
from distseg.training.local import train_local
from distseg.training.run import RunDirectory
from tests.unit.test_training import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

# Of every key that some config does not read, a value that is nobody's default.
OTHER: dict[str, Any] = {
    "method.weight_ua": 0.9, "method.weight_nn": 0.8, "method.weight_en": 0.7, "method.weight_consistency": 0.6,
    "method.weight_sdf": 0.5, "method.weight_reconstruction": 0.4, "method.consistency_ramp": 0.3, "method.passes": 3,
    "method.teacher_noise_sigma": 0.3, "method.teacher_noise_clip": 0.4, "method.uncertainty": "entropy_of_mean",
    "method.threshold": "quantile", "method.threshold_value": 0.3, "method.temperature": 0.2,
    "method.entropy_over": "all", "method.mask_gradient": False, "method.sdf_sharpness": 50.0,
    "method.sdf_truncation_mm": 5.0,
    "matching.kind": "prototypes", "matching.similarity": "euclid", "matching.reduction": "max",
    "matching.temperature": 0.7, "matching.k": 2, "matching.vote": "majority", "matching.queries": 7,
    "matching.queries_from": "teacher", "matching.min_similarity": 0.2, "matching.backend": "torch",
    "matching.index": "flat",
    "references.k": 3, "references.draws": 1, "references.without_surface": "none", "references.draw": "random",
    "references.balanced": False, "references.patches": 3, "references.per_patch": 5, "references.max_count": 40,
    "references.every_steps": 2, "references.doubt_passes": 2, "references.band_inside_mm": 6.0,
    "references.band_outside_mm": 7.0,
    "sampling.unlabelled": "doubt", "sampling.doubt_share": 0.9, "sampling.doubt_every_steps": 1,
    "data.pseudo_confidence": 0.9, "data.pseudo_share": 0.9, "optimizer.schedule_steps": 50,
}  # fmt: skip


def unread(config: TrainRunConfig) -> list[str]:
    keys = [key for key, _ in flatten(to_plain(config)) if key not in NOT_IDENTITY]
    return [key for key in keys if why_unread(config, key) is not None]


def metrics(config: TrainRunConfig) -> list[dict[str, Any]]:
    train_local(config)
    rows = RunDirectory(config.run).metrics()
    return [{key: value for key, value in row.items() if not key.startswith("time_")} for row in rows]


@pytest.mark.parametrize(
    ("method", "matching"), [*((m, "index") for m in METHOD_NAMES), ("embedding_matching", "prototypes")]
)
def test_what_a_method_does_not_read_changes_nothing(
    cohort_path: str, tmp_path: Path, method: str, matching: str
) -> None:
    few = {
        "train.steps": 3, "train.validation_patches": 2, "method.threshold": "paper", "optimizer.schedule": "constant",
    }  # fmt: skip
    plain = train_config(
        cohort=cohort_path, run=str(tmp_path / "plain"), method=method, matching=matching, overrides={**TINY, **few}
    )
    keys = unread(plain)
    assert len(keys) >= 15
    before = dict(flatten(to_plain(plain)))
    assert all(before[key] != OTHER[key] for key in keys)
    changed = with_overrides(plain, {"run": str(tmp_path / "changed"), **{key: OTHER[key] for key in keys}})
    rows = metrics(plain)
    assert len(rows) == 3
    assert any(row.get("val_dice") is not None for row in rows)
    assert metrics(changed) == rows
