"""Shapes of the synthetic pelvis as signed distances in mm (negative inside), and the soft tissue around them.

Coordinates as in `phantom`: x, y, z in mm of [Z, Y, X] voxels; `u` is x measured outwards from the midline, so that one
set of formulas serves both sides. Sizes follow an adult pelvis only as far as the segmentation problem needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

AIR, FAT, MUSCLE, ORGAN, FLUID = -1000, -95, 55, 25, 8  # Hounsfield units

Array = npt.NDArray[np.float32]
Point = tuple[float, float, float]  # x, y, z in mm


@dataclass(frozen=True)
class Side:
    """One hip's sizes in mm; `sign` is +1 on the left. Points are given with x measured outwards."""

    sign: int
    head: Point
    head_radius: float
    joint_gap: float
    flare: float
    neck_drop: float


def draw_side(rng: np.random.Generator, sign: int) -> Side:
    return Side(
        sign=sign,
        head=(float(rng.uniform(84, 92)), float(rng.uniform(-3, 3)), float(rng.uniform(-3, 3))),
        head_radius=float(rng.uniform(22, 26)),
        joint_gap=float(rng.uniform(4.0, 6.0)),
        flare=float(rng.uniform(0.3, 0.5)),
        neck_drop=float(rng.uniform(30, 46)),
    )


def posed(
    axes: Sequence[npt.NDArray[Any]], *, scale: float, tilt: npt.NDArray[np.float64], shift: npt.NDArray[np.float64]
) -> Array:
    """Anatomical coordinates [3 = x y z, Z, Y, X] of every fine voxel for a person of this size, tilted and shifted."""
    z, y, x = (axis.reshape([-1 if place == dim else 1 for dim in range(3)]) for place, axis in enumerate(axes))
    (sx, sy, sz), (cx, cy, cz) = np.sin(tilt), np.cos(tilt)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    rotation = ((about_z @ about_y @ about_x) / scale).astype(np.float32)
    sx, sy, sz = (np.float32(value) for value in shift)
    return np.stack([r[0] * (x - sx) + r[1] * (y - sy) + r[2] * (z - sz) for r in rotation]).astype(np.float32)


def ball(x: Array, y: Array, z: Array, centre: Point, radius: float) -> Array:
    distance: Array = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) - np.float32(radius)
    return distance


def rod(x: Array, y: Array, z: Array, start: Point, end: Point, radii: tuple[float, float]) -> Array:
    """A rounded cone from `start` to `end`; its distance is exact for equal radii."""
    axis = np.subtract(end, start).astype(np.float32)
    dx, dy, dz = x - np.float32(start[0]), y - np.float32(start[1]), z - np.float32(start[2])
    along = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / np.float32(axis @ axis), 0, 1)
    distance = np.sqrt((dx - along * axis[0]) ** 2 + (dy - along * axis[1]) ** 2 + (dz - along * axis[2]) ** 2)
    result: Array = distance - (np.float32(radii[0]) + np.float32(radii[1] - radii[0]) * along)
    return result


def offset(point: Point, dx: float, dy: float, dz: float) -> Point:
    return point[0] + dx, point[1] + dy, point[2] + dz


def hip_bone(u: Array, y: Array, z: Array, side: Side) -> Array:
    """Acetabulum, ilium, ischium, pubis; `u` is measured outwards from the midline."""
    head, socket = side.head, side.head_radius + side.joint_gap
    from_head = ball(u, y, z, head, 0.0)
    opening = 0.74 * (u - head[0]) - 0.25 * (y - head[1]) - 0.62 * (z - head[2])
    cup = np.maximum(np.maximum(from_head - (socket + 9.0), socket - from_head), opening - 3.0)
    parts = [
        cup,
        ilium(u, y, z, side),
        rod(u, y, z, offset(head, -10, 12, 26), offset(head, -2, 12, 72), (16.0, 7.0)),  # pillar above the socket
        rod(u, y, z, (48, 58, 88), (46, 66, 48), (10.0, 9.0)),  # where it meets the sacrum
        rod(u, y, z, offset(head, -14, 26, -14), (62, 40, -62), (14.0, 13.0)),  # ischium
        rod(u, y, z, offset(head, -22, -14, 2), (12, -52, -28), (11.0, 8.0)),  # superior ramus of the pubis
        rod(u, y, z, (10, -53, -26), (10, -48, -48), (8.5, 7.0)),  # body of the pubis
        rod(u, y, z, (11, -47, -48), (60, 36, -68), (6.5, 8.0)),  # inferior rami
    ]
    union = parts[0]
    for part in parts[1:]:
        union = np.minimum(union, part)
    union = np.maximum(union, np.float32(3.0) - u)  # the symphysis is a gap
    result: Array = np.maximum(union, np.float32(socket) - from_head)
    return result


