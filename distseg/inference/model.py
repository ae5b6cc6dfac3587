"""The model artefact: all that predict, evaluate and label need of a run, and nothing of its training data.

    model/
      model.json            format, network, classes, spacing, intensity, patch, threshold, the step it is from
      student.safetensors   teacher.safetensors
      references/           of methods that match: what label matches against, see matching/bank.py

Weights are safetensors and model.json is plain JSON, so a model from a stranger cannot run code here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distseg.config.schema import MatchingConfig, NetworkConfig
from distseg.config.untrusted import read_json
from distseg.data.carry import get_folder, read_file
from distseg.data.intensity import Intensity
from distseg.data.place import as_place, is_url
from distseg.errors import DataError
from distseg.matching.bank import Matcher, build_bank_index, load_matcher, save_bank
from distseg.matching.references import ReferenceTable
from distseg.networks.unet import UNet3D

FORMAT = 1
_MAX_PATCH = 1024  # voxels along an axis
_MAX_PASSES = 64
NETWORKS = ("student", "teacher")
REFERENCES = "references"


@dataclass(frozen=True)
class ModelInfo:
    """model.json. Sizes and spacing are Z Y X; `class_names[0]` is the background."""

    class_names: tuple[str, ...]
    modality: str
    spacing_mm: tuple[float, float, float]
    patch_zyx: tuple[int, int, int]
    network: NetworkConfig
    intensity: Intensity
    method: str
    threshold_nats: float  # the run's reliability threshold at T = 0, for label
    step: int
    checkpoint: str  # last or val: how this step was chosen
    # How the teacher's passes were made, for label; the defaults are those of models written before it was kept.
    passes: int = 5
    teacher_noise_sigma: float = 0.01
    teacher_noise_clip: float | None = None
    uncertainty: str = "mean_of_entropies"
    whole: tuple[str, ...] = ()  # classes of one piece: masks keep their largest component alone

    def whole_values(self, components: str) -> tuple[int, ...]:
        """Label values of which masks keep the largest component; `components` is model or all (none is filtered)."""
        return tuple(self.class_names.index(name) for name in self.whole) if components == "model" else ()

    def of_others(self, modalities: Iterable[str]) -> str | None:
        """What a user should be told where scans are of another modality than those the model was trained on."""
        every = list(modalities)
        others = sorted({modality for modality in every if modality not in (self.modality, "unknown")})
        if not others or self.modality in ("unknown", "mixed"):
            return None
        count = sum(modality in others for modality in every)
        return f"{count} of {len(every)} scans are {' or '.join(others)}, the model was trained on {self.modality}"


@dataclass(frozen=True)
class Model:
    """A loaded model: both networks in eval mode on CPU."""

    info: ModelInfo
    networks: Mapping[str, UNet3D]
    folder: Path

    @property
    def patch_zyx(self) -> tuple[int, int, int]:
        return self.info.patch_zyx

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return self.info.spacing_mm

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.info.class_names

    @property
    def intensity(self) -> Intensity:
        return self.info.intensity

    @cached_property
    def matcher(self) -> Matcher | None:
        """What labels a voxel by references, on the CPU; None for a method without. Raises DataError if damaged."""
        references = self.folder / REFERENCES
        if not references.is_dir():
            return None
        return load_matcher(references, num_classes=len(self.info.class_names), device=torch.device("cpu"))


def build_network(config: NetworkConfig, *, num_classes: int, activation_checkpointing: bool = False) -> UNet3D:
    return UNet3D(
        num_classes=num_classes,
        base_filters=config.base_filters,
        levels=config.levels,
        widening=config.widening,
        dropout=config.dropout,
        dropout_rate=config.dropout_rate,
        activation_checkpointing=activation_checkpointing,
    )


def save_model(
    folder: Path,
    info: ModelInfo,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    references: ReferenceTable | None = None,
    matching: MatchingConfig | None = None,
) -> None:
    """Write beside, then swap in, so that a reader finds the old model or the new one. Rank 0 only.

    `references`, with the `matching` that they serve, go along where the method matches.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digests = {}
    for name in NETWORKS:
        file = partial / f"{name}.safetensors"
        save_file({k: v.detach().float().cpu().contiguous() for k, v in weights[name].items()}, file)
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    if references is not None and matching is not None:
        (partial / REFERENCES).mkdir()
        index = None
        if matching.kind == "index":
            index = build_bank_index(references, matching, num_classes=len(info.class_names), seed=0)
        save_bank(partial / REFERENCES, references, matching, index)
    content = {"format": FORMAT, **dataclasses.asdict(info), "sha256": digests}
    (partial / "model.json").write_text(json.dumps(content, indent=1))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_model(run: str | Path) -> Path:
    """The folder of the model of a run (or model) directory, here or behind a URL. Raises DataError if there is
    none."""
    place = as_place(run, key="run") if is_url(run) else Path(run)
    for folder in (place, place / "model"):
        file = folder / "model.json"
        if read_file(file) is not None if is_url(run) else file.is_file():
            return folder
    raise DataError(
        "no trained model here",
        where=run,
        rule="a run directory has model/model.json once its training is done",
        fix="run distseg train first, or correct run=",
    )


