"""What a scan's attributes must be, looked at once as the scan is opened: a store may be damaged, or a stranger's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distseg.data.volume import Geometry, NativeGrid, shape3

# What reading attributes raises where they hold something else than they should.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError)

_FAR_MM = 1e100  # a scanner's nonsense is a scan; what overflows in computing with it is none


def parse_all(attrs: Mapping[str, Any]) -> None:
    """Raises, one way or another, where something that a scan says of itself is no such thing."""
    stored, native = Geometry.from_json(attrs["stored"]), NativeGrid.from_json(attrs["native"])
    for grid in (stored, native):
        if grid.affine.shape != (4, 4) or not (np.abs(grid.affine) < _FAR_MM).all():  # not of NaN either
            raise ValueError(f"affine {grid.affine.tolist()}")
    native.geometry  # noqa: B018  # computes its axes
    for box in (attrs["body_box"], *(entry["box"] for entry in attrs["foreground"].values())):
        start, stop = (shape3(corner) for corner in box)
        if any(a < 0 or b < a for a, b in zip(start, stop, strict=True)):
            raise ValueError(f"box {box}")
    for entry in attrs["foreground"].values():
        int(entry["value"]), int(entry["count"])
    for name, count in attrs.get("files", {}).items():
        str(name), int(count)
    numbers = [float(attrs["intensity"][name]) for name in ("minimum", "nonzero_mean", "nonzero_sd")]
    if not np.isfinite(numbers).all():
        raise ValueError(f"intensity {numbers}")
    str(attrs["modality"]), bool(attrs["labelled"]), bool(attrs["resampled"])
