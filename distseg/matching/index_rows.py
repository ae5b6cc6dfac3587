"""A reference table taken apart by class, checked once, so that an index only ever sees rows it can search.

Shapes: R rows of the table, R_c those of class c, K classes, E embedding width, N queries.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from distseg.errors import ConfigError, DataError

SIMILARITIES = ("cosine", "euclid")
_LONGEST = 1e18  # an embedding: squared distances between two of them are still float32


@dataclass(frozen=True)
class ClassRows:
    """What `class_rows` made of a table: for each class its embeddings, prepared for search, and their row ids."""

    similarity: str
    width: int  # E
    count: int  # R
    values: tuple[Tensor, ...]  # K of float32 [R_c, E]: of unit length under cosine, less `centre` under euclid
    ids: tuple[Tensor, ...]  # K of int64 [R_c], ascending: rows of the whole table
    centre: Tensor  # float32 [E]: the table's mean under euclid (distances cancel less around it), else 0
    device: torch.device

    def without_values(self) -> ClassRows:
        """For an index that keeps its own copy of them."""
        return replace(self, values=())

    def prepare(self, queries: Tensor, k: int) -> Tensor:
        """Queries [N, E] as float32 on the rows' device, ready to be compared with `values`; checks them and k.

        Raises ConfigError where k is above what a class has, DataError where the queries do not fit.
        """
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise DataError(
                "queries do not fit the reference index",
                value=f"shape {list(queries.shape)}",
                rule=f"must be [N, {self.width}], the width of its references",
                fix="search with embeddings of the network that made the references, or build the bank again",
            )
        fewest = min(range(len(self.ids)), key=lambda c: len(self.ids[c]))
        if not 1 <= k <= len(self.ids[fewest]):
            raise ConfigError(
                "cannot find that many references a class",
                value=f"k = {k}",
                rule=f"must be from 1 to {len(self.ids[fewest])}, the references of class {fewest}",
                fix="lower k, or draw more references",
            )
        queries = queries.detach().to(self.device, torch.float32)
        _check_finite(queries, "query")
        if self.similarity == "cosine":
            return functional.normalize(queries, dim=1)
        return queries - self.centre


def class_rows(embeddings: Tensor, classes: Tensor, *, num_classes: int, similarity: str) -> ClassRows:
    """Check a table (embeddings [R, E], classes int64 [R]) and sort it by class; it stays on embeddings' device.

    Raises DataError for shapes that do not fit, values that are not finite, or a class without references.
    """
    if similarity not in SIMILARITIES:
        raise ConfigError("no such similarity", value=similarity, rule=f"must be one of {', '.join(SIMILARITIES)}")
    if embeddings.ndim != 2 or classes.shape != embeddings.shape[:1] or embeddings.shape[1] < 1:
        raise DataError(
            "reference table of the wrong shape",
            value=f"embeddings {list(embeddings.shape)}, classes {list(classes.shape)}",
            rule="must be [R, E] and [R]",
        )
    embeddings, classes = embeddings.detach().to(torch.float32), classes.to(embeddings.device)
    _check_finite(embeddings, "reference")
    outside = (classes < 0) | (classes >= num_classes)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise DataError(
            "reference of a class that is not there",
            where=f"row {row}",
            value=int(classes[row]),
            rule=f"must be from 0 to {num_classes - 1}",
        )
    ids = tuple((classes == c).nonzero().flatten() for c in range(num_classes))
    for c, rows in enumerate(ids):
        if len(rows) == 0:
            raise DataError(
                "class without references",
                value=f"class {c} of {num_classes}",
                rule="every class needs at least one reference",
                fix="draw references from scans that show it, or leave the class out",
            )
    cosine = similarity == "cosine"
    centre = torch.zeros_like(embeddings[0]) if cosine else embeddings.mean(0, dtype=torch.float64).float()
    values = tuple(
        functional.normalize(embeddings[rows], dim=1) if cosine else embeddings[rows] - centre for rows in ids
    )
    return ClassRows(similarity, embeddings.shape[1], len(classes), values, ids, centre, embeddings.device)


def table_digest(embeddings: Tensor, classes: Tensor) -> str:
    """SHA-256 of a table's content: an index file names the one table it belongs to."""
    digest = hashlib.sha256(f"{list(embeddings.shape)}".encode())
    for tensor in (embeddings.detach().to("cpu", torch.float32), classes.to("cpu", torch.int64)):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _check_finite(rows: Tensor, name: str) -> None:
    """Squared lengths rather than elements: sums of them must not overflow, and a comparison finds NaN as well."""
    sound = rows.square().sum(1) < _LONGEST**2
    if not sound.all():
        bad = (~sound).nonzero().flatten()
        raise DataError(
            f"{name} embeddings are not finite",
            where=f"row {int(bad[0])}",
            value=f"{len(bad)} of {len(rows)} rows with NaN, infinity or a length over {_LONGEST:g}",
            fix="look at the loss of the steps before (a network that diverged), or lower optimizer.lr",
        )