def ilium(u: Array, y: Array, z: Array, side: Side) -> Array:
    """A curved plate in an ellipse of the sagittal plane, flaring outwards to its thicker crest."""
    blade = 78 + side.flare * (z - 30) - 0.5 * (y + 4) - 0.0022 * (y - 5) ** 2
    rim = np.sqrt(((y - 8) / 62) ** 2 + ((z - 74) / 60) ** 2)
    half_thickness = 3.6 + 3.2 * np.clip(rim, 0, 1) ** 4
    result: Array = np.maximum(np.abs(u - blade) / 1.2 - half_thickness, (rim - 1) * 58).astype(np.float32)
    return result


def femur(u: Array, y: Array, z: Array, side: Side) -> Array:
    head, lateral = side.head, 46.0
    knee = offset(head, lateral - 14, 4, -260)
    trochanter = offset(head, lateral + 6, 10, -side.neck_drop + 12)
    base = offset(head, lateral - 2, 6, -side.neck_drop - 4)
    result: Array = np.minimum.reduce(
        [
            ball(u, y, z, head, side.head_radius),
            rod(u, y, z, head, base, (13.0, 16.0)),
            ball(u, y, z, trochanter, 17.0),
            rod(u, y, z, base, knee, (18.0, 14.0)),
        ]
    )
    return result


def implant(u: Array, y: Array, z: Array, side: Side) -> Array:
    """A metal head and stem, inside the bone it replaces."""
    stem = offset(side.head, 42, 6, -side.neck_drop - 4)
    head = ball(u, y, z, side.head, side.head_radius - 7)
    return np.minimum(np.minimum(head, rod(u, y, z, side.head, stem, (7, 7))),
                      rod(u, y, z, stem, offset(stem, -6, 0, -120), (8, 6)))  # fmt: skip


def sacrum(x: Array, y: Array, z: Array) -> Array:
    """A wedge, broad at the top and curved backwards, then the coccyx."""
    level = np.clip((z + 40) / 140, 0, 1)  # 0 at the tip, 1 at the promontory
    width, depth = 9 + 50 * level**0.8, 6 + 20 * level
    middle = 66 + 22 * np.sin(np.pi * level) - 26 * level
    across = np.sqrt((x / width) ** 2 + ((y - middle) / depth) ** 2)
    result: Array = np.maximum((across - 1) * depth, np.maximum(z - 100, -40 - z)).astype(np.float32)
    return result


def soft_tissue(x: Array, y: Array, z: Array, *, fat_mm: float) -> Array:
    """Air, the body's fat, muscle, and the organs of the small pelvis with a bladder."""
    body = np.abs(x / 172) ** 2.4 + np.abs((y - 6) / 112) ** 2.4  # a superellipse's norm to the power 2.4
    tissue = np.full(body.shape, AIR, np.float32)
    tissue[body < 1] = FAT
    tissue[body < (1 - fat_mm / 112) ** 2.4] = MUSCLE
    tissue[(x / 62) ** 2 + ((y - 2) / 56) ** 2 + ((z - 40) / 95) ** 2 < 1] = ORGAN
    tissue[(x / 34) ** 2 + ((y + 22) / 26) ** 2 + ((z + 4) / 26) ** 2 < 1] = FLUID
    return tissue
