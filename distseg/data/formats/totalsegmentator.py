"""TotalSegmentator: a folder a case.

SOURCE/CASE/ct.nii.gz                       or mri.nii.gz
SOURCE/CASE/segmentations/STRUCTURE.nii.gz  a binary mask each; the folder absent: the image is unlabelled

`structures` (data.structures) name the masks that become the classes 1, 2, ... Where masks overlap the one named last
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distseg.data.formats.case import Case, LabelSource, NiftiImage, NiftiMasks, Source, classes_of, safe_id
from distseg.data.formats.files import MOST_NAMED, SUFFIXES, Failures, nifti_files, source_of
from distseg.errors import DataError, InputError

MODALITIES = {"ct": "CT", "mri": "MR"}
MASKS_FOLDER = "segmentations"


def is_totalsegmentator(root: Path) -> bool:
    return any(_images(folder) for folder in _folders(root))


def discover_totalsegmentator(root: Path, structures: Sequence[str] | None, *, only_images: bool = False) -> Source:
    """Raises InputError where there are masks and `structures` is None; an empty list takes no labels. `only_images`
    asks which cases have masks, and no more."""
    cases: dict[str, Case] = {}
    failures: Failures = []
    for folder in _folders(root):
        try:
            cases[folder.name] = _case(folder, structures, only_images)
        except DataError as error:
            failures.append((folder.name, str(error)))
    found = {case.image.modality for case in cases.values() if isinstance(case.image, NiftiImage)}
    channel_names = {"0": str(next(iter(found)))} if len(found) == 1 else None
    return source_of(
        root,
        "totalsegmentator",
        cases,
        failures,
        classes=classes_of(structures or ()),
        channel_names=channel_names,
        names_are="a folder CASE of CASE/ct.nii.gz",
    )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return [path for name in MODALITIES for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]


def _case(folder: Path, structures: Sequence[str] | None, only_images: bool) -> Case:
    images = _images(folder)
    if len(images) != 1:
        what = "more than one image" if images else "no image"
        value = " and ".join(path.name for path in images) or None
        rule = "a case folder holds one ct.nii.gz or mri.nii.gz"
        raise DataError(what, where=folder.name, value=value, rule=rule)
    modality = MODALITIES[images[0].name.split(".")[0]]
    return Case(safe_id(folder.name), NiftiImage(images[0], modality), _label(folder, structures, only_images))


def _label(folder: Path, structures: Sequence[str] | None, only_images: bool) -> LabelSource | None:
    masks_folder = folder / MASKS_FOLDER
    if not masks_folder.is_dir() or (structures is not None and not structures):
        return None
    masks, twice = nifti_files(masks_folder)
    if only_images:
        return NiftiMasks(masks_folder, tuple(sorted(masks.items()))) if masks else None
    if structures is None:
        if not masks:
            return None
        some = ", ".join(sorted(masks)[:MOST_NAMED])
        rule = f"the masks that become classes 1, 2, ..., of {some} and {max(0, len(masks) - MOST_NAMED)} more"
        fix = f"set data.structures=[{sorted(masks)[0]},...], or data.structures=[] to take no labels"
        raise InputError("the source has masks; which are classes?", where="data.structures", rule=rule, fix=fix)
    refused = [why for name, why in twice if name in structures]
    if refused:
        raise DataError(refused[0])
    missing = [name for name in structures if name not in masks]
    if missing:
        rule = f"every structure of data.structures has its file in {MASKS_FOLDER}, empty where it is not in the image"
        raise DataError("structure without a mask", where=folder.name, value=", ".join(missing), rule=rule)
    return NiftiMasks(masks_folder, tuple((name, masks[name]) for name in structures))
