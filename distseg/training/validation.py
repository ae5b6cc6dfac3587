"""A cheap look at validation scans while training: Dice over a fixed set of patches. Whole scans are for evaluate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distseg.data.augment import Augmentation
from distseg.data.keys import Purpose, generator
from distseg.data.patches import PatchReader
from distseg.data.slots import SlotSampler
from distseg.networks.best_class import best_class
from distseg.networks.unet import UNet3D
from distseg.training.reduce import Communicator

_BATCH = 4  # on CPU a single patch misses the fast convolutions
_NO_AUGMENTATION = Augmentation(flip_axes=(), intensity_scale=0.0, intensity_shift=0.0)


class ValidationPatches:
    """The same patches at every look: half around foreground, half anywhere in the body, scans in turn."""

    def __init__(
        self,
        reader: PatchReader,
        *,
        scan_ids: Sequence[str],
        count: int,
        patch_zyx: Sequence[int],
        num_classes: int,
        seed: int,
        communicator: Communicator,
    ) -> None:
        self._num_classes, self._communicator = num_classes, communicator
        order = generator(seed, Purpose.VALIDATION).permutation(len(scan_ids))
        images: list[Tensor] = []
        targets: list[Tensor] = []
        for number in range(communicator.rank, count, communicator.world_size):
            sampler = SlotSampler(
                reader,
                labelled=[scan_ids[order[number % len(scan_ids)]]],
                unlabelled=[],
                patch_zyx=patch_zyx,
                foreground_share=float((number + number // len(scan_ids)) % 2),  # every scan gives both kinds
                augmentation=_NO_AUGMENTATION,
                seed=seed + 1,  # not the training slots' key
            )
            patch = sampler.labelled_patch(0, number)
            assert patch.label is not None, "the sampler cuts labelled patches with their labels"
            images.append(torch.from_numpy(patch.image)[None])
            targets.append(torch.from_numpy(patch.label))
        self._batches = [
            (torch.stack(images[i : i + _BATCH]), torch.stack(targets[i : i + _BATCH]))
            for i in range(0, len(images), _BATCH)
        ]

    @torch.inference_mode()
    def dice(self, network: UNet3D, device: torch.device, dtype: torch.dtype) -> float:
        """Mean over foreground classes of the Dice of all voxels of all patches. A collective: all ranks must call."""
        counts = torch.zeros(self._num_classes, 2, dtype=torch.float64, device=device)  # overlap, total
        was_training = network.training
        network.eval()
        for image, target in self._batches:
            predicted = best_class(network(image.to(device, dtype)).logits)
            truth = target.to(device)
            for value in range(1, self._num_classes):
                ours, theirs = predicted == value, truth == value
                counts[value, 0] += (ours & theirs).sum()
                counts[value, 1] += ours.sum() + theirs.sum()
        network.train(was_training)
        self._communicator.all_reduce_sum(counts)
        return float((2 * counts[1:, 0] / counts[1:, 1].clamp_min(1)).mean())
