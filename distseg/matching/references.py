"""The bank's reference table: embeddings of labelled voxels of all labelled scans, one version of them.

A version is a constant: every worker holds the same rows in the same order, whoever embedded them.

    FOLDER/table.safetensors   embeddings [R, E], classes [R], scans [R]; version, step and scan ids in its metadata

Shapes: R references, E embedding width, K classes, Z Y X voxels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distseg.errors import DataError
from distseg.matching.surface import BoolArray, IntArray

FORMAT = "1"
DRAWS = ("surface", "random", "doubt")


@dataclass(frozen=True, eq=False)
class ReferenceTable:
    """Rows are ordered by (scan, class, draw). `step`: the step after which the teacher embedded them."""

    version: int
    step: int
    embeddings: Tensor  # float32 [R, E], as the network gives them: not normalised
    classes: Tensor  # int64 [R], label values
    scans: Tensor  # int64 [R], each row's scan of origin, an index into scan_ids
    scan_ids: tuple[str, ...]

    def counts(self, num_classes: int) -> Tensor:
        """References of each class, int64 [K]."""
        return torch.bincount(self.classes, minlength=num_classes)

    def without(self, scan_id: str) -> ReferenceTable:
        """All rows but those of one scan: what that scan itself is matched against where generalisation is measured."""
        return self._rows(torch.nonzero(self.scans != self.scan_ids.index(scan_id)).flatten())

    def to(self, device: torch.device) -> ReferenceTable:
        moved = {name: getattr(self, name).to(device) for name in ("embeddings", "classes", "scans")}
        return dataclasses.replace(self, **moved)

    def _rows(self, rows: Tensor) -> ReferenceTable:
        return dataclasses.replace(
            self, embeddings=self.embeddings[rows], classes=self.classes[rows], scans=self.scans[rows]
        )


def save_table(folder: Path, table: ReferenceTable) -> None:
    """Write into a folder that exists; that it appears whole or not at all is the caller's part."""
    tensors = {name: getattr(table, name).cpu().contiguous() for name in ("embeddings", "classes", "scans")}
    metadata = {"format": FORMAT, "version": table.version, "step": table.step, "scan_ids": json.dumps(table.scan_ids)}
    save_file(tensors, folder / "table.safetensors", metadata={k: str(v) for k, v in metadata.items()})


def load_table(folder: Path) -> ReferenceTable:
    """Raises DataError where there is none, or it is damaged or of another format."""
    file = folder / "table.safetensors"
    if not file.is_file():
        raise DataError("no reference table here", where=file)
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DataError("reference table of another format", where=file, value=metadata.get("format"))
            table = ReferenceTable(
                version=int(metadata["version"]),
                step=int(metadata["step"]),
                embeddings=content.get_tensor("embeddings"),
                classes=content.get_tensor("classes"),
                scans=content.get_tensor("scans"),
                scan_ids=tuple(json.loads(metadata["scan_ids"])),
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"unreadable reference table: {str(error)[:200]}", where=file) from error
    rows = table.embeddings.shape[0]
    if table.embeddings.ndim != 2 or table.classes.shape != (rows,) or table.scans.shape != (rows,):
        raise DataError("reference table whose columns differ in length", where=file)
    whole = (table.classes.dtype, table.scans.dtype) == (torch.int64, torch.int64)
    if not whole or not table.embeddings.is_floating_point() or not bool(torch.isfinite(table.embeddings).all()):
        raise DataError("reference table whose columns are no references", where=file)
    if rows and not 0 <= int(table.scans.min()) <= int(table.scans.max()) < len(table.scan_ids):
        raise DataError("references of scans that there are not", where=file, rule=f"{len(table.scan_ids)} scans")
    return table


def join(
    version: int, step: int, pieces: Sequence[tuple[int, int, Tensor, Tensor]], scan_ids: Sequence[str]
) -> ReferenceTable:
    """A table of pieces (patch number, scan, embeddings [n, E], classes [n]), whoever made them, in any order."""
    pieces = sorted(pieces, key=lambda piece: piece[0])
    embeddings = torch.cat([piece[2] for piece in pieces]).float()
    classes = torch.cat([piece[3] for piece in pieces])
    scans = torch.cat([torch.full((len(piece[3]),), piece[1]) for piece in pieces])
    order = np.lexsort((classes.numpy(), scans.numpy()))  # stable: patch number and draw decide within a class
    rows = torch.from_numpy(order)
    return ReferenceTable(version, step, embeddings[rows], classes[rows], scans[rows], tuple(scan_ids))


def choose_voxels(
    draw: str,
    *,
    label: npt.NDArray[np.integer],
    doubt: npt.NDArray[np.floating],
    bands: Sequence[BoolArray],
    count: int,
    balanced: bool,
    generator: np.random.Generator,
) -> IntArray:
    """Flat indices of at most `count` reference voxels of one labelled patch [Z, Y, X], class by class.

    `surface`: from the bands just inside and outside objects. `random`: from anywhere in the patch. `doubt`: those the
    teacher is least sure of, the way queries arise (METHOD trap 10).

    Args:
        doubt: entropy of the teacher at each voxel; read by `doubt` alone.
        bands: a mask for each class (`surface_bands`); read by `surface` alone.
        balanced: as many of each class that is there; else each class as often as it occurs among the eligible
            voxels (`surface` is always balanced: its bands are a choice, not a frequency).
    """
    flat = label.ravel()
    pools = [np.flatnonzero(band) if draw == "surface" else np.flatnonzero(flat == c) for c, band in enumerate(bands)]
    if not balanced and draw != "surface":
        pools = [np.arange(flat.size)]
    there = [pool for pool in pools if pool.size]
    chosen = []
    for pool in there:
        share = min(pool.size, max(1, count // len(there)))
        if draw == "doubt":
            # Ties, frequent where the teacher is entirely sure, fall by lot and not by place.
            lots = generator.random(pool.size)
            order = np.lexsort((lots, -doubt.ravel()[pool]))
            chosen.append(pool[order[:share]])
        else:
            chosen.append(generator.choice(pool, share, replace=False))
    return np.concatenate(chosen).astype(np.int64)[:count] if chosen else np.zeros(0, np.int64)
