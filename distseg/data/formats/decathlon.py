"""Medical Segmentation Decathlon.

SOURCE/dataset.json             "labels" {"0": "background", "1": "spleen"}, "modality" {"0": "CT"},
                                "test" ["./imagesTs/CASE.nii.gz", ...], "training"
                                [{"image": "./imagesTr/CASE.nii.gz", "label": "./labelsTr/CASE.nii.gz"}, ...]
SOURCE/imagesTr/CASE.nii.gz     3-D, or 4-D with one channel

Only listed files are read. An entry of "training" without "label" is unlabelled; what "test" lists has no label and is
kept out of training as the split test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from distseg.data.formats.case import Case, NiftiImage, NiftiLabel, Source, safe_id
from distseg.data.formats.dataset_json import modality_of, read_channel, read_classes
from distseg.data.formats.files import Failures, nifti_files, nifti_stem, source_of
from distseg.data.formats.nnunet import is_channel_file
from distseg.errors import DataError


def is_decathlon(root: Path, dataset: Mapping[str, Any]) -> bool:
    """nnU-Net's older dataset.json has the list "training" too, but its files carry a channel number."""
    images = root / "imagesTr"
    listed = isinstance(dataset.get("training"), list)
    return listed and images.is_dir() and not any(is_channel_file(path) for path in images.iterdir())


def discover_decathlon(root: Path, dataset: Mapping[str, Any]) -> Source:
    """`dataset` is the content of dataset.json."""
    where = root / "dataset.json"
    classes, channel_names = read_classes(dataset, where), read_channel(dataset, where)
    modality = modality_of(channel_names)
    cases: dict[str, Case] = {}
    failures: Failures = []
    for image, label, split in _entries(dataset, where):
        name = nifti_stem(PurePosixPath(image)) or image
        try:
            case = Case(
                safe_id(name),
                NiftiImage(_listed_file(root, image), modality),
                None if label is None else NiftiLabel(_listed_file(root, label)),
                split,
            )
            if name in cases:
                raise DataError("case is listed twice", where="dataset.json", value=name, fix="list it once")
        except DataError as error:
            failures.append((name, str(error)))
            continue
        cases[name] = case
    unlisted = sorted(set(nifti_files(root / "imagesTr")[0]) - set(cases) - {name for name, _ in failures})
    tests = sum(case.split == "test" for case in cases.values())
    notes = [f"{tests} images of the list test have no label and do not train"] if tests else []
    notes += [f"{len(unlisted)} images of imagesTr are in no list of dataset.json and left out"] if unlisted else []
    return source_of(
        root,
        "decathlon",
        cases,
        failures,
        classes=classes,
        channel_names=channel_names,
        names_are="a CASE of imagesTr/CASE.nii.gz",
        notes=notes,
    )


def _entries(dataset: Mapping[str, Any], where: Path) -> Iterator[tuple[str, str | None, str | None]]:
    """(image, label, split) as dataset.json lists them."""
    for entry in dataset["training"]:
        image = entry.get("image") if isinstance(entry, dict) else entry
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(image, str) or not isinstance(label, str | None):
            rule = 'entries of training are {"image": "./imagesTr/CASE.nii.gz", "label": "./labelsTr/CASE.nii.gz"}'
            raise DataError("list not understood", where=where, value=str(entry)[:80], rule=rule)
        yield image, label, None
    tests = dataset.get("test", [])
    if not isinstance(tests, list):
        raise DataError("list not understood", where=where, value=str(tests)[:80], rule="test is a list of file names")
    for entry in tests:
        image = entry.get("image") if isinstance(entry, dict) else entry
        if not isinstance(image, str):
            raise DataError("list not understood", where=where, value=str(entry)[:80], rule="test lists file names")
        yield image, None, "test"


def _listed_file(root: Path, listed: str) -> Path:
    """Where a path of dataset.json lies. Raises DataError for one outside the source, or that is not there."""
    relative = PurePosixPath(listed)
    if relative.is_absolute() or ".." in relative.parts:
        rule = "a relative path inside the source"
        raise DataError("path leads out of the source", where="dataset.json", value=listed, rule=rule)
    path = root / relative
    if nifti_stem(path) is None:
        raise DataError("not a NIfTI file", where="dataset.json", value=listed, rule="a name in .nii.gz or .nii")
    try:
        there = path.is_file()
    except OSError:  # a name too long for the file system
        there = False
    if not there:
        raise DataError("listed file is not there", where="dataset.json", value=listed, fix="copy it, or drop the line")
    return path
