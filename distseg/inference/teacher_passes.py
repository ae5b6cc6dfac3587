"""The teacher's stochastic passes over windows of one scan: mean probability and uncertainty (Xie et al. 2024, Eq 2).

A window's noise and dropout belong to (seed, scan, number of the window, pass), so labelling a scan again gives the
same bytes. On a GPU the key is the batch's: the same bytes on the same kind of device.

Shapes: B windows, M passes, K classes, E embedding width, p the window's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from distseg.data.keys import Purpose, generator, torch_generators, torch_seed
from distseg.networks.stochastic import pass_outputs
from distseg.networks.unet import UNet3D

DESCRIPTOR_STRIDE = 2  # of the voxels of a window, along each axis, that enter the scan's descriptor


@dataclass(frozen=True)
class PassSettings:
    """M passes, their input noise in z-scored units, and which uncertainty: as the run was trained."""

    passes: int
    noise_sigma: float
    noise_clip: float | None
    uncertainty: str  # mean_of_entropies (Eq 2) | entropy_of_mean


class TeacherPasses:
    """Of one scan. `descriptor` sums embeddings by their voxel's entropy: what the teacher was unsure about.

    Args:
        numbers: windows of the scan; blank ones share the draws of one number beyond them.
    """

    def __init__(
        self,
        teacher: UNet3D,
        settings: PassSettings,
        *,
        scan_id: str,
        seed: int,
        numbers: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._teacher, self._settings, self._device = teacher, settings, device
        self._seed, self.batch_size, self._blank_number = seed, batch_size, numbers
        self._scan_key = int.from_bytes(hashlib.sha256(scan_id.encode("utf-8", "surrogatepass")).digest()[:8], "little")
        self._blank: tuple[float, Tensor] | None = None
        self.descriptor = torch.zeros(teacher.embedding_width, device=device)

    def over(self, windows: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(index, [K + 1, pZ, pY, pX]) of each window [pZ, pY, pX]: mean probabilities and, last, entropy in nats.

        A window of one value (air, clipped) shows the network nothing: its passes are drawn once a scan and value, so
        that what is left out is drawing them again. No other window is skipped.
        """
        varied = []
        for i, window in enumerate(windows):
            low, high = (float(bound) for bound in window.aminmax())
            if low != high:
                varied.append(i)
                continue
            if self._blank is None or self._blank[0] != low:
                self._blank = low, self._run([window], [self._blank_number])[0]
            yield i, self._blank[1]
        for first in range(0, len(varied), self.batch_size):
            batch = varied[first : first + self.batch_size]
            yield from zip(batch, self._run([windows[i] for i in batch], [numbers[i] for i in batch]), strict=True)

    def drawn(self, count: int, most: int) -> list[int]:
        """`most` of the windows 0 .. count - 1, all where there are fewer; the same for the same scan and seed."""
        order = generator(self._seed, Purpose.LABEL, self._scan_key).permutation(count)
        return sorted(int(number) for number in order[:most])

    def embeddings(self, windows: Sequence[Tensor]) -> Tensor:
        """[B, E, pZ, pY, pX] of one deterministic pass, without dropout or noise, as references are embedded."""
        with self._precision():
            embeddings: Tensor = self._teacher(torch.stack(list(windows))[:, None].to(self._device)).embeddings
        return embeddings.float()

    def _run(self, windows: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        """[B, K + 1, pZ, pY, pX]."""
        images = torch.stack(list(windows))[:, None].to(self._device)
        s, batch = self._settings, len(windows)
        probabilities, entropy = torch.zeros(()), torch.zeros(())
        outputs = pass_outputs(
            self._teacher,
            images,
            passes=s.passes,
            noise_sigma=s.noise_sigma,
            noise_clip=s.noise_clip,
            generators=self._generators(numbers),
        )
        for first, output in enumerate(self._in_precision(outputs)):
            log_p = torch.log_softmax(output[0].float(), dim=1)
            p = log_p.exp()
            passwise = -(p * log_p).sum(1)  # [m B, ...]
            if first == 0:
                self._describe(output[1], passwise)
            p, passwise = (t.view(-1, batch, *t.shape[1:]).sum(0) for t in (p, passwise))
            probabilities, entropy = (p, passwise) if first == 0 else (probabilities + p, entropy + passwise)
        probabilities /= s.passes
        if s.uncertainty == "mean_of_entropies":
            entropy /= s.passes
        else:
            entropy = -torch.xlogy(probabilities, probabilities).sum(1)
        return torch.cat([probabilities, entropy[:, None]], dim=1)

    def _describe(self, embeddings: Tensor, entropy: Tensor) -> None:
        every = slice(None, None, DESCRIPTOR_STRIDE)
        thin = (..., every, every, every)
        unit = functional.normalize(embeddings[thin].float(), dim=1)
        self.descriptor += torch.einsum("bezyx,bzyx->e", unit, entropy[thin])

    def _in_precision(self, outputs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The networks alone run in half precision, not what is done with their outputs."""
        while True:
            with self._precision():
                output = next(outputs, None)
            if output is None:
                return
            yield output

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext()

    def _generators(self, numbers: Sequence[int]) -> list[torch.Generator] | None:
        if self._device.type == "cpu":
            return torch_generators(self._seed, Purpose.LABEL, self._scan_key, numbers, self._settings.passes)
        torch.manual_seed(torch_seed(self._seed, Purpose.LABEL, self._scan_key, numbers[0]))
        return None
