"""Which patches a slot sees: a labelled one, an unlabelled one, and where references may come from.

Everything is drawn from the key (seed, step, slot), so the sampler has no state. Labelled patches: `foreground_share`
of them contain a foreground voxel of a class drawn evenly, the rest lie uniformly inside the body. Unlabelled patches:
uniform inside the body, or a share where `doubt` says the teacher is unsure. Axis order Z, Y, X.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distseg.data.augment import Augmentation, FloatArray, LabelArray
from distseg.data.keys import Purpose, generator
from distseg.data.lattice import LabelledPatches
from distseg.data.patches import PatchReader
from distseg.data.pseudo_labels import PseudoLabels

IntArray = npt.NDArray[np.int32]
Centre = tuple[str, tuple[int, int, int]]  # scan id, voxel on the run's grid


@dataclass(frozen=True)
class Patch:
    scan_id: str
    start: tuple[int, int, int]
    image: FloatArray  # [Z, Y, X]
    label: LabelArray | None
    pseudo: bool = False  # the label was made by a model, and is IGNORE where that was unsure


class SlotSampler:
    """Slot i of step t, from the seed alone.

    Args:
        labelled, unlabelled: scan ids, in an order that is the same on every rank.
        patches: where labels may be looked at, if not in all of the labelled scans.
        pseudo: labels that a model made of unlabelled scans; `pseudo_share` of the labelled patches are theirs.
        doubt: the list of centres that serves a step, of which `doubt_share` of the unlabelled patches are drawn.
        purpose: what the labelled patches are for; another one draws others.
    """

    def __init__(
        self,
        reader: PatchReader,
        *,
        labelled: Sequence[str],
        unlabelled: Sequence[str],
        patch_zyx: Sequence[int],
        foreground_share: float,
        augmentation: Augmentation,
        seed: int,
        patches: LabelledPatches | None = None,
        pseudo: PseudoLabels | None = None,
        pseudo_share: float = 0.0,
        doubt_share: float = 0.0,
        doubt: Callable[[int], Sequence[Centre]] | None = None,
        purpose: Purpose = Purpose.LABELLED_PATCH,
    ) -> None:
        self.labelled, self.unlabelled, self.seed = tuple(labelled), tuple(unlabelled), seed
        self._reader, self._size = reader, tuple(int(n) for n in patch_zyx)
        self._foreground_share, self._augmentation = foreground_share, augmentation
        self._patches, self._doubt_share, self._doubt, self._purpose = patches, doubt_share, doubt, purpose
        self._pseudo, self._pseudo_share = pseudo, pseudo_share

    def labelled_patch(self, step: int, slot: int) -> Patch:
        rng = generator(self.seed, self._purpose, step, slot)
        if self._pseudo is not None and rng.random() < self._pseudo_share:
            return self._pseudo_patch(self._pseudo, rng)
        if self._patches is not None:
            scan_id, start = self._patches.draw(rng, foreground_share=self._foreground_share)
            return self._cut(scan_id, start, rng, with_label=True)
        scan_id = self.labelled[int(rng.integers(len(self.labelled)))]
        placement = self._reader.placement(scan_id)
        on_foreground = bool(rng.random() < self._foreground_share) and bool(placement.foreground)
        start = self._around(placement.foreground, rng) if on_foreground else self._centred(placement.body, rng)
        return self._cut(scan_id, start, rng, with_label=True)

    def _pseudo_patch(self, pseudo: PseudoLabels, rng: np.random.Generator) -> Patch:
        scan_id = pseudo.scans[int(rng.integers(len(pseudo.scans)))]
        on_foreground = bool(rng.random() < self._foreground_share)
        foreground = pseudo.foreground(scan_id) if on_foreground else {}
        body = self._reader.placement(scan_id).body
        start = self._around(foreground, rng) if foreground else self._centred(body, rng)
        image, label = self._reader.image(scan_id, start, self._size), pseudo.label(scan_id, start, self._size)
        image, turned = self._augmentation(image, label, rng)
        return Patch(scan_id, start, image, turned, pseudo=True)

    def reference_patch(self, labelled: Patch, step: int, slot: int) -> Patch | None:
        """A patch of the labelled patch's scan that contains foreground; None if the scan has none. References are
        labelled voxels: for a pseudo-labelled patch they come from a labelled scan."""
        rng = generator(self.seed, Purpose.REFERENCE_PATCH, step, slot)
        scan_id = labelled.scan_id
        if labelled.pseudo:
            scan_id = self.labelled[int(rng.integers(len(self.labelled)))]
        if self._patches is not None:
            place = self._patches.with_foreground(scan_id, rng)
            return None if place is None else self._cut(*place, rng, with_label=True)
        foreground = self._reader.placement(scan_id).foreground
        if not foreground:
            return None
        return self._cut(scan_id, self._around(foreground, rng), rng, with_label=True)

    def unlabelled_patch(self, step: int, slot: int, *, with_label: bool = False) -> Patch:
        """`with_label` opens hidden truth: for diagnostics, never for training."""
        rng = generator(self.seed, Purpose.UNLABELLED_PATCH, step, slot)
        scan_id = self.unlabelled[int(rng.integers(len(self.unlabelled)))]
        start = self._centred(self._reader.placement(scan_id).body, rng)
        doubtful = self._doubt(step) if self._doubt is not None and rng.random() < self._doubt_share else ()
        if doubtful:
            scan_id, centre = doubtful[int(rng.integers(len(doubtful)))]
            start = _start(self._shaken(np.asarray(centre, np.int32), rng), self._size)
        return self._cut(scan_id, start, rng, with_label=with_label)

    def _centred(self, centres: IntArray, rng: np.random.Generator) -> tuple[int, int, int]:
        centre = centres[int(rng.integers(len(centres)))]
        return _start(centre, self._size)

    def _around(self, foreground: Mapping[str, IntArray], rng: np.random.Generator) -> tuple[int, int, int]:
        """A patch that contains a foreground voxel somewhere in its middle half, so objects are seen off-centre."""
        names = sorted(foreground)
        voxels = foreground[names[int(rng.integers(len(names)))]]
        centre = voxels[int(rng.integers(len(voxels)))]
        return _start(self._shaken(centre, rng), self._size)

    def _shaken(self, centre: IntArray, rng: np.random.Generator) -> IntArray:
        reach = np.asarray(self._size) // 4
        shaken: IntArray = (centre + rng.integers(-reach, reach + 1)).astype(np.int32)
        return shaken

    def _cut(self, scan_id: str, start: tuple[int, int, int], rng: np.random.Generator, *, with_label: bool) -> Patch:
        image = self._reader.image(scan_id, start, self._size)
        label = self._reader.label(scan_id, start, self._size) if with_label else None
        image, label = self._augmentation(image, label, rng)
        return Patch(scan_id, start, image, label)


def _start(centre: IntArray, size: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = (int(c) - n // 2 for c, n in zip(centre, size, strict=True))
    return z, y, x
