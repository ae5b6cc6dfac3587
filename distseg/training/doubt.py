"""Centres for unlabelled patches where the teacher sees foreground or is unsure (`sampling.unlabelled=doubt`).

Every R steps the teacher looks at a fixed number of patches, uniform in the bodies of unlabelled scans, and leaves a
list of voxels. Versions go by step, not by arrival: list v is made after step v R and serves steps v R + 2 to
(v + 1) R + 1, since the batch of v R + 1 is being cut meanwhile. It is on disk before its first use, so a resumed run
draws from the same list. List 0 is made before step 1 if the run branches from a trained one; else it is empty.

    RUN/doubt/v_0003.json   [[scan id, [z, y, x]], ...] on the run's grid
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distseg.data.keys import Purpose, generator
from distseg.data.patches import PatchReader
from distseg.data.slots import Centre
from distseg.losses.entropy import entropy_nats
from distseg.networks.best_class import best_class
from distseg.networks.unet import UNet3D
from distseg.training.reduce import Communicator
from distseg.training.run import write_atomic

CANDIDATES = 64  # patches a look: 2 s of CPU at 32^3
CENTRES_PER_PATCH = 4
UNSURE = 0.5  # of ln C
_BATCH = 4


class DoubtCentres:
    """The versioned lists of one run; called with a step, gives the list that serves it."""

    def __init__(
        self,
        folder: Path,
        *,
        reader: PatchReader,
        scan_ids: Sequence[str],
        patch_zyx: Sequence[int],
        every_steps: int,
        seed: int,
        communicator: Communicator,
    ) -> None:
        self._folder, self._reader, self._scan_ids = folder, reader, scan_ids
        self._size, self._every, self._seed = tuple(patch_zyx), every_steps, seed
        self._communicator = communicator
        self._lists: dict[int, list[Centre]] = {}

    def __call__(self, step: int) -> list[Centre]:
        version = self.version_of(step)
        if version not in self._lists:
            file = self._file(version)
            entries = json.loads(file.read_text()) if file.exists() else []
            self._lists[version] = entries
        return self._lists[version]

    def version_of(self, step: int) -> int:
        return max(0, (step - 2) // self._every)

    def refresh_after(self, step: int, teacher: UNet3D, device: torch.device, dtype: torch.dtype) -> None:
        """Make the list that is due after `step`, if one is. A collective: all ranks must call."""
        if step % self._every == 0 and not self._file(step // self._every).exists():
            self._make(step // self._every, teacher, device, dtype)

    @torch.inference_mode()
    def _make(self, version: int, teacher: UNet3D, device: torch.device, dtype: torch.dtype) -> None:
        found = torch.full((CANDIDATES, CENTRES_PER_PATCH, 3), 0.0, dtype=torch.float64, device=device)
        valid = torch.zeros(CANDIDATES, CENTRES_PER_PATCH, dtype=torch.float64, device=device)
        mine = range(self._communicator.rank, CANDIDATES, self._communicator.world_size)
        for first in range(0, len(mine), _BATCH):
            numbers = mine[first : first + _BATCH]
            placed = [self._candidate(version, number) for number in numbers]
            images = np.stack([self._reader.image(scan_id, start, self._size) for scan_id, start in placed])
            logits = teacher(torch.from_numpy(images)[:, None].to(device, dtype)).logits.float()
            unsure = entropy_nats(logits, dim=1) > UNSURE * math.log(logits.shape[1])
            worth = (unsure | (best_class(logits) > 0)).cpu().numpy()
            for number, (_, start), mask in zip(numbers, placed, worth, strict=True):
                voxels = np.argwhere(mask)
                if len(voxels):
                    rng = generator(self._seed, Purpose.DOUBT, version, number, 1)
                    chosen = voxels[rng.integers(len(voxels), size=CENTRES_PER_PATCH)] + np.asarray(start)
                    found[number] = torch.from_numpy(chosen).to(found)
                    valid[number] = 1.0
        self._communicator.all_reduce_sum(found)
        self._communicator.all_reduce_sum(valid)
        scans = [self._candidate(version, number)[0] for number in range(CANDIDATES)]
        entries: list[Centre] = []
        for n, i in np.argwhere(valid.cpu().numpy() > 0).tolist():
            z, y, x = (round(c) for c in found[n, i].tolist())
            entries.append((scans[n], (z, y, x)))
        # Not read from the file again: of a run behind a URL rank 0's folder is not every rank's.
        self._lists[version] = entries
        if self._communicator.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file(version), json.dumps(entries))
        self._communicator.barrier()

    def _candidate(self, version: int, number: int) -> tuple[str, tuple[int, int, int]]:
        """Scan and corner of a patch to look at."""
        rng = generator(self._seed, Purpose.DOUBT, version, number, 0)
        scan_id = self._scan_ids[int(rng.integers(len(self._scan_ids)))]
        body = self._reader.placement(scan_id).body
        centre = body[int(rng.integers(len(body)))]
        z, y, x = (int(c) - n // 2 for c, n in zip(centre, self._size, strict=True))
        return scan_id, (z, y, x)

    def _file(self, version: int) -> Path:
        return self._folder / f"v_{version:04d}.json"
