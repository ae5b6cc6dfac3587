"""From slots to batches: cut the patches of this rank's slots, draw references, stay one step ahead of the loop."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from distseg.config.schema import ReferencesConfig
from distseg.data.batch import Batch, collate
from distseg.data.keys import Purpose, generator
from distseg.data.signed_distance import signed_distances
from distseg.data.slots import Patch, SlotSampler
from distseg.matching.surface import BoolArray, IntArray, draw_references, has_surface, surface_bands


@dataclass(frozen=True)
class DistanceMaps:
    """How to make signed distance maps of labelled patches; see `signed_distances`."""

    spacing_mm: tuple[float, float, float]
    truncation_mm: float | None


class Feed:
    """The batch of any step, for one rank.

    Args:
        spacing_mm: Z Y X, of the patches.
        references: how to draw them where the method matches against the slot's labelled patch, else None.
        distances: how to make the labelled patches' signed distance maps where the method learns them, else None.
        truth_of: unlabelled scans whose hidden truth is opened, to be measured and never trained on.
        pin: leave batches in memory that a GPU copies from without the CPU waiting.
    """

    def __init__(
        self,
        sampler: SlotSampler,
        *,
        slots: tuple[int, ...],
        num_classes: int,
        references: ReferencesConfig | None,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
        needs_unlabelled: bool,
        distances: DistanceMaps | None = None,
        truth_of: frozenset[str] = frozenset(),
        pin: bool = False,
    ) -> None:
        self._sampler, self._slots, self._num_classes = sampler, slots, num_classes
        self._spacing_mm = tuple(spacing_mm)
        self._references, self._needs_unlabelled, self._truth_of = references, needs_unlabelled, truth_of
        self._distances, self._pin = distances, pin

    def batch(self, step: int) -> Batch:
        batch = collate([self._slot(step, slot) for slot in self._slots])
        return batch.pinned() if self._pin else batch

    def scan_ids(self, step: int, slots: Sequence[int]) -> tuple[str, ...]:
        """What slots saw, of any rank: "labelled+unlabelled". Cuts their patches anew."""
        return tuple(self._slot(step, slot).scan_ids[0] for slot in slots)

    def ahead(self, first: int, last: int) -> Generator[Batch, None, None]:
        """Batches of steps first..last; the next one is cut in a thread while the caller works on this one."""
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            coming: Future[Batch] = pool.submit(self.batch, first)
            for step in range(first, last + 1):
                batch = coming.result()
                if step < last:
                    coming = pool.submit(self.batch, step + 1)
                yield batch

    def _slot(self, step: int, slot: int) -> Batch:
        labelled = self._sampler.labelled_patch(step, slot)
        unlabelled, hidden = labelled, None
        if self._needs_unlabelled:
            unlabelled = self._sampler.unlabelled_patch(step, slot)
            if self._truth_of:
                hidden = self._hidden_truth(step, slot, unlabelled)
        reference, index, present = self._draw(labelled, step, slot)
        assert labelled.label is not None, "the sampler cuts labelled patches with their labels"
        return Batch(
            step=step,
            slots=(slot,),
            scan_ids=(f"{labelled.scan_id}+{unlabelled.scan_id}",),
            labelled_image=_image(labelled),
            labelled_target=torch.from_numpy(labelled.label.astype(np.int64))[None],
            unlabelled_image=_image(unlabelled),
            reference_image=_image(reference),
            reference_index=torch.from_numpy(index)[None],
            reference_present=torch.from_numpy(present)[None],
            labelled_distance=self._distance(labelled),
            hidden_target=hidden,
        )

    def _distance(self, labelled: Patch) -> torch.Tensor | None:
        """Of the patch as it trains, after its augmentation."""
        if self._distances is None:
            return None
        assert labelled.label is not None, "the sampler cuts labelled patches with their labels"
        maps = signed_distances(
            labelled.label,
            self._num_classes,
            spacing_mm=self._distances.spacing_mm,
            truncation_mm=self._distances.truncation_mm,
        )
        return torch.from_numpy(maps)[None]

    def _draw(self, labelled: Patch, step: int, slot: int) -> tuple[Patch, IntArray, BoolArray]:
        """References from the labelled patch; where it has no surface, maybe from a patch of its scan that has one."""
        width = 1 if self._references is None else self._references.k * self._references.draws
        nothing = np.zeros((self._num_classes, width), np.int64), np.zeros(self._num_classes, np.bool_)
        if self._references is None:
            return labelled, *nothing
        index, present = nothing if labelled.pseudo else self._surface_references(labelled, step, slot)
        if labelled.pseudo or (not has_surface(present) and self._references.without_surface == "scan"):
            other = self._sampler.reference_patch(labelled, step, slot)
            if other is not None:
                return other, *self._surface_references(other, step, slot)
        return labelled, index, present

    def _surface_references(self, patch: Patch, step: int, slot: int) -> tuple[IntArray, BoolArray]:
        c = self._references
        assert c is not None, "the method matches"
        assert patch.label is not None, "the sampler cuts labelled patches with their labels"
        return draw_references(
            surface_bands(
                patch.label,
                self._num_classes,
                spacing_mm=self._spacing_mm,
                inside_mm=c.band_inside_mm,
                outside_mm=c.band_outside_mm,
            ),
            k=c.k,
            draws=c.draws,
            generator=generator(self._sampler.seed, Purpose.REFERENCES, step, slot),
        )

    def _hidden_truth(self, step: int, slot: int, unlabelled: Patch) -> torch.Tensor:
        if unlabelled.scan_id not in self._truth_of:
            return torch.full((1, *unlabelled.image.shape), -1, dtype=torch.int64)
        label = self._sampler.unlabelled_patch(step, slot, with_label=True).label
        assert label is not None, "asked for with its label"
        return torch.from_numpy(label.astype(np.int64))[None]


def _image(patch: Patch) -> torch.Tensor:
    return torch.from_numpy(patch.image)[None, None]
