"""What one rank sees in one step: typed tensors, every field's shape and dtype written down.

Shapes: B slots, K classes, R references per class, Z Y X voxels. Images are normalised intensities with one channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A slot is one labelled and one unlabelled patch; `slots[b]` is its number in the global batch of `step`."""

    step: int
    slots: tuple[int, ...]
    scan_ids: tuple[str, ...]  # "labelled+unlabelled" of each slot, for messages
    labelled_image: Tensor  # float [B, 1, Z, Y, X]
    labelled_target: Tensor  # int64 [B, Z, Y, X]
    unlabelled_image: Tensor  # float [B, 1, Z, Y, X]
    reference_image: Tensor  # float [B, 1, Z, Y, X]: the labelled patch, or one of its scan that has a surface
    reference_index: Tensor  # int64 [B, K, R] flat voxel indices into the reference patch
    reference_present: Tensor  # bool [B, K]; all False: the scan has no surface
    labelled_distance: Tensor | None = None  # float [B, K - 1, Z, Y, X], signed distances, where the method needs them
    hidden_target: Tensor | None = None  # int64 [B, Z, Y, X], diagnostics only; -1 where the truth is unknown

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Tensors on `device`, images as `dtype`."""
        moved: dict[str, Any] = {}
        for name, value in self._tensors():
            kind = dtype if value.is_floating_point() else value.dtype
            moved[name] = value.to(device=device, dtype=kind, non_blocking=True)
        return dataclasses.replace(self, **moved)

    def pinned(self) -> Batch:
        """In memory that a GPU copies from without the CPU waiting."""
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in self._tensors()}
        return dataclasses.replace(self, **pinned)

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Pieces of `size` slots, in slot order."""
        for start in range(0, len(self.slots), size):
            part = slice(start, start + size)
            pieces: dict[str, Any] = {name: value[part] for name, value in self._tensors()}
            yield dataclasses.replace(self, slots=self.slots[part], scan_ids=self.scan_ids[part], **pieces)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value


def collate(slots: list[Batch]) -> Batch:
    """Batches of one slot each, joined in order. They share a step."""
    tensors: dict[str, Any] = {name: torch.cat([getattr(s, name) for s in slots]) for name, _ in slots[0]._tensors()}
    return dataclasses.replace(
        slots[0],
        slots=tuple(n for s in slots for n in s.slots),
        scan_ids=tuple(n for s in slots for n in s.scan_ids),
        **tensors,
    )
