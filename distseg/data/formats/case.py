"""One case of a source, whatever it is stored as, and the NIfTI kinds of image and label."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from distseg.data.digest import combined_sha256, file_sha256
from distseg.data.nifti import read_label, read_masks, read_nifti
from distseg.data.volume import Volume


class ImageSource(Protocol):
    """An image that can be read; picklable. Every method raises DataError, in one line, for what cannot be used."""

    @property
    def path(self) -> Path:
        """Where it lies: for the file beside the cohort that says so, never for the store."""
        ...

    def sha256(self) -> str: ...

    def read(self) -> Volume: ...


class LabelSource(Protocol):
    """A label that can be read onto its image's grid; picklable. Raises DataError like an image."""

    @property
    def path(self) -> Path: ...

    def sha256(self) -> str: ...

    def read(self, *, image: Volume, classes: Mapping[str, int]) -> npt.NDArray[np.uint8]:
        """uint8 [Z, Y, X] in canonical axes, values of `classes`."""
        ...


@dataclass(frozen=True)
class NiftiImage:
    """`modality` None: guessed from the values."""

    path: Path
    modality: str | None = None

    def sha256(self) -> str:
        return file_sha256(self.path)

    def read(self) -> Volume:
        return read_nifti(self.path, modality=self.modality)


@dataclass(frozen=True)
class NiftiLabel:
    """One file whose voxel values are those of the classes."""

    path: Path

    def sha256(self) -> str:
        return file_sha256(self.path)

    def read(self, *, image: Volume, classes: Mapping[str, int]) -> npt.NDArray[np.uint8]:
        return read_label(self.path, image=image, classes=classes)


@dataclass(frozen=True)
class NiftiMasks:
    """One binary file a structure, in the order of the classes 1, 2, ...; where masks overlap, the later counts."""

    path: Path  # the folder
    masks: tuple[tuple[str, Path], ...]  # (structure, file)

    def sha256(self) -> str:
        return combined_sha256(f"{name} {file_sha256(path)}" for name, path in self.masks)

    def read(self, *, image: Volume, classes: Mapping[str, int]) -> npt.NDArray[np.uint8]:
        return read_masks(self.masks, image=image, classes=classes)


@dataclass(frozen=True)
class Case:
    """One image of a source. `split` is None where the source does not say one; `name` is what a failure is listed
    under where the id means nothing to a user."""

    scan_id: str
    image: ImageSource
    label: LabelSource | None = None
    split: str | None = None
    name: str | None = None

    @property
    def shown(self) -> str:
        return self.name or self.scan_id


@dataclass(frozen=True)
class Source:
    """`kind` is "folder", "nnunet", "decathlon", "totalsegmentator" or "dicom"; `classes` name -> label value,
    background 0; `channel_names` None: each scan says or is guessed."""

    kind: str
    classes: dict[str, int]
    channel_names: dict[str, str] | None
    cases: list[Case]
    failures: list[tuple[str, str]] = field(default_factory=list)
    has_splits: bool = False
    notes: tuple[str, ...] = ()  # what a user should be told


def safe_id(name: str) -> str:
    """A scan id that is one safe path component of [A-Za-z0-9._-]; a name that is not gets a hash of itself appended,
    so that cleaning never makes two names one."""
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) and name != "zarr.json":
        return name
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:80]
    return f"{cleaned or 'scan'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def classes_of(structures: Sequence[str]) -> dict[str, int]:
    """Structures in order -> classes 1, 2, ... after the background."""
    return {"background": 0, **{name: value for value, name in enumerate(structures, start=1)}}
