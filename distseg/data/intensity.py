"""Intensity normalisation: a property of the run, stored with it and applied to whatever scan it meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CT_PERCENTILES = (0.5, 99.5)
_SMALLEST_SD = 1e-6


@dataclass(frozen=True)
class Intensity:
    """`ct`: clip to [low, high] and z-score by mean and sd, all of the run's labelled training foreground.
    `per_scan`: z-score by the scan's own nonzero voxels (MR and anything else); the four numbers are then unused.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    sd: float = 1.0

    @classmethod
    def of_training_foreground(cls, modality: str, values: Sequence[npt.NDArray[np.float32]]) -> Intensity:
        """From sampled foreground intensities of the labelled training scans, one array per scan."""
        if modality.upper() != "CT":
            return cls("per_scan")
        pooled = np.concatenate([np.asarray(v, np.float64) for v in values])
        low, high = (float(p) for p in np.percentile(pooled, CT_PERCENTILES))
        clipped = np.clip(pooled, low, high)
        return cls("ct", low, high, float(clipped.mean()), max(float(clipped.std()), _SMALLEST_SD))

    def normalise(
        self, array: npt.NDArray[np.generic], *, nonzero_mean: float, nonzero_sd: float
    ) -> npt.NDArray[np.float32]:
        """`array` in the scan's own units -> z-scored float32. The scan's statistics serve `per_scan` alone."""
        values = array.astype(np.float32)
        if self.kind == "ct":
            np.clip(values, self.low, self.high, out=values)
            values -= np.float32(self.mean)
            values /= np.float32(self.sd)
        else:
            values -= np.float32(nonzero_mean)
            values /= np.float32(max(nonzero_sd, _SMALLEST_SD))
        return values