def load_model(run: str | Path) -> Model:
    """The model of a run (or model) directory, here or behind a URL. Raises DataError if there is none or it is
    damaged."""
    folder = find_model(run)
    if not is_url(run):
        return _load(folder)
    with tempfile.TemporaryDirectory(prefix="distseg-model-") as copies:
        copy = Path(copies) / "model"
        get_folder(folder, copy)
        model = _load(copy)
        _ = model.matcher  # while its files are here
        return model


def _load(folder: Path) -> Model:
    file = folder / "model.json"
    try:
        content = read_json(file, "model")
        if content["format"] != FORMAT:
            raise DataError("model of another format", where=file, value=content["format"], rule=f"must be {FORMAT}")
        info = _info(content)
        for name in NETWORKS:
            _check_weights(folder / f"{name}.safetensors", content["sha256"][name])
        networks = {name: _load_network(folder / f"{name}.safetensors", info) for name in NETWORKS}
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RuntimeError, SafetensorError),
    ) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"unreadable model: {type(error).__name__}: {str(error)[:200]}", where=folder) from error
    return Model(info, networks, folder)


def _info(content: dict[str, Any]) -> ModelInfo:
    names = {field.name for field in dataclasses.fields(ModelInfo)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items() if k in names}
    values["network"] = NetworkConfig(**content["network"])
    values["intensity"] = Intensity(**content["intensity"])
    info = ModelInfo(**values)
    _check(info)
    return info


def _check(info: ModelInfo) -> None:
    """What others allocate, repeat or write by. Raises DataError; TypeError where it is of another type."""
    sizes_fit = len(info.patch_zyx) == len(info.spacing_mm) == 3 and all(1 <= n <= _MAX_PATCH for n in info.patch_zyx)
    numbers = (
        info.threshold_nats,
        info.teacher_noise_sigma,
        *info.spacing_mm,
        *dataclasses.astuple(info.intensity)[1:],
    )
    rules = {
        "patch_zyx, spacing_mm": sizes_fit and min(info.spacing_mm) > 0,
        "numbers that are finite": all(math.isfinite(number) for number in numbers),
        "passes": 1 <= info.passes <= _MAX_PASSES,
        "class_names": 2 <= len(set(info.class_names)) == len(info.class_names) <= 256,
        "names": all(text.isprintable() for text in (*info.class_names, info.modality)),
        "whole": set(info.whole) <= set(info.class_names[1:]),
    }
    broken = [name for name, kept in rules.items() if not kept]
    if broken:
        raise DataError("no model that we write", where="model.json", value=", ".join(broken))


def _check_weights(file: Path, sha256: str) -> None:
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != sha256:
            raise DataError("model file does not match its checksum", where=file, fix="copy the model again")


def _load_network(file: Path, info: ModelInfo) -> UNet3D:
    state = load_file(file)
    with torch.device("meta"):  # allocates nothing, whatever model.json says
        expected = build_network(info.network, num_classes=len(info.class_names)).state_dict()
    if {name: value.shape for name, value in expected.items()} != {name: value.shape for name, value in state.items()}:
        raise DataError(
            "unreadable model: weights of another network than model.json says", where=file, fix="copy the model again"
        )
    network = build_network(info.network, num_classes=len(info.class_names))
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
