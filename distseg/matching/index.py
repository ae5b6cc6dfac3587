"""The reference index: which rows of the bank a query is most similar to, class by class. The only module that uses FAISS.

An index is one version of the bank, ready to be searched; it holds no gradient and never changes. It returns row ids
of the reference table; similarities with gradient to the queries are computed from those rows elsewhere.

| backend | kind | what it is |
|---|---|---|
| torch | flat | exact: matrix product and top-k, CPU or CUDA (index_torch.py) |
| faiss | flat | exact |
| faiss | ivf | approximate: looks at the rows nearest to it by k-means cell |

Shapes: N queries, E embedding width, R rows of the table, K classes, k found a class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

BACKENDS = ("auto", "faiss", "torch")
KINDS = ("auto", "flat", "ivf")
DEVICES = ("auto", "cpu", "cuda")


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
        """The k most similar references of every class: int64 [N, K, k] row ids of the whole table, most similar first.

        queries: [N, E], any floating dtype and device; the ids come back on their device. No gradient. References of
        equal similarity come in any order. Raises DataError (width, values not finite) or ConfigError (k).
        """
        ...

    def save(self, folder: Path) -> None:
        """Write `folder`/index.bin: versioned and checksummed. The folder exists; atomicity is the caller's."""
        ...


def build_index(
    embeddings: Tensor,
    classes: Tensor,
    *,
    num_classes: int,
    similarity: str = "cosine",
    backend: str = "auto",
    kind: str = "auto",
    device: str = "auto",
    seed: int = 0,
    threads: int | None = None,
) -> ReferenceIndex:
    """Index a table: embeddings [R, E], classes int64 [R], rows in any order. The same bytes give the same index.

    Args:
        similarity: "cosine" (rows and queries are brought to unit length here) or "euclid".
        device: "auto" is where `embeddings` are.
        seed: of IVF's k-means, which runs on one thread.
        threads: of a search in FAISS; None takes torch's number at each search.

    Raises ConfigError for a combination that is not there (what, and what to set), DataError for a table that cannot
    be searched.
    """
    raise NotImplementedError


def serialize(index: ReferenceIndex) -> bytes:
    """All of an index that its table does not hold: small (IVF: 4 bytes a row), for replicas and files."""
    raise NotImplementedError


def deserialize(
    data: bytes, embeddings: Tensor, classes: Tensor, *, device: str = "auto", threads: int | None = None
) -> ReferenceIndex:
    """The index again, from `serialize`'s bytes and the table it was built from; finds the same ids.

    Raises DataError where the bytes are of another version, cut short, damaged, or of another table.
    """
    raise NotImplementedError


def load_index(
    folder: Path, embeddings: Tensor, classes: Tensor, *, device: str = "auto", threads: int | None = None
) -> ReferenceIndex:
    """The index that `ReferenceIndex.save` wrote, given its table. Raises DataError as `deserialize` does."""
    raise NotImplementedError
