"""A stand-in for a trained model that finds bone: for tests of what becomes of its masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)


class Bright(torch.nn.Module):
    """Foreground where the image exceeds 4."""

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.cat([4 - x, x - 4], dim=1))


class Hundredth:
    def normalise(self, array: np.ndarray, **_: float) -> np.ndarray:
        return np.asarray(array, np.float32) / 100


def bone_model(_run: str) -> Any:
    return SimpleNamespace(
        networks={"student": Bright()},
        patch_zyx=(4, 8, 8),
        spacing_mm=(3.0, 2.0, 1.5),
        class_names=("background", "bone"),
        intensity=Hundredth(),
        info=SimpleNamespace(whole_values=lambda _components: ()),
    )


def box(seed: int) -> np.ndarray:
    """[slices, rows, columns]: stored values of a bright box."""
    array = np.full((7, 10, 12), 1000, np.uint16)
    array[1 + seed : 5, 2:6, 3:9] = 1800
    return array
