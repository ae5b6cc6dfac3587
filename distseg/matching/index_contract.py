"""What every reference index promises. Built and loaded by distseg.matching.index.

Shapes: N queries, E embedding width, R rows of the table, K classes, k found a class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor


class ReferenceIndex(Protocol):
    """One version of the bank, ready to be searched. Safe to call from several threads at once."""

    @property
    def num_classes(self) -> int: ...  # K

    @property
    def width(self) -> int: ...  # E

    @property
    def count(self) -> int: ...  # R

    @property
    def backend(self) -> str: ...  # faiss | torch

    @property
    def kind(self) -> str: ...  # flat | ivf

    @property
    def device(self) -> str: ...  # cpu | cuda

    @property
    def reason(self) -> str: ...  # why backend, kind and device are what they are, for the log

    def find(self, queries: Tensor, k: int) -> Tensor:
        """The k most similar references of every class: int64 [N, K, k] row ids of the whole table, best first.

        queries: [N, E], any floating dtype and device; the ids come back on their device. No gradient. References of
        equal similarity come in any order. Raises DataError (width, values not finite) or ConfigError (k).
        """
        ...

    def to_bytes(self) -> bytes:
        """All of the index that its table does not hold: small (IVF: 4 bytes a row). Versioned and checksummed."""
        ...

    def save(self, folder: Path) -> None:
        """Write `to_bytes` to `folder`/index.bin. The folder exists; atomicity is the caller's."""
        ...
