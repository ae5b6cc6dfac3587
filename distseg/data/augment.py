"""Augmentation of one patch: flips and a change of brightness and contrast, all drawn from the slot's own generator."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.uint8]
LEFT_RIGHT = 2  # the X axis: canonical volumes run towards the patient's left
_LATERAL = re.compile(r"(^|[^a-z])(left|right|l|r)([^a-z]|$)", re.IGNORECASE)


def lateral_classes(class_names: Sequence[str]) -> list[str]:
    """Class names that contain left or right as a word of their own."""
    return [name for name in class_names if _LATERAL.search(name)]


@dataclass(frozen=True)
class Augmentation:
    """`flip_axes`: axes of [Z, Y, X] that may flip; `swap`: label values exchanged by a left-right flip."""

    flip_axes: tuple[int, ...]
    intensity_scale: float
    intensity_shift: float
    swap: tuple[tuple[int, int], ...] = ()

    def __call__(
        self, image: FloatArray, label: LabelArray | None, generator: np.random.Generator
    ) -> tuple[FloatArray, LabelArray | None]:
        """The draws are the same with and without a label."""
        flips = generator.random(3) < 0.5
        scale = 1.0 + self.intensity_scale * generator.uniform(-1, 1)
        shift = self.intensity_shift * generator.uniform(-1, 1)
        axes = tuple(axis for axis in self.flip_axes if flips[axis])
        image = np.flip(image, axes) * np.float32(scale) + np.float32(shift)
        if label is not None:
            label = np.flip(label, axes)
            if LEFT_RIGHT in axes and self.swap:
                label = _swap(label, self.swap)
        return np.ascontiguousarray(image, dtype=np.float32), None if label is None else np.ascontiguousarray(label)


def _swap(label: LabelArray, pairs: tuple[tuple[int, int], ...]) -> LabelArray:
    table = np.arange(256, dtype=np.uint8)
    for one, other in pairs:
        table[one], table[other] = other, one
    return table[label]
