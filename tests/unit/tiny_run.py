"""A run directory with a model that was never trained, small enough to label with in a test."""

from __future__ import annotations

from pathlib import Path

import torch

from distseg.config.schema import MatchingConfig, NetworkConfig
from distseg.data.intensity import Intensity
from distseg.inference.model import ModelInfo, build_network, save_model
from distseg.matching.references import ReferenceTable

CLASS_NAMES = ("background", "hip", "femur")
NETWORK = NetworkConfig(base_filters=2, levels=2, dropout_rate=0.3)


def make_run(
    root: Path,
    *,
    matching: bool = True,
    threshold_nats: float = 1.05,
    class_names: tuple[str, ...] = CLASS_NAMES,
    patch_zyx: tuple[int, int, int] = (8, 8, 8),
    spacing_mm: tuple[float, float, float] = (3.0, 2.5, 2.0),
) -> str:
    info = ModelInfo(
        class_names=class_names, modality="CT", spacing_mm=spacing_mm, patch_zyx=patch_zyx, network=NETWORK,
        intensity=Intensity("ct", -200.0, 1000.0, 300.0, 400.0), method="embedding_matching" if matching else "uamt",
        threshold_nats=threshold_nats, step=7, checkpoint="last", passes=2,
    )  # fmt: skip
    torch.manual_seed(3)
    weights = build_network(NETWORK, num_classes=len(class_names)).state_dict()
    table = None
    if matching:
        count = 12 * len(class_names)
        table = ReferenceTable(
            embeddings=torch.randn(count, 4, generator=torch.Generator().manual_seed(1)),
            classes=torch.arange(count) % len(class_names),
            version=7,
            step=7,
            scans=torch.zeros(count, dtype=torch.int64),
            scan_ids=("a",),
        )
    run = root / "run"
    run.mkdir(parents=True, exist_ok=True)
    save_model(
        run / "model", info, {"student": weights, "teacher": weights}, references=table, matching=MatchingConfig()
    )
    return str(run)
