"""Named values of the schema: presets (recipe sizes), methods, matchings. Nothing here is a new key.

`GROUPS[group][choice]` is a nested mapping of TrainRunConfig keys; the command line registers the groups with
Hydra, `compose.train_config` merges the same mappings. Later groups win: method, preset, `ON_GPU`,
`PRESET_METHOD` (what a preset says about one method), matching where it was asked for, then the user's own keys.

`small` and `full` are one recipe at two sizes. `xie2024` is the paper to the letter (METHOD sections 1 and 2b), but for
two things: CT is clipped to percentiles before its z-score (DESIGN section 5), and the last checkpoint is the model,
where the paper tests the one with the lowest validation Hausdorff distance (train.select=val takes the best Dice on
validation patches).
"""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]

# UA-MT and MT add noise 0.1, clipped at 0.2, to the teacher's input only (BASELINES sections 1 and 2).
_MEAN_TEACHER_NOISE: Values = {"teacher_noise_sigma": 0.1, "teacher_noise_clip": 0.2}

METHODS: dict[str, Values] = {
    "supervised": {"method": {"name": "supervised"}},
    "mean_teacher": {"method": {"name": "mean_teacher", "weight_consistency": 0.1, **_MEAN_TEACHER_NOISE}},
    "uamt": {
        "method": {
            "name": "uamt",
            "weight_consistency": 0.1,
            "passes": 8,
            "uncertainty": "entropy_of_mean",
            **_MEAN_TEACHER_NOISE,
        }
    },
    # 30 over the first tenth of the run is for a mean over 21 classes; of two, as many of each voxel's squares weigh
    # 30 x 2 / 21 (BASELINES section 3).
    "cct": {"method": {"name": "cct", "weight_consistency": 3.0, "consistency_ramp": 0.1}},
    "mtc": {"method": {"name": "mtc", "weight_reconstruction": 1.0}},
    "dtc": {"method": {"name": "dtc", "weight_consistency": 1.0, "weight_sdf": 0.3}},
    "embedding_matching": {"method": {"name": "embedding_matching"}},
}

# Prototypes cost one product for all voxels, so L_EN is over all of them, as Eq 4 is written; in a bank each voxel is a
# search, and L_EN is over those that are matched.
MATCHINGS: dict[str, Values] = {
    "prototypes": {"matching": {"kind": "prototypes"}, "method": {"entropy_over": "all"}},
    "index": {"matching": {"kind": "index"}, "method": {"entropy_over": "unreliable"}},
}

PRESETS: dict[str, Values] = {
    "small": {"preset": "small"},
    "full": {
        "preset": "full",
        "network": {"base_filters": 32, "levels": 5},
        "sampling": {"patch_zyx": [96, 96, 96]},
        "train": {"steps": 20_000},
        "checkpoint": {"every_steps": 500},
    },
    "xie2024": {
        "preset": "xie2024",
        "network": {"base_filters": 16, "levels": 4, "widening": "within", "dropout": "all", "dropout_rate": 0.15},
        "sampling": {"patch_zyx": [32, 32, 32], "foreground_share": 0.5, "unlabelled": "body"},
        "augment": {"flip": "none", "intensity_scale": 0.0, "intensity_shift": 0.0, "student_noise_sigma": 0.02},
        "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99], "schedule": "constant"},
        "train": {"batch_size": 2, "ema_decay": 0.99},
        "postprocess": {"components": "all"},
    },
}

PRESET_METHOD: dict[tuple[str, str], Values] = {
    ("xie2024", "embedding_matching"): {
        "matching": {"kind": "prototypes", "similarity": "cosine", "reduction": "mean", "min_similarity": None},
        "references": {
            "k": 16,
            "draws": 5,
            "without_surface": "none",
            "band_inside_mm": None,
            "band_outside_mm": None,
        },
        "method": {
            "weight_ua": 0.25,
            "weight_nn": 0.125,
            "weight_en": 0.125,
            "passes": 5,
            "teacher_noise_sigma": 0.01,
            "teacher_noise_clip": None,
            "uncertainty": "mean_of_entropies",
            "threshold": "paper",
            "temperature": 1.0,
            "entropy_over": "all",
        },
    },
}


# The paper does not state its patch size; ours is 96^3 on a GPU and what a CPU can afford elsewhere (METHOD 2b).
ON_GPU: dict[str, Values] = {"xie2024": {"sampling": {"patch_zyx": [96, 96, 96]}}}


def default_preset(gpus_per_worker: float) -> str:
    """`full` where workers have GPUs, else `small` (DESIGN section 2). The caller prints which one it took."""
    return "full" if gpus_per_worker > 0 else "small"
