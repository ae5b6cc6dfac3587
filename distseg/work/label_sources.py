"""What there is to label: the scans of a cohort, or the images of a folder read directly."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distseg.data.cohort import Cohort, Scan, ScanRecord, read_attrs
from distseg.data.formats import discover
from distseg.data.formats.case import ImageSource
from distseg.data.formats.dicom_folder import Salt
from distseg.data.place import reachable
from distseg.data.volume import Geometry, NativeGrid, Shape, Spacing
from distseg.errors import InputError
from distseg.inference.whole_scan import ScanIntensity


@dataclass(frozen=True, slots=True)
class ScanSource:
    """One scan: a path of the store, or an image of a folder. `version` changes when the image does; shape and spacing
    are the stored grid's, None where only the file's header knows."""

    scan_id: str
    path: str
    version: str
    labelled: bool
    image: ImageSource | None  # None: in the store
    shape: Shape | None
    spacing_mm: Spacing | None


@dataclass(frozen=True, eq=False)
class OpenScan:
    """`image` is array-like [Z, Y, X], read by region (a store) or held (a file)."""

    image: Any
    geometry: Geometry
    native: NativeGrid
    intensity: ScanIntensity
    modality: str


@dataclass(frozen=True)
class Sources:
    """`cohort` is None for a folder. `failures`: (name, why) of what in a folder is no scan. `has_names`: they, and
    reasons why a scan fails, may hold names of patients, as folders and files of DICOM do."""

    scans: list[ScanSource]
    cohort: Cohort | None
    failures: list[tuple[str, str]]
    has_names: bool = False


def find_sources(where: str, *, only: str, salt: Salt | None = None) -> Sources:
    """The scans of a cohort store, or of a folder of images (any source of ingest). `only`: all | unlabelled.

    `salt` gives the key of DICOM ids, the same in each call that is to know them again; None: another each time.
    Raises InputError where there is neither, or nothing is left to label.
    """
    path = reachable(where)
    if read_attrs(path) is None:
        found = _from_folder(path, salt)
    else:
        cohort = Cohort.open(path)
        found = Sources([_stored(path, record) for record in cohort.records], cohort, [])
    scans = [scan for scan in found.scans if only == "all" or not scan.labelled]
    if not scans and not found.failures:
        rule = "label.only=unlabelled leaves annotated scans out" if found.scans else "at least one scan"
        raise InputError("nothing to label", where="cohort", value=where, rule=rule)
    return dataclasses.replace(found, scans=scans)


def open_scan(source: ScanSource) -> OpenScan:
    """Raises DataError, in one line, for a scan that cannot be used."""
    if source.image is None:
        scan = Scan(source.path, source.scan_id)
        intensity = ScanIntensity(scan.minimum, scan.nonzero_mean, scan.nonzero_sd)
        return OpenScan(scan.image, scan.geometry, scan.native, intensity, scan.modality)
    volume = source.image.read()
    return OpenScan(volume.array, volume.geometry, volume.native, ScanIntensity.of(volume.array), volume.modality)


def grid_of(source: ScanSource) -> tuple[Shape, Spacing]:
    """Shape and spacing Z Y X of the image as stored; a file is read for it. Raises DataError."""
    if source.shape is not None and source.spacing_mm is not None:
        return source.shape, source.spacing_mm
    geometry = open_scan(source).geometry
    return geometry.shape, geometry.spacing_mm


def _stored(path: Path, record: ScanRecord) -> ScanSource:
    return ScanSource(
        record.scan_id,
        str(path / record.scan_id),
        record.sha256[:16],
        record.labelled,
        image=None,
        shape=record.shape,
        spacing_mm=record.spacing_mm,
    )


def _from_folder(path: Path, salt: Salt | None) -> Sources:
    if not path.is_dir():
        raise InputError("no cohort and no folder of images there", where="cohort", value=path)
    found = discover(path, only_images=True) if salt is None else discover(path, only_images=True, salt=salt)
    scans = [
        ScanSource(
            case.scan_id,
            str(case.image.path),
            _version(case.image),
            case.label is not None,
            image=case.image,
            shape=None,
            spacing_mm=None,
        )
        for case in found.cases
    ]
    return Sources(scans, None, list(found.failures), has_names=found.kind == "dicom")


def _version(image: ImageSource) -> str:
    """A file's size and time, which cost nothing; a series is many files and is read."""
    if not image.path.is_file():
        return image.sha256()[:16]
    status = image.path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"
