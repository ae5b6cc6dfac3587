"""A rank's share of the references of a bank: labelled patches, embedded by the teacher."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distseg.config.schema import TrainRunConfig
from distseg.data.augment import Augmentation
from distseg.data.keys import Purpose, generator, torch_generators
from distseg.data.lattice import LabelledPatches, Place
from distseg.data.patches import PatchReader
from distseg.data.slots import SlotSampler
from distseg.inference.embed import embed_patches
from distseg.matching.references import ReferenceTable, choose_voxels, join
from distseg.matching.surface import surface_bands
from distseg.networks.unet import UNet3D

_BATCH = 4  # patches a pass: on CPU a single one misses the fast convolutions
_NO_AUGMENTATION = Augmentation(flip_axes=(), intensity_scale=0.0, intensity_shift=0.0)
Piece = tuple[int, int, Tensor, Tensor]  # patch number, scan (index), embeddings [n, E], classes [n]


class ReferenceBuilder:
    """Embeds a rank's share of the references of any version: patches of labelled scans, scans and classes in turn.

    `sampling.foreground_share` of the patches lie around foreground, the others anywhere in the body, as labelled
    patches of slots do. Nothing is augmented. Deterministic in (seed, version), whoever embeds which patch.
    """

    def __init__(
        self,
        config: TrainRunConfig,
        reader: PatchReader,
        *,
        labelled: Sequence[str],
        patches: Sequence[Place] = (),
        spacing_mm: Sequence[float],
        num_classes: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._config, self._reader = config, reader
        self.labelled, self._num_classes = tuple(labelled), num_classes
        self._patches = tuple(patches)  # where the labelled scans are labelled; none: everywhere
        self._spacing, self._device, self._dtype = tuple(spacing_mm), device, dtype
        # Prototypes stand for surface references, as in the paper, whatever a bank would draw.
        self._draw = config.references.draw if config.matching.kind == "index" else "surface"
        self._per_patch = min(config.references.per_patch, config.references.max_count // config.references.patches)

    def pieces(self, teacher: UNet3D, version: int, *, rank: int = 0, world_size: int = 1) -> list[Piece]:
        """This rank's share: every `world_size`-th patch."""
        numbers = range(rank, self._config.references.patches, world_size)
        pieces: list[Piece] = []
        for first in range(0, len(numbers), _BATCH):
            pieces += self._batch(teacher, version, numbers[first : first + _BATCH])
        return pieces

    def table(self, teacher: UNet3D, version: int, *, step: int) -> ReferenceTable:
        """The whole of a version, embedded here."""
        return join(version, step, self.pieces(teacher, version), self.labelled)

    def _batch(self, teacher: UNet3D, version: int, numbers: Sequence[int]) -> list[Piece]:
        c = self._config
        scans = [(version * c.references.patches + number) % len(self.labelled) for number in numbers]
        placed = zip(scans, numbers, strict=True)
        patches = [self._sampler(scan).labelled_patch(version, number) for scan, number in placed]
        images = torch.from_numpy(np.stack([patch.image for patch in patches]))[:, None].to(self._device, self._dtype)
        keyed = self._device.type == "cpu"
        passes = c.references.doubt_passes if self._draw == "doubt" else 0
        drawn = torch_generators(c.seed, Purpose.BANK_PASSES, version, numbers, passes) if keyed else None
        embeddings, doubt = embed_patches(
            teacher, images, doubt_passes=passes, noise_sigma=c.method.teacher_noise_sigma, generators=drawn
        )
        pieces = []
        for row, (number, scan, patch) in enumerate(zip(numbers, scans, patches, strict=True)):
            assert patch.label is not None, "the sampler cuts labelled patches with their labels"
            voxels = torch.from_numpy(
                choose_voxels(
                    self._draw,
                    label=patch.label,
                    doubt=doubt[row].numpy(),
                    bands=surface_bands(
                        patch.label, self._num_classes, spacing_mm=self._spacing,
                        inside_mm=c.references.band_inside_mm, outside_mm=c.references.band_outside_mm,
                    ),
                    count=self._per_patch,
                    balanced=c.references.balanced,
                    generator=generator(c.seed, Purpose.BANK_VOXELS, version, number),
                )
            )  # fmt: skip
            classes = torch.from_numpy(patch.label.ravel().astype(np.int64))[voxels]
            pieces.append((number, scan, embeddings[row].flatten(1)[:, voxels].T.contiguous(), classes))
        return pieces

    def _sampler(self, scan: int) -> SlotSampler:
        size, here = self._config.sampling.patch_zyx, [p for p in self._patches if p[0] == self.labelled[scan]]
        return SlotSampler(
            self._reader,
            labelled=[self.labelled[scan]],
            unlabelled=[],
            patch_zyx=size,
            patches=LabelledPatches(self._reader, here, size) if here else None,
            foreground_share=self._config.sampling.foreground_share,
            augmentation=_NO_AUGMENTATION,
            seed=self._config.seed,
            purpose=Purpose.BANK_PATCH,
        )
