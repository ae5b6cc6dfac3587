"""Where the body is in a scan: a coarse mask, good enough to place patches, cheap enough for every ingest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from distseg.data.volume import Shape, shape3

CT_BODY_HU = -500.0  # between air (-1000) and fat (-100)
OTHER_BODY_SHARE = 0.1  # of the way from the minimum to the 99th percentile: above the noise of air in MR
COARSE_VOXELS = 96  # an axis longer than this is looked at every second, third ... voxel


@dataclass(frozen=True, eq=False)
class Body:
    """`blocks` int64 [m, 3]: coarse voxels (z, y, x) inside the body; each stands for `stride` voxels of the scan."""

    shape: Shape
    stride: Shape
    blocks: npt.NDArray[np.int64]

    @property
    def box(self) -> tuple[Shape, Shape]:
        """(start, stop) on the scan's grid."""
        start = self.blocks.min(axis=0) * self.stride
        stop = np.minimum((self.blocks.max(axis=0) + 1) * self.stride, self.shape)
        return shape3(start), shape3(stop)

    def draw(self, count: int, random: np.random.Generator) -> npt.NDArray[np.int32]:
        """`count` voxels [count, 3] uniform inside the body, with replacement."""
        blocks = self.blocks[random.integers(len(self.blocks), size=count)]
        voxels = blocks * self.stride + random.integers(np.asarray(self.stride), size=(count, 3))
        inside: npt.NDArray[np.int64] = np.minimum(voxels, np.asarray(self.shape) - 1)
        return inside.astype(np.int32)


def find_body(image: npt.NDArray[Any], *, modality: str) -> Body:
    """The largest connected part of `image` [Z, Y, X] above a threshold, holes of axial slices (lungs, airways) filled.

    Threshold: -500 HU for CT, else a tenth of the way from the minimum to the 99th percentile. A scan with nothing
    above it is body as a whole.
    """
    stride = shape3(-(-n // COARSE_VOXELS) for n in image.shape)
    coarse = image[tuple(slice(None, None, step) for step in stride)]
    if modality == "CT":
        above = coarse > CT_BODY_HU
    else:
        low, high = float(coarse.min()), float(np.percentile(coarse, 99))
        above = coarse > low + OTHER_BODY_SHARE * (high - low)
    if above.any():
        parts, _ = ndimage.label(above)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        inside = parts == int(sizes.argmax())
        inside = np.stack([ndimage.binary_fill_holes(axial) for axial in inside])
    else:
        inside = np.ones(coarse.shape, bool)
    return Body(shape3(image.shape), stride, np.argwhere(inside))
