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
# Of a mask's file by its format; the first where the name is ours to choose.
MASK_SUFFIXES = {"nifti": SUFFIXES, "dicom_seg": (".dcm",)}
CHANNEL = "_0000"  # nnU-Net's first channel; the mask is named without it


@dataclass(frozen=True)
class Input:
    """`name` is the input's as a user knows it."""

    name: str
    image: ImageSource
    mask: Path


def find_inputs(source: Path, output: Path, format: str) -> tuple[list[Input], list[tuple[str, str]], list[str]]:
    """Inputs in the order of their names, those that cannot be used with one line why, and notes. Raises InputError
    where there is nothing to read, where two would give one mask, or where `format` is not for such inputs."""
    _check_output(output, format)
    found = _inputs(source, output, format)
    if format == "dicom_seg":
        for one in found[0]:
            if not isinstance(one.image, DicomSeries):
                rule = "it refers to the slices of a DICOM series"
                raise InputError(
                    "no DICOM-SEG of NIfTI", where="format", value=one.name, rule=rule, fix="set format=nifti"
                )
    return found


def is_mask(output: Path, format: str) -> bool:
    """Whether `output` names the mask's file rather than a folder."""
    return output.name.lower().endswith(MASK_SUFFIXES[format])


def _check_output(output: Path, format: str) -> None:
    for other in MASK_SUFFIXES:
        if other != format and is_mask(output, other):
            rule = f"a folder, or a name in {' or '.join(MASK_SUFFIXES[format])}, with format={format}"
            raise InputError("named as a mask of another format", where="output", value=output, rule=rule)


def _inputs(source: Path, output: Path, format: str) -> tuple[list[Input], list[tuple[str, str]], list[str]]:
    if source.is_file():
        return [_one_file(source, output, format)], [], []
    if not source.is_dir():
        raise InputError("no such file or folder", where="input", value=source)
    images = sorted(path for path in source.iterdir() if is_nifti(path) and path.is_file() and path.name[0] != ".")
    if output == source or (any_dicom(source) and output.is_relative_to(source)):
        rule = "the next call would take masks there for images, or for labels of the series"
        raise InputError("among the images", where="output", value=output, rule=rule, fix="choose one beside them")
    if any_dicom(source):
        if images:
            rule = "a folder of NIfTI or of DICOM"
            raise InputError("NIfTI and DICOM in one folder", where="input", value=images[0].name, rule=rule)
        return _series(source, output, format)
    if is_nifti(output):
        rule = "a folder, where the input is one"
        raise InputError("a folder of images cannot go into one file", where="output", value=output, rule=rule)
    if not images:
        rule = "names in .nii.gz or .nii, or DICOM series"
        raise InputError("no NIfTI file in the folder", where="input", value=source, rule=rule)
    return _nifti_folder(images, output), [], []


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _one_file(source: Path, output: Path, format: str) -> Input:
    if is_nifti(source):
        image: ImageSource = NiftiImage(source)
        mask_name = _mask_name(source)
    elif looks_like_dicom(source):  # enhanced multi-frame, or refused for what it is when read
        image, mask_name = DicomSeries(source, (source,)), f"{safe_id(source.stem)}{MASK_SUFFIXES[format][0]}"
    else:
        rule = "a name in .nii.gz or .nii, or DICOM"
        raise InputError("not a NIfTI file", where="input", value=source, rule=rule)
    return Input(source.name, image, output if is_mask(output, format) else output / mask_name)


def _series(source: Path, output: Path, format: str) -> tuple[list[Input], list[tuple[str, str]], list[str]]:
    found = find_series(source)
    is_file = is_mask(output, format)
    if is_file and len(found.series) != 1:
        rule = "a folder, where the input is not one series"
        raise InputError("series cannot go into one file", where="output", value=output, rule=rule)
    inputs = [
        Input(one.name, one.image, output if is_file else output / f"{safe_id(one.name)}{MASK_SUFFIXES[format][0]}")
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
