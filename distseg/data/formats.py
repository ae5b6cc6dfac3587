"""NIfTI files and the folders they come in.

Plain folder        SOURCE/*.nii[.gz]                     every image is unlabelled
nnU-Net raw         SOURCE/dataset.json                   classes and channel name
                    SOURCE/imagesTr/CASE_0000.nii[.gz]    one channel
                    SOURCE/labelsTr/CASE.nii[.gz]         absent: the image is unlabelled
                    SOURCE/splits.json                    optional {"train": [...], "val": [...], "test": [...]};
                                                          where it is there it names every case

What is wrong with one case is one line in `Source.failures` or one DataError, and the other cases go on; what is wrong
with the source as a whole raises. `distseg.data.nifti` reads and checks the single file.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distseg.data.nifti import read_label, read_nifti, write_nifti
from distseg.errors import DataError, InputError

__all__ = ["Case", "Source", "discover", "read_label", "read_nifti", "safe_id", "write_nifti"]

SUFFIXES = (".nii.gz", ".nii")
SPLIT_NAMES = ("train", "val", "test")
SPLITS_FILE = "splits.json"
MOST_NAMED = 5
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True)
class Case:
    """One image of a source. `split` is None where the source has no splits.json."""

    scan_id: str
    image: Path
    label: Path | None = None
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """`kind` is "folder" or "nnunet"; `classes` name -> label value, background 0; `modality` None: guess per scan."""

    kind: str
    classes: dict[str, int]
    channel_names: dict[str, str] | None
    cases: list[Case]
    failures: list[tuple[str, str]] = field(default_factory=list)
    has_splits: bool = False
    notes: tuple[str, ...] = ()  # what a user should be told

    @property
    def modality(self) -> str | None:
        if self.channel_names is None:
            return None
        name = self.channel_names["0"]
        return "CT" if name.upper() == "CT" else name


def discover(source: str | Path) -> Source:
    """What there is to ingest under `source`; no case, but failures, where none of its cases can be used. Raises
    InputError / DataError for a source unusable as a whole, a folder without any case included."""
    root = Path(source)
    if not root.is_dir():
        raise InputError("no such folder", where="source", value=root, fix="give a folder of NIfTI or an nnU-Net one")
    if (root / "dataset.json").is_file():
        found = _discover_nnunet(root)
    elif (root / "imagesTr").exists():
        rule = "an nnU-Net raw folder has dataset.json with channel_names and labels"
        raise DataError("imagesTr without dataset.json", where=root, rule=rule, fix="add dataset.json")
    else:
        found = _discover_folder(root)
    if not found.cases and not found.failures:
        rule = "a folder of *.nii or *.nii.gz, or nnU-Net raw (dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/)"
        raise InputError("no image found", where=root, rule=rule, fix="check source=")
    return found


def safe_id(name: str) -> str:
    """A scan id that is one safe path component of [A-Za-z0-9._-]; a name that is not gets a hash of itself appended,
    so that cleaning never makes two names one."""
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) and name != "zarr.json":
        return name
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:80]
    return f"{cleaned or 'scan'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _discover_folder(root: Path) -> Source:
    by_name, failures = _nifti_files(root)
    cases = [Case(safe_id(name), path) for name, path in sorted(by_name.items())]
    return Source("folder", {"background": 0}, None, cases, failures)


def _discover_nnunet(root: Path) -> Source:
    classes, channel_names = _read_dataset_json(root / "dataset.json")
    images, failures = _nifti_files(_folder(root / "imagesTr"))
    labels_folder = root / "labelsTr"
    labels, label_failures = _nifti_files(_folder(labels_folder)) if labels_folder.exists() else ({}, [])
    failures = [(_case_of(name), why) for name, why in failures] + label_failures
    splits = _read_splits(root / SPLITS_FILE)
    by_case: dict[str, Path] = {}
    extra_channels: set[str] = set()
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
    refused = {name for name, _ in failures}
    if splits is not None and (by_case or failures):
        failures += _split_failures(splits, by_case, refused)
        refused = {name for name, _ in failures}
    for case in sorted(set(labels) - set(by_case) - refused):
        rule = f"every label has its image imagesTr/{case}_0000.nii.gz"
        why = DataError("label without an image", where=labels[case].name, rule=rule, fix="add it or drop the label")
        failures.append((case, str(why)))
    # A label that is there twice must not make its image an unlabelled one.
    cases = [
        Case(safe_id(case), path, labels.get(case), (splits or {}).get(case))
        for case, path in sorted(by_case.items())
        if case not in refused
    ]
    unnamed = [case for case in by_case if splits is not None and case not in splits and case not in refused]
    notes = (f"{len(unnamed)} cases are in no split of {SPLITS_FILE}: they train",) if unnamed else ()
    return Source("nnunet", classes, channel_names, cases, failures, has_splits=splits is not None, notes=notes)


def _split_failures(splits: dict[str, str], by_case: dict[str, Path], refused: set[str]) -> list[tuple[str, str]]:
    """The names in splits.json without a case, as one line. Where there are any, a case that it does not name may be
    one of them, misspelt and to be held out, so it is not taken."""
    found = []
    without = sorted(set(splits) - set(by_case) - refused)
    if without:
        for case in sorted(set(by_case) - set(splits) - refused):
            rule = "it may be one of the names there that have no image, and be meant to be held out"
            why = DataError("case is not in splits.json", where=by_case[case].name, rule=rule, fix="add it there")
            found.append((case, str(why)))
        named = ", ".join(without[:MOST_NAMED]) + (
            f" and {len(without) - MOST_NAMED} more" if len(without) > MOST_NAMED else ""
        )
        rule, fix = "each is a CASE of imagesTr/CASE_0000.nii[.gz]", "correct them, add the images or drop the names"
        why = DataError("names without an image", where=SPLITS_FILE, value=named, rule=rule, fix=fix)
        found.append((SPLITS_FILE, str(why)))
    return found


def _case_of(name: str) -> str:
    match = _CHANNEL.match(name)
    return match["case"] if match else name


def _nifti_files(folder: Path) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """File name without suffix -> file; hidden files are left out, a name that is there twice is a failure."""
    by_name: dict[str, Path] = {}
    twice: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix is None or path.name.startswith("."):
            continue
        name = path.name[: -len(suffix)]
        if name in by_name:
            rule = "one file per case name"
            both = f"{by_name[name].name} and {path.name}"
            twice[name] = str(DataError("duplicate case name", where=both, rule=rule, fix="remove or rename one"))
        by_name[name] = path
    return {name: path for name, path in by_name.items() if name not in twice}, sorted(twice.items())


def _folder(path: Path) -> Path:
    """`path`, or where it points: git writes a link as a small text file where links are not available."""
    if path.is_dir():
        return path
    if path.is_file() and path.stat().st_size < 1024:
        target = path.parent / path.read_text(errors="replace").strip()
        if target.is_dir():
            return target
    raise DataError("no such folder", where=path, rule="an nnU-Net raw folder has imagesTr", fix="check source=")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("not readable as JSON", where=path, value=error) from error
    if not isinstance(data, dict):
        raise DataError("not a JSON object", where=path, value=type(data).__name__)
    return data


def _read_dataset_json(path: Path) -> tuple[dict[str, int], dict[str, str]]:
    data = _read_json(path)
    channels = data.get("channel_names", data.get("modality"))
    if not isinstance(channels, dict) or "0" not in channels:
        rule = 'channel_names is {"0": "CT"} or another name'
        raise DataError("no channel name", where=path, value=channels, rule=rule, fix="add channel_names")
    if len(channels) > 1:
        raise DataError("more than one channel", where=path, value=channels, rule="one channel per scan")
    labels = data.get("labels")
    if not isinstance(labels, dict):
        rule = 'labels is {"background": 0, "mandible": 1}'
        raise DataError("no classes", where=path, value=labels, rule=rule, fix="add labels")
    if all(str(key).isdigit() and isinstance(value, str) for key, value in labels.items()):
        labels = {value: int(key) for key, value in labels.items()}  # nnU-Net v1 writes it the other way round
    rule = "label values are 0 (background), 1, 2, ... without gaps, at most 255; no regions, no ignore label"
    values = list(labels.values())
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values) or "ignore" in labels:
        raise DataError("classes not understood", where=path, value=labels, rule=rule)
    if sorted(values) != list(range(len(values))) or not 1 <= len(values) <= 256:
        raise DataError("classes not understood", where=path, value=labels, rule=rule)
    ordered = dict(sorted(((str(name), int(value)) for name, value in labels.items()), key=lambda item: item[1]))
    return ordered, {"0": str(channels["0"])}


def _read_splits(path: Path) -> dict[str, str] | None:
    """Case -> split; None without the file. A case in two splits would leak, so it is refused."""
    if not path.is_file():
        return None
    splits: dict[str, str] = {}
    for split, cases in _read_json(path).items():
        if split not in SPLIT_NAMES or not isinstance(cases, list):
            rule = 'an object {"train": [...], "val": [...], "test": [...]} of case names'
            raise DataError("splits not understood", where=path, value=split, rule=rule)
        for case in cases:
            if splits.get(str(case), split) != split:
                rule = "a case is in one split only"
                raise DataError("case in two splits", where=path, value=case, rule=rule, fix="remove one")
            splits[str(case)] = split
    return splits
