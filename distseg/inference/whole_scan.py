"""A trained model applied to one whole scan: the model kept per process, its threads, its intensity and window."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distseg.data.carry import read_file
from distseg.data.place import is_url
from distseg.errors import DataError
from distseg.inference.model import Model, find_model, load_model
from distseg.inference.sliding_window import segment

WINDOWS_A_BATCH = 4  # a batch of one misses torch's fast convolutions on a CPU (tests/bench/RESULTS.md)


@dataclass(frozen=True)
class ScanIntensity:
    """What normalisation and padding need to know of a scan: its minimum, mean and sd of its nonzero voxels."""

    minimum: float
    nonzero_mean: float
    nonzero_sd: float

    @classmethod
    def of(cls, array: np.ndarray) -> ScanIntensity:
        """By the rule of the cohort store."""
        nonzero = array[array != 0]
        if not nonzero.size:
            return cls(float(array.min()), 0.0, 0.0)
        return cls(float(array.min()), float(nonzero.mean(dtype=np.float64)), float(nonzero.std(dtype=np.float64)))


def model_fingerprint(run: str | Path) -> str:
    """Digest of model.json, which holds the digests of the weights: another training, another fingerprint."""
    file = find_model(run) / "model.json"
    content = read_file(file) if is_url(run) else file.read_bytes()
    return hashlib.sha256(content or b"").hexdigest()


@lru_cache(maxsize=1)
def cached_model(run: str, fingerprint: str) -> tuple[Model, torch.device]:
    """The run's model, loaded once a process, on this process' GPU where it may see one.

    Raises DataError if the model is not the one `fingerprint` names: the run was trained on while this job ran.
    """
    if model_fingerprint(run) != fingerprint:
        raise DataError("the model changed while it was in use", where=run, fix="start again when training is done")
    model = load_model(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in model.networks.values():
        network.to(device)
    return model, device


def use_threads(share: int) -> None:
    """At most `share` torch threads in this process; fewer where OMP_NUM_THREADS or the caller asked for fewer."""
    torch.set_num_threads(min(torch.get_num_threads(), share))


def segment_scan(
    model: Model,
    image: Any,
    *,
    networks: Sequence[str],
    spacing_mm: Sequence[float],
    intensity: ScanIntensity,
    overlap: float,
    device: torch.device,
    output_shape: Sequence[int] | None = None,
    output_spacing_mm: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """One uint8 mask [Z, Y, X] a network, on the output grid (by default the image's). See `segment`."""
    return segment(
        image,
        source_spacing_mm=spacing_mm,
        target_spacing_mm=model.spacing_mm,
        patch_zyx=model.patch_zyx,
        overlap=overlap,
        normalise=lambda box: model.intensity.normalise(
            box, nonzero_mean=intensity.nonzero_mean, nonzero_sd=intensity.nonzero_sd
        ),
        fill=intensity.minimum,
        predict={name: _logits_of(model.networks[name]) for name in networks},
        num_classes=len(model.class_names),
        batch_size=WINDOWS_A_BATCH,
        device=device,
        output_shape=output_shape,
        output_spacing_mm=output_spacing_mm,
    )


def _logits_of(network: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    def predict(windows: Tensor) -> Tensor:
        logits: Tensor = network(windows).logits
        return logits

    return predict
