"""Signed distance maps of a labelled patch, the regression target of DTC (Luo et al., AAAI 2021; BASELINES section 5).

Computed on the patch as it trains, after augmentation, in the thread that cuts patches. Shapes: K classes, Z Y X.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

FloatArray = npt.NDArray[np.float32]
_SIX_NEIGHBOURS = ndimage.generate_binary_structure(3, 1)


def signed_distances(
    label: npt.NDArray[np.integer], num_classes: int, *, spacing_mm: Sequence[float], truncation_mm: float | None = None
) -> FloatArray:
    """float32 [K - 1, Z, Y, X] in [-1, 1], one map a foreground class: negative inside, 0 on its inner boundary.

    Each side is divided by its largest distance in this patch, as published, or clipped at `truncation_mm` and divided
    by it, so that one anatomy has one value in every patch. A class that is not in the patch is +1 everywhere and one
    that fills it -1: the published 0 would put a boundary in every voxel.
    """
    maps = [_of_mask(label == value, spacing_mm, truncation_mm) for value in range(1, num_classes)]
    return np.stack(maps) if maps else np.zeros((0, *label.shape), np.float32)


def _of_mask(mask: npt.NDArray[np.bool_], spacing_mm: Sequence[float], truncation_mm: float | None) -> FloatArray:
    if not mask.any() or mask.all():
        return np.full(mask.shape, -1.0 if mask.any() else 1.0, np.float32)
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    inside = ndimage.distance_transform_edt(mask, sampling=spacing_mm)
    if truncation_mm is None:
        distance = outside / outside.max() - inside / inside.max()
    else:
        distance = np.clip((outside - inside) / truncation_mm, -1.0, 1.0)
    # Beyond the patch nothing is known, so its border makes no boundary.
    distance[mask & ~ndimage.binary_erosion(mask, _SIX_NEIGHBOURS, border_value=1)] = 0.0
    return np.asarray(distance, np.float32)
