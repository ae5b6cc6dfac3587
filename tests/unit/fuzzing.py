"""Damage for files: what a mutation does follows from its number alone, so that a finding can be had again."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np

# What headers are read as, where the code around them breaks: signs, limits of types, no numbers, sizes of the absurd.
NUMBERS: list[bytes] = [
    np.array(value, kind).tobytes()
    for kind, values in {
        "<i2": (0, 1, -1, 2, 7, 255, 512, 32767, -32768),
        ">i2": (1, 348, 512),
        "<i4": (0, -1, 540, 2**31 - 1, -(2**31)),
        "<f4": (0, -0.0, 1e-30, 1e30, -1e38, 0.5, np.nan, np.inf, -np.inf),
        "<f8": (1e300, np.nan, -np.inf),
        "<i8": (10**12, -1, 2**63 - 1),
    }.items()
    for value in values
]


def mutated(content: bytes, number: int, *, head: int) -> bytes:
    """`content` after one to four changes, most of them within its first `head` bytes."""
    random = np.random.default_rng(number)
    data = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        reach = min(len(data), head if random.random() < 0.9 else len(data))
        if reach == 0:
            break
        at = int(random.integers(reach))
        kind = random.choice(
            ["number", "bit", "noise", "cut", "repeat", "drop"], p=[0.45, 0.25, 0.15, 0.05, 0.05, 0.05]
        )
        if kind == "number":
            value = NUMBERS[int(random.integers(len(NUMBERS)))]
            start = at - at % 2
            data[start : start + len(value)] = value
        elif kind == "bit":
            data[at] ^= 1 << int(random.integers(8))
        elif kind == "noise":
            data[at : at + 8] = random.bytes(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[at : at + int(random.integers(1, 300))]
        else:
            del data[at : at + int(random.integers(1, 64))]
    return bytes(data)


def mutated_gzip(content: bytes, number: int, *, head: int) -> bytes:
    """Damage before packing, or of the packed bytes."""
    if number % 4:
        return gzip.compress(mutated(content, number, head=head), compresslevel=1, mtime=0)
    packed = gzip.compress(content, compresslevel=1, mtime=0)
    return mutated(packed, number, head=len(packed))


def tree(root: Path, *, but: Path) -> dict[str, tuple[int, int]]:
    """Every file below `root` and not below `but`: size and time of change."""
    found = {}
    for path in root.rglob("*"):
        if path.is_file() and not path.is_relative_to(but):
            status = path.stat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


Mutate = Callable[[int], bytes]
