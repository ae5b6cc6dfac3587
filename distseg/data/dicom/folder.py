"""The CT and MR series below a folder, and what lies beside them."""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distseg.data.dicom.file import looks_like_dicom
from distseg.data.dicom.kinds import DicomFile, read_kind
from distseg.data.dicom.series import DicomSeries
from distseg.data.digest import file_sha256
from distseg.errors import DataError

Failures = list[tuple[str, str]]


@dataclass(frozen=True)
class FoundSeries:
    """`name` is unique below the folder looked through: the series' own folder, or its first file where others lie
    in that folder too. `uid` is "" where the files have none."""

    name: str
    uid: str
    frame_of_reference: str
    folder: Path
    image: DicomSeries


@dataclass(frozen=True)
class Found:
    """`labels` are DICOM-SEG and RTSTRUCT files; `others` any file that is not DICOM; `notes` say what is left out."""

    series: list[FoundSeries] = field(default_factory=list)
    labels: list[DicomFile] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    failures: Failures = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def any_dicom(root: Path) -> bool:
    """Whether a file below `root` is DICOM; stops at the first."""
    for path in walk_files(root, []):
        with contextlib.suppress(DataError):
            if _is_dicom(path):
                return True
    return False


def walk_files(root: Path, unreadable: list[tuple[Path, str]]) -> Iterator[Path]:
    """Regular files below `root`, hidden ones left out, folders and files by name; links are followed once. Folders
    that cannot be read are added to `unreadable`."""

    def note(error: OSError) -> None:
        unreadable.append((Path(error.filename), str(DataError("folder not readable", value=error.strerror))))

    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=note):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path


def find_series(root: Path) -> Found:
    """Look at every file below `root`. A file that cannot be read makes the one series of its folder a failure, for
    its slice would be missing; where it is not clear which series that is, it is a failure of its own."""
    images: list[DicomFile] = []
    unreadable: list[tuple[Path, str]] = []
    left_out: Counter[str] = Counter()
    found = Found()
    for path in walk_files(root, unreadable):
        try:
            if not _is_dicom(path):
                found.others.append(path)
                continue
            file = read_kind(path)
        except DataError as error:
            unreadable.append((path, str(error)))
            continue
        if file.kind == "image":
            images.append(file)
        elif file.kind in ("segmentation", "contours"):
            found.labels.append(file)
        elif file.kind != "directory":
            left_out["localizer" if file.kind == "localizer" else file.modality or "unknown"] += 1
    _sort_into_series(root, images, unreadable, found)
    if left_out:
        named = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        found.notes.append(f"DICOM files that are no slice of a CT or MR volume are left out: {named}")
    return found


def _is_dicom(path: Path) -> bool:
    return not path.name.lower().endswith((".nii", ".nii.gz", ".json")) and looks_like_dicom(path)


def _sort_into_series(
    root: Path, images: Iterable[DicomFile], unreadable: Iterable[tuple[Path, str]], found: Found
) -> None:
    groups: dict[tuple[str, ...], list[DicomFile]] = defaultdict(list)
    groups_in: dict[Path, set[tuple[str, ...]]] = defaultdict(set)  # folder -> series with files in it
    for file in images:
        groups[file.group].append(file)
        groups_in[file.path.parent].add(file.group)
    spoiled: dict[tuple[str, ...], str] = {}
    for path, why in unreadable:
        if len(groups_in[path.parent]) == 1:
            spoiled[next(iter(groups_in[path.parent]))] = why
        else:
            found.failures.append((str(path.relative_to(root)), why))
    taken: set[str] = set()
    for group, files in sorted(groups.items(), key=lambda item: str(item[1][0].path)):
        folder = Path(os.path.commonpath([file.path.parent for file in files]))
        alone = all(len(groups_in[file.path.parent]) == 1 for file in files)
        name = _name(root, folder) if alone else _name(root, files[0].path)
        name = _name(root, files[0].path) if name in taken else name
        taken.add(name)
        try:
            if group in spoiled:
                what = "a file of its folder cannot be read, so a slice may be missing"
                raise DataError(f"{what}: {spoiled[group]}")
            kept = _one_of_each(files)
        except DataError as error:
            found.failures.append((name, str(error)))
            continue
        image = DicomSeries(folder if alone else files[0].path, tuple(file.path for file in kept))
        found.series.append(FoundSeries(name, files[0].series, files[0].frame_of_reference, folder, image))


def _name(root: Path, path: Path) -> str:
    return root.name if path == root else path.relative_to(root).as_posix()


def _one_of_each(files: list[DicomFile]) -> list[DicomFile]:
    """The files without copies. Raises DataError where one series holds two patients, or two versions of a slice."""
    if len({file.patient for file in files}) > 1:
        where = f"{files[0].path.name} and {next(f for f in files if f.patient != files[0].patient).path.name}"
        rule = "one PatientID under one SeriesInstanceUID"
        raise DataError("two patients in one series", where=where, rule=rule, fix="give each its own series")
    by_instance: dict[str, list[DicomFile]] = defaultdict(list)
    for file in files:
        by_instance[file.instance or str(file.path)].append(file)
    for same in by_instance.values():
        if len(same) > 1 and len({file_sha256(file.path) for file in same}) > 1:
            where = f"{same[0].path.name} and {same[1].path.name}"
            raise DataError("two versions of one slice", where=where, rule="one file a SOPInstanceUID", fix="drop one")
    return [same[0] for same in by_instance.values()]
