"""Planes that enter at the top and leave at the bottom: what slab-wise work keeps of a volume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Rolling:
    """Consecutive planes [C, n, Y, X], numbered along Z from `first`; those that enter are zero."""

    def __init__(
        self, channels: int, capacity: int, size_yx: Sequence[int], *, first: int, device: torch.device | str
    ) -> None:
        self._planes = torch.zeros(channels, capacity, *size_yx, device=device)
        self._first = first

    def between(self, start: int, stop: int) -> Tensor:
        """A view [C, stop - start, Y, X]; start and stop are numbers of planes that are held."""
        low, high = start - self._first, stop - self._first
        if not 0 <= low <= high <= self._planes.shape[1]:
            raise IndexError(f"planes {start} to {stop} are not held")
        return self._planes[:, low:high]

    def drop_below(self, first: int) -> None:
        """Let go of the planes below `first`; as many enter above."""
        gone = first - self._first
        if gone <= 0:
            return
        kept = self._planes.shape[1] - gone
        for plane in range(kept):  # plane by plane: a copy of the whole buffer would double the peak
            self._planes[:, plane] = self._planes[:, plane + gone]
        self._planes[:, max(kept, 0) :] = 0
        self._first = first
