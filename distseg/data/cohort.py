"""The cohort store as it is read: an index that opens at once, scans that open when asked.

/x/cohort.zarr/             Zarr v3; attrs: format_version, classes, channel_names, spacing_mm
    SCAN_ID/                OME-Zarr 0.5 image; attrs: see `distseg.data.convert`
        0                   [Z, Y, X] image
        labels/annotation/0            uint8 [Z, Y, X]; absent: unlabelled
        labels/annotation_native/0     the label at native spacing; only where ingest resampled
        samples/voxels      int32 [n, 4] (region, z, y, x); region 0 is the body, region v the class of value v
        samples/intensities float32 [n]
/x/cohort.index.jsonl       a line a scan; of two lines for one scan the later counts; a cache that repair rebuilds
/x/cohort.sources.jsonl     where each scan came from; never in the store

/x may be an fsspec URL: s3://bucket/x.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distseg.config.untrusted import check_name, read_json
from distseg.data.arrays import StoredArray, open_array
from distseg.data.nifti import write_nifti
from distseg.data.place import as_place, join, reachable
from distseg.data.scan_attributes import DAMAGE, parse_all
from distseg.data.scan_files import lacking
from distseg.data.volume import Geometry, NativeGrid, Shape, Spacing, shape3, spacing3
from distseg.errors import DataError, InputError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ScanRecord:
    """One line of the index. `shape` and `spacing_mm` are the stored grid's; `sha256` is of the image file;
    `voxels` counts the label's foreground voxels per class on the stored grid, {} where unlabelled."""

    scan_id: str
    shape: Shape
    spacing_mm: Spacing
    labelled: bool
    split: str | None
    sha256: str
    label_sha256: str | None
    modality: str
    voxels: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {"id": data.pop("scan_id"), **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScanRecord:
        """Raises DataError for a line that lacks a field or holds something else in it."""
        try:
            return cls._parsed(data)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            what = f"a line of the cohort's index is damaged: {type(error).__name__} {error}"
            raise DataError(what, value=str(data)[:80], fix="run distseg cohort action=repair") from error

    @classmethod
    def _parsed(cls, data: Mapping[str, Any]) -> ScanRecord:
        return cls(
            scan_id=check_name(str(data["id"]), where="the cohort's index", what="scan id"),
            shape=shape3(data["shape"]),
            spacing_mm=spacing3(data["spacing_mm"]),
            labelled=bool(data["labelled"]),
            split=data["split"],
            sha256=str(data["sha256"]),
            label_sha256=data["label_sha256"],
            modality=str(data["modality"]),
            voxels={str(name): int(count) for name, count in data["voxels"].items()},
        )


@dataclass(frozen=True, eq=False)
class Foreground:
    """One class of one scan: `count` voxels inside `box` (start, stop), up to 2000 of them drawn as `samples` int32
    [n, 3] z, y, x on the stored grid, with the image's intensities there as `values` float32 [n]."""

    box: tuple[Shape, Shape]
    samples: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    count: int


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan of the store. Opens lazily: making the object reads nothing."""

    path: str
    scan_id: str

    @cached_property
    def attrs(self) -> dict[str, Any]:
        attrs = read_attrs(as_place(self.path))
        if attrs is None or attrs.get("complete") is not True:
            fix = "run distseg cohort action=repair, then ingest again"
            raise DataError("scan is not complete in the store", where=self.scan_id, fix=fix)
        try:
            parse_all(attrs)
        except DAMAGE as error:
            what = f"the scan's attributes are damaged: {type(error).__name__} {str(error)[:200]}"
            raise DataError(what, where=self.scan_id, fix="ingest that scan again") from error
        return attrs

    @cached_property
    def geometry(self) -> Geometry:
        """The stored grid."""
        return Geometry.from_json(self.attrs["stored"])

    @cached_property
    def native(self) -> NativeGrid:
        return NativeGrid.from_json(self.attrs["native"])

    @cached_property
    def image(self) -> StoredArray:
        return self._on_grid("0")

    @cached_property
    def annotation(self) -> StoredArray | None:
        """The label on the stored grid, uint8; None where unlabelled."""
        return self._on_grid("labels/annotation/0") if self.attrs["labelled"] else None

    def native_annotation(self) -> npt.NDArray[np.uint8] | None:
        """The label [Z, Y, X] at native spacing, voxel for voxel the source's; None where unlabelled."""
        if not self.attrs["labelled"]:
            return None
        name = "annotation_native" if self.attrs["resampled"] else "annotation"
        return np.asarray(self._array(f"labels/{name}/0")[...], np.uint8)

    @cached_property
    def body_box(self) -> tuple[Shape, Shape]:
        """(start, stop) of the body on the stored grid; the whole volume where no body was found."""
        start, stop = self.attrs["body_box"]
        return shape3(start), shape3(stop)

    @cached_property
    def body_samples(self) -> npt.NDArray[np.int32]:
        """At least 2000 voxels [n, 3] z, y, x drawn uniformly, with replacement, inside the body."""
        voxels, _ = self._samples
        return voxels[voxels[:, 0] == 0, 1:]

    @cached_property
    def foreground(self) -> dict[str, Foreground]:
        """Per class that occurs; {} where unlabelled."""
        voxels, intensities = self._samples
        found = {}
        for name, entry in self.attrs["foreground"].items():
            of_class = voxels[:, 0] == int(entry["value"])
            box = (shape3(entry["box"][0]), shape3(entry["box"][1]))
            found[name] = Foreground(box, voxels[of_class, 1:], intensities[of_class], int(entry["count"]))
        return found

    @property
    def minimum(self) -> float:
        return float(self.attrs["intensity"]["minimum"])

    @property
    def nonzero_mean(self) -> float:
        return float(self.attrs["intensity"]["nonzero_mean"])

    @property
    def nonzero_sd(self) -> float:
        return float(self.attrs["intensity"]["nonzero_sd"])

    @property
    def modality(self) -> str:
        return str(self.attrs["modality"])

    def write_mask(self, path: str | Path, mask: npt.NDArray[Any]) -> None:
        """`mask` [Z, Y, X] at native spacing -> a NIfTI of uint8 in the grid of the source file."""
        write_nifti(path, self.native.from_canonical(np.asarray(mask, np.uint8)), self.native)

    @cached_property
    def _lacking(self) -> dict[str, str]:
        return lacking(as_place(self.path), self.attrs.get("files", {}))

    @cached_property
    def _samples(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        voxels = np.asarray(self._array("samples/voxels")[...], np.int32)
        return voxels, np.asarray(self._array("samples/intensities")[...], np.float32)

    def _on_grid(self, name: str) -> StoredArray:
        shape = self.geometry.shape  # first, as the attributes say whether the scan is whole
        array = self._array(name)
        if array.shape != shape:
            rule, fix = f"the scan's attributes say {shape}", "remove the scan, then ingest it again"
            where = f"{self.scan_id}/{name}"
            raise DataError("array and attributes differ in shape", where=where, value=array.shape, rule=rule, fix=fix)
        return array

    def _array(self, name: str) -> StoredArray:
        if name in self._lacking:
            rule, fix = "what is missing would read as zeros", "copy the store again, or ingest that scan again"
            value = self._lacking[name]
            raise DataError("the scan is not all there", where=self.scan_id, value=value, rule=rule, fix=fix)
        return open_array(f"{self.path}/{name}")


@dataclass(frozen=True)
class Cohort:
    """A cohort opened for reading: attributes and index only. Picklable; records are in the order of their ids."""

    path: str
    classes: dict[str, int]
    channel_names: dict[str, str]
    spacing_mm: Spacing | None
    records: list[ScanRecord] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path) -> Cohort:
        """Raises InputError where there is no cohort, DataError where its index is missing or of another version,
        OSError where the storage does not answer."""
        root = reachable(path)
        attrs = read_attrs(root)
        if attrs is None:
            raise InputError("no cohort there", where=root, fix="make one with distseg ingest source=... cohort=...")
        check_version(attrs, root)
        if not index_path(root).is_file():
            fix = f"run distseg cohort cohort={root} action=repair"
            raise DataError("the cohort's index is missing", where=index_path(root), fix=fix)
        records = sorted(read_index(root).values(), key=_scan_id)
        spacing = attrs.get("spacing_mm")
        try:
            return cls(
                path=str(root),
                classes={str(name): int(value) for name, value in attrs["classes"].items()},
                channel_names={str(key): str(name) for key, name in attrs["channel_names"].items()},
                spacing_mm=None if spacing is None else spacing3(spacing),
                records=records,
            )
        except DAMAGE as error:
            what = f"the cohort's attributes are damaged: {type(error).__name__} {str(error)[:200]}"
            raise DataError(what, where=root / "zarr.json", fix="ingest it again") from error

    @property
    def class_names(self) -> list[str]:
        """Index = label value; the background is first."""
        return sorted(self.classes, key=lambda name: self.classes[name])

    @property
    def modality(self) -> str:
        """What all scans are; "mixed" where they differ, "unknown" for an empty cohort."""
        found = {record.modality for record in self.records}
        if len(found) > 1:
            return "mixed"
        return found.pop() if found else "unknown"

    def select(self, split: str | None = None, labelled: bool | None = None) -> list[ScanRecord]:
        """Records of a split (None: all) that have a label or not (None: both)."""
        return [
            record
            for record in self.records
            if (split is None or record.split == split) and (labelled is None or record.labelled == labelled)
        ]

    def scan(self, scan_id: str) -> Scan:
        at = bisect.bisect_left(self.records, scan_id, key=_scan_id)
        if at == len(self.records) or self.records[at].scan_id != scan_id:
            raise InputError("no such scan", where=self.path, value=scan_id, fix="see distseg cohort action=list")
        return Scan(join(self.path, scan_id), scan_id)


def _scan_id(record: ScanRecord) -> str:
    return record.scan_id


def beside(cohort: Path, ending: str) -> Path:
    """/x/foo.zarr, "index.jsonl" -> /x/foo.index.jsonl."""
    stem = cohort.name.removesuffix(".zarr")
    return cohort.with_name(f"{stem}.{ending}")


def index_path(cohort: Path) -> Path:
    return beside(cohort, "index.jsonl")


def sources_path(cohort: Path) -> Path:
    return beside(cohort, "sources.jsonl")


def read_attrs(group: Path) -> dict[str, Any] | None:
    """The attributes of a Zarr v3 group, None where there is none or it is damaged. Raises OSError where the storage
    does not say: who takes that for "nothing there" would write over what is."""
    try:
        node = read_json(group / "zarr.json")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    attrs = node.get("attributes") if isinstance(node, dict) and node.get("node_type") == "group" else None
    return attrs if isinstance(attrs, dict) else None


def check_version(attrs: Mapping[str, Any], where: Path) -> None:
    got = attrs.get("format_version")
    if got != FORMAT_VERSION:
        newer = isinstance(got, int) and got > FORMAT_VERSION
        rule, fix = f"format_version {FORMAT_VERSION}", "install a newer distseg" if newer else "ingest it again"
        raise DataError("not a cohort of this version", where=where, value=got, rule=rule, fix=fix)


def read_index(cohort: Path) -> dict[str, ScanRecord]:
    """Scan id -> its last line; {} without an index."""
    records = [ScanRecord.from_json(line) for line in read_lines(index_path(cohort))]
    return {record.scan_id: record for record in records}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file. A last line without its newline was cut off while being written: left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        if not text.strip():
            continue
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError) as error:
            fix = "run distseg cohort action=repair"
            raise DataError("line is not JSON", where=f"{path}:{number}", value=error, fix=fix) from error
    return lines
