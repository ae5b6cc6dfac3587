"""nnU-Net raw.

SOURCE/dataset.json                   classes and channel name
SOURCE/imagesTr/CASE_0000.nii[.gz]    one channel
SOURCE/labelsTr/CASE.nii[.gz]         absent: the image is unlabelled
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.data.formats.case import Case, NiftiImage, NiftiLabel, Source, safe_id
from distseg.data.formats.dataset_json import modality_of, read_channel, read_classes
from distseg.data.formats.files import Failures, nifti_files, source_of
from distseg.errors import DataError

_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def discover_nnunet(root: Path, dataset: Mapping[str, Any]) -> Source:
    """`dataset` is the content of dataset.json."""
    classes = read_classes(dataset, root / "dataset.json")
    channel_names = read_channel(dataset, root / "dataset.json")
    images, failures = nifti_files(_folder(root / "imagesTr"))
    labels_folder = root / "labelsTr"
    labels, label_failures = nifti_files(_folder(labels_folder)) if labels_folder.exists() else ({}, [])
    by_case, channel_failures = _by_case(images)
    failures = [(_case_of(name), why) for name, why in failures] + label_failures + channel_failures
    refused = {name for name, _ in failures}
    for case in sorted(set(labels) - set(by_case) - refused):
        rule = f"every label has its image imagesTr/{case}_0000.nii.gz"
        why = DataError("label without an image", where=labels[case].name, rule=rule, fix="add it or drop the label")
        failures.append((case, str(why)))
    modality = modality_of(channel_names)
    # A label that is there twice is a failure under its image's name: the image must not become an unlabelled one.
    cases = {
        name: Case(safe_id(name), NiftiImage(path, modality), NiftiLabel(labels[name]) if name in labels else None)
        for name, path in by_case.items()
    }
    names_are = "a CASE of imagesTr/CASE_0000.nii[.gz]"
    return source_of(root, "nnunet", cases, failures, classes=classes, channel_names=channel_names, names_are=names_are)


def is_channel_file(path: Path) -> bool:
    """Whether the name is nnU-Net's CASE_0000.nii[.gz], of any channel."""
    return re.search(r"_\d{4}\.nii(\.gz)?$", path.name.lower()) is not None


def _by_case(images: Mapping[str, Path]) -> tuple[dict[str, Path], Failures]:
    """Case -> its one image."""
    by_case: dict[str, Path] = {}
    extra_channels: set[str] = set()
    failures: Failures = []
    for name, path in sorted(images.items()):
        match = _CHANNEL.match(name)
        if match is None:
            why = DataError("no channel in the name", where=path.name, rule="imagesTr holds CASE_0000.nii[.gz]")
            failures.append((name, str(why)))
        elif match["channel"] == "0000":
            by_case[match["case"]] = path
        else:
            extra_channels.add(match["case"])
    for case in sorted(extra_channels):
        by_case.pop(case, None)
        rule = "one channel per scan; this file says the case has more"
        failures.append((case, str(DataError("more than one channel", where=f"{case}_0001", rule=rule))))
    return by_case, failures


def _case_of(name: str) -> str:
    match = _CHANNEL.match(name)
    return match["case"] if match else name


def _folder(path: Path) -> Path:
    """`path`, or where it points: git writes a link as a small text file where links are not available."""
    if path.is_dir():
        return path
    if path.is_file() and path.stat().st_size < 1024:
        target = path.parent / path.read_text(errors="replace").strip()
        if target.is_dir():
            return target
    raise DataError("no such folder", where=path, rule="an nnU-Net raw folder has imagesTr", fix="check source=")
