"""A volume and where its voxels are: native grid, canonical grid, resampling between spacings.

Every array inside distseg is [Z, Y, X]: axes permuted and flipped (never interpolated) so that x runs to the Left, y to
the Posterior, z to the Superior as nearly as the native axes allow. What is left of an oblique rotation stays in the
affine. `spacing_mm` is (z, y, x); world coordinates are LPS+ millimetres in the order x, y, z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distseg.errors import InputError

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]
Affine = npt.NDArray[np.float64]

# An axis counts as unchanged if its far end would move by less than this share of a voxel: 3.906 mm stored as float32
# is 3.9059999 mm, and that is no reason to interpolate.
SAME_GRID_VOXELS = 0.01


class ArrayLike3D(Protocol):
    """What `resample_box` reads from: a numpy or a zarr array [Z, Y, X]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, selection: Any, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Geometry:
    """A canonical grid. `affine` maps a voxel (z, y, x, 1) to LPS+ millimetres (x, y, z, 1)."""

    shape: Shape
    spacing_mm: Spacing
    affine: Affine

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "spacing_mm": list(self.spacing_mm), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Geometry:
        return cls(shape3(data["shape"]), spacing3(data["spacing_mm"]), np.asarray(data["affine"], np.float64))


@dataclass(frozen=True, eq=False)
class NativeGrid:
    """The grid of the file: `shape` in the file's axis order, `affine` maps a voxel (i, j, k, 1) to RAS+ millimetres.

    `permutation[c]` is the native axis that becomes canonical axis c (0 = Z, 1 = Y, 2 = X); `flips[c]` says whether it
    is reversed on the way. Both follow from the affine, so only shape and affine are ever stored.
    """

    shape: Shape
    affine: Affine

    @cached_property
    def _orientation(self) -> tuple[Shape, tuple[bool, bool, bool]]:
        # One row per native axis: (nearest world axis x=0, y=1, z=2; its direction in RAS+).
        rows = nib.orientations.io_orientation(self.affine)  # type: ignore[no-untyped-call]  # nibabel has no hints
        native_of_world = {int(world): native for native, (world, _) in enumerate(rows)}
        permutation = shape3(native_of_world[world] for world in (2, 1, 0))
        points_to = np.array([-1.0, -1.0, 1.0])  # LPS+ seen from RAS+, per world axis x, y, z
        flips = tuple(bool(rows[native][1] != points_to[2 - c]) for c, native in enumerate(permutation))
        return permutation, (flips[0], flips[1], flips[2])

    @property
    def permutation(self) -> Shape:
        return self._orientation[0]

    @property
    def flips(self) -> tuple[bool, bool, bool]:
        return self._orientation[1]

    @cached_property
    def geometry(self) -> Geometry:
        """The canonical grid at the file's own spacing."""
        to_native = np.zeros((4, 4))  # canonical (z, y, x, 1) -> native (i, j, k, 1)
        to_native[3, 3] = 1.0
        for c, (native, flip) in enumerate(zip(self.permutation, self.flips, strict=True)):
            to_native[native, c] = -1.0 if flip else 1.0
            to_native[native, 3] = self.shape[native] - 1 if flip else 0.0
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine @ to_native
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        return Geometry(shape3(self.shape[native] for native in self.permutation), spacing3(spacing), affine)

    def canonical_view(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Native axis order (the volume, or a slab of it) seen as [Z, Y, X]: writing to the view writes to `array`."""
        return np.flip(np.transpose(array, self.permutation), self._flipped_axes)

    def native_view(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`canonical_view` undone: [Z, Y, X] seen in native axis order."""
        return np.transpose(np.flip(array, self._flipped_axes), np.argsort(self.permutation))

    def to_canonical(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Native axis order -> [Z, Y, X], contiguous."""
        self.expect(array, self.shape, "native")
        return np.ascontiguousarray(self.canonical_view(array))

    def from_canonical(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[Z, Y, X] at native spacing -> native axis order, contiguous."""
        self.expect(array, self.geometry.shape, "canonical")
        return np.ascontiguousarray(self.native_view(array))

    @property
    def _flipped_axes(self) -> tuple[int, ...]:
        return tuple(c for c, flip in enumerate(self.flips) if flip)

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "spacing_mm": np.linalg.norm(self.affine[:3, :3], axis=0).tolist(),
            "affine": self.affine.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NativeGrid:
        return cls(shape3(data["shape"]), np.asarray(data["affine"], np.float64))

    @staticmethod
    def expect(array: npt.NDArray[Any], shape: Shape, kind: str) -> None:
        if array.shape != shape:
            raise InputError("array does not fit the grid", value=array.shape, rule=f"the {kind} shape is {shape}")


@dataclass(frozen=True, eq=False)
class Volume:
    """`array` [Z, Y, X] in canonical axes at native spacing; `modality` is "CT" or another name ("unknown")."""

    array: npt.NDArray[Any]
    geometry: Geometry
    native: NativeGrid
    modality: str


def shape3(values: Any) -> Shape:
    z, y, x = (int(value) for value in values)
    return z, y, x


def spacing3(values: Any) -> Spacing:
    z, y, x = (float(value) for value in values)
    return z, y, x


def target_geometry(geometry: Geometry, spacing_mm: Sequence[float]) -> Geometry:
    """The grid at another spacing whose first voxel EDGES coincide with `geometry`'s.

    shape_new = max(1, round(n old / new)); source coordinate = (target + 0.5) new / old - 0.5, per axis.
    """
    ratio = np.asarray(spacing_mm, np.float64) / np.asarray(geometry.spacing_mm)  # [3] z, y, x
    affine = geometry.affine.copy()
    affine[:3, 3] += geometry.affine[:3, :3] @ (0.5 * ratio - 0.5)
    affine[:3, :3] *= ratio
    shape = shape3(_target_size(n, r) for n, r in zip(geometry.shape, ratio, strict=True))
    return Geometry(shape, spacing3(spacing_mm), affine)


def resample_box(
    source: ArrayLike3D,
    *,
    source_spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    start_zyx: Sequence[int],
    size_zyx: Sequence[int],
    order: int,
    fill: float,
) -> npt.NDArray[Any]:
    """A box [size] of the TARGET grid (`target_geometry`), reading only the source region it needs.

    order 1 is separable linear interpolation, the edge voxel held within the extent, result float32; order 0 is nearest
    neighbour, result in the source's dtype. What lies outside the target grid is `fill`. Where the spacings are equal
    the box is a plain read. A box equals the same crop of the whole volume bit for bit: each voxel's value depends on
    its own index alone.
    """
    if order not in (0, 1):
        raise InputError("unknown interpolation", where="order", value=order, rule="0 (nearest) or 1 (linear)")
    result_type = np.dtype(np.float32) if order == 1 else np.dtype(source.dtype)
    box = np.full(shape3(size_zyx), fill, result_type)
    axes = [
        _axis_taps(n, old=float(old), new=float(new), start=int(start), size=int(size), order=order)
        for n, old, new, start, size in zip(
            source.shape, source_spacing_mm, target_spacing_mm, start_zyx, size_zyx, strict=True
        )
    ]
    if any(len(axis.low) == 0 for axis in axes):
        return box
    region = np.asarray(source[tuple(slice(int(axis.low[0]), int(axis.high[-1]) + 1) for axis in axes)])
    for dimension, axis in enumerate(axes):
        region = axis.apply(region, dimension)
    box[tuple(axis.inside for axis in axes)] = region
    return box


@dataclass(frozen=True)
class _AxisTaps:
    """One axis of a box: the part of the box inside the grid, its two source voxels each, the weight of the second."""

    inside: slice
    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32] | None  # None: the low voxel alone

    def apply(self, region: npt.NDArray[Any], dimension: int) -> npt.NDArray[Any]:
        first = int(self.low[0])
        if self.weight is None:
            contiguous = len(self.low) == int(self.low[-1]) - first + 1
            return region if contiguous else region.take(self.low - first, axis=dimension)
        weight = self.weight.reshape([-1 if d == dimension else 1 for d in range(3)])
        low = region.take(self.low - first, axis=dimension).astype(np.float32, copy=False)
        high = region.take(self.high - first, axis=dimension).astype(np.float32, copy=False)
        return low + (high - low) * weight


def _axis_taps(n: int, *, old: float, new: float, start: int, size: int, order: int) -> _AxisTaps:
    ratio = new / old
    first, last = max(start, 0), min(start + size, _target_size(n, ratio))
    inside = slice(first - start, max(first, last) - start)
    index = np.arange(first, max(first, last), dtype=np.int64)
    if _target_size(n, ratio) == n and abs(ratio - 1.0) * n < SAME_GRID_VOXELS:
        return _AxisTaps(inside, index, index, None)
    position = np.clip((index + 0.5) * ratio - 0.5, 0.0, n - 1.0)
    if order == 0:
        nearest = np.floor(position + 0.5).astype(np.int64)
        return _AxisTaps(inside, nearest, nearest, None)
    low = np.floor(position).astype(np.int64)
    return _AxisTaps(inside, low, np.minimum(low + 1, n - 1), (position - low).astype(np.float32))


def _target_size(n: int, ratio: float) -> int:
    return max(1, round(n / ratio))
