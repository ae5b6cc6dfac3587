"""The folders that images come in. Each layout's module draws its tree.

Plain folder        SOURCE/*.nii[.gz]: every image is unlabelled
`nnunet`            dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz
`decathlon`         dataset.json with lists of files, imagesTr/CASE.nii.gz
`totalsegmentator`  CASE/ct.nii.gz, CASE/segmentations/*.nii.gz
`dicom_folder`      DICOM series, with NIfTI, DICOM-SEG or RTSTRUCT labels

Each may have SOURCE/splits.json {"train": [...], "val": [...], "test": [...]} of case names. What is wrong with one
case is one line in `Source.failures` or one DataError, and the other cases go on; what is wrong with the source as a
whole raises.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from distseg.data.dicom.folder import any_dicom
from distseg.data.formats.case import Case, ImageSource, LabelSource, NiftiImage, NiftiLabel, Source, safe_id
from distseg.data.formats.decathlon import discover_decathlon, is_decathlon
from distseg.data.formats.dicom_folder import Salt, discover_dicom
from distseg.data.formats.files import SPLIT_NAMES, nifti_files, read_json, source_of
from distseg.data.formats.nnunet import discover_nnunet
from distseg.data.formats.totalsegmentator import discover_totalsegmentator, is_totalsegmentator
from distseg.errors import ConfigError, DataError, InputError

__all__ = [
    "SPLIT_NAMES",
    "Case",
    "ImageSource",
    "LabelSource",
    "NiftiImage",
    "NiftiLabel",
    "Source",
    "discover",
    "safe_id",
]


def _no_salt() -> bytes:
    """For looks that keep nothing: ids differ from call to call."""
    return secrets.token_bytes(16)


def discover(
    source: str | Path, *, structures: Sequence[str] | None = None, only_images: bool = False, salt: Salt = _no_salt
) -> Source:
    """What there is to ingest under `source`; no case, but failures, where none of its cases can be used.

    structures: masks, segments or ROIs that become the classes 1, 2, ..., where the layout has such. only_images: a
    case's label is only there or not, and is not read. salt: gives the key that ids of DICOM series are hashed with;
    asked for only where there are any. Raises InputError / DataError for
    a source unusable as a whole, a folder without any case included.
    """
    root = Path(source)
    if not root.is_dir():
        fix = "give a folder of NIfTI or DICOM, or one of the layouts in the README"
        raise InputError("no such folder", where="source", value=root, fix=fix)
    found = _discover(root, structures, only_images, salt)
    if not found.cases and not found.failures:
        rule = "a folder of *.nii.gz or DICOM series, nnU-Net raw, Medical Segmentation Decathlon or TotalSegmentator"
        raise InputError("no image found", where=root, rule=rule, fix="check source=")
    if structures is not None and found.kind not in ("totalsegmentator", "dicom"):
        rule = "TotalSegmentator and DICOM sources choose their classes; others name them in dataset.json"
        raise ConfigError("not for this source", where="data.structures", value=found.kind, rule=rule, fix="drop it")
    return found


def _discover(root: Path, structures: Sequence[str] | None, only_images: bool, salt: Salt) -> Source:
    if (root / "dataset.json").is_file():
        dataset = read_json(root / "dataset.json")
        return discover_decathlon(root, dataset) if is_decathlon(root, dataset) else discover_nnunet(root, dataset)
    if (root / "imagesTr").exists():
        rule = "an nnU-Net raw folder has dataset.json with channel_names and labels"
        raise DataError("imagesTr without dataset.json", where=root, rule=rule, fix="add dataset.json")
    if is_totalsegmentator(root):
        return discover_totalsegmentator(root, structures, only_images=only_images)
    if any_dicom(root):
        return discover_dicom(root, structures, salt, only_images=only_images)
    by_name, failures = nifti_files(root)
    cases = {name: Case(safe_id(name), NiftiImage(path)) for name, path in by_name.items()}
    names_are = "a file's name without .nii or .nii.gz"
    return source_of(
        root, "folder", cases, failures, classes={"background": 0}, channel_names=None, names_are=names_are
    )
