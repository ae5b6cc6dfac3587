"""What predict is given: one NIfTI or DICOM file, a folder of NIfTI, or DICOM series below a folder; and its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.data.dicom.file import looks_like_dicom
from distseg.data.dicom.folder import any_dicom, find_series
from distseg.data.dicom.series import DicomSeries
from distseg.data.formats import ImageSource, NiftiImage, safe_id
from distseg.errors import InputError

SUFFIXES = (".nii.gz", ".nii")
CHANNEL = "_0000"  # nnU-Net's first channel; the mask is named without it


@dataclass(frozen=True)
class Input:
    """`name` is the input's as a user knows it."""

    name: str
    image: ImageSource
    mask: Path


def find_inputs(source: Path, output: Path) -> tuple[list[Input], list[tuple[str, str]], list[str]]:
    """Inputs in the order of their names, those that cannot be used with one line why, and notes. Raises InputError
    where there is nothing to read, or where two would give one mask."""
    if source.is_file():
        return [_one_file(source, output)], [], []
    if not source.is_dir():
        raise InputError("no such file or folder", where="input", value=source)
    images = sorted(path for path in source.iterdir() if is_nifti(path) and path.is_file() and path.name[0] != ".")
    if any_dicom(source):
        if images:
            rule = "a folder of NIfTI or of DICOM"
            raise InputError("NIfTI and DICOM in one folder", where="input", value=images[0].name, rule=rule)
        return _series(source, output)
    if is_nifti(output):
        rule = "a folder, where the input is one"
        raise InputError("a folder of images cannot go into one file", where="output", value=output, rule=rule)
    if not images:
        rule = "names in .nii.gz or .nii, or DICOM series"
        raise InputError("no NIfTI file in the folder", where="input", value=source, rule=rule)
    return _nifti_folder(images, output), [], []


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _one_file(source: Path, output: Path) -> Input:
    if is_nifti(source):
        image: ImageSource = NiftiImage(source)
        mask_name = _mask_name(source)
    elif looks_like_dicom(source):  # enhanced multi-frame, or refused for what it is when read
        image, mask_name = DicomSeries(source, (source,)), f"{safe_id(source.stem)}.nii.gz"
    else:
        rule = "a name in .nii.gz or .nii, or DICOM"
        raise InputError("not a NIfTI file", where="input", value=source, rule=rule)
    return Input(source.name, image, output if is_nifti(output) else output / mask_name)


def _series(source: Path, output: Path) -> tuple[list[Input], list[tuple[str, str]], list[str]]:
    found = find_series(source)
    if is_nifti(output) and len(found.series) != 1:
        rule = "a folder, where the input is not one series"
        raise InputError("series cannot go into one file", where="output", value=output, rule=rule)
    inputs = [
        Input(one.name, one.image, output if is_nifti(output) else output / f"{safe_id(one.name)}.nii.gz")
        for one in found.series
    ]
    if not inputs and not found.failures:
        raise InputError("no CT or MR series in the folder", where="input", value=source)
    return inputs, list(found.failures), list(found.notes)


def _nifti_folder(images: Sequence[Path], output: Path) -> list[Input]:
    further = [path.name for path in images if _channel(path) not in (None, "0000")]
    if further:
        rule = "one channel an image (_0000)"
        raise InputError("images have more than one channel", where="input", value=further[0], rule=rule)
    inputs: dict[Path, Input] = {}
    for image in images:
        mask = output / _mask_name(image)
        if mask in inputs:
            where = f"{inputs[mask].name} and {image.name}"
            raise InputError("two images would give one mask", where=where, value=mask.name, fix="rename one of them")
        inputs[mask] = Input(image.name, NiftiImage(image), mask)
    return list(inputs.values())


def _stem(path: Path) -> str:
    suffix = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    return path.name[: -len(suffix)]


def _channel(path: Path) -> str | None:
    """nnU-Net's channel number, None where the folder does not name its files so (or for a plain four-digit name)."""
    head, _, tail = _stem(path).rpartition("_")
    siblings = (path.with_name(f"{head}{CHANNEL}{suffix}") for suffix in SUFFIXES)
    is_channel = bool(head) and len(tail) == 4 and tail.isdigit() and any(sibling.exists() for sibling in siblings)
    return tail if is_channel else None


def _mask_name(image: Path) -> str:
    return _stem(image).removesuffix(CHANNEL) + ".nii.gz"
