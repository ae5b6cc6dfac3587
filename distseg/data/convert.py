"""One scan into the store: read, check, resample where asked, write whole shards, and only then let it be seen.

The scan is written into a staging folder beside the store and renamed into place, its attribute `complete` last; so a
process killed at any point leaves either the whole scan or none. One process writes one scan.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from distseg.data.body import find_body
from distseg.data.cohort import ScanRecord, read_attrs
from distseg.data.formats import Case
from distseg.data.layout import image_attrs, write_array, write_labels, write_samples
from distseg.data.limits import needing_room
from distseg.data.place import as_place
from distseg.data.publish import put_in_place
from distseg.data.regions import box_and_voxels, count_by_plane
from distseg.data.scan_files import count_files, lacking
from distseg.data.values import INT16_OR_FLOAT, Narrowest, fits_int16, nonzero_mean_and_sd, slabs
from distseg.data.volume import Geometry, Spacing, Volume, resample_box, target_geometry
from distseg.errors import DataError

BODY_SAMPLES = 4000
CLASS_SAMPLES = 2000


@dataclass(frozen=True)
class Known:
    """What the store already holds under a case's id; `image` is the path it came from, None if not on record."""

    record: ScanRecord
    image: str | None


@dataclass(frozen=True)
class ScanTask:
    """All that one worker needs for one scan; picklable. `staging` is on the store's file system; "" for a store behind
    a URL: then a temporary folder of the worker's machine is taken."""

    case: Case
    cohort: str
    staging: str
    classes: dict[str, int]
    spacing_mm: Spacing | None
    known: Known | None = None


@dataclass(frozen=True)
class Converted:
    """`record` is what the index should say; `written` False: the store had this very scan already."""

    record: ScanRecord
    written: bool


def convert_scan(task: ScanTask) -> Converted:
    """Bring one case into the store. Raises DataError, in one line, for a file that cannot be used, OSError where the
    storage does not answer."""
    case = task.case
    image_sha256 = case.image.sha256()
    label_sha256 = None if case.label is None else case.label.sha256()
    if task.known is not None:
        kept = _already_there(task.known, case=case, image_sha256=image_sha256, label_sha256=label_sha256)
        if kept is not None and _is_whole(as_place(task.cohort) / case.scan_id, kept):
            return Converted(kept, written=False)
        if kept is not None and label_sha256 != kept.label_sha256:
            fix = "ingest it again from the folder that has its label"
            what = "the store no longer holds this scan as the index has it, with a label"
            raise DataError(what, where=case.scan_id, rule="this folder has no label of it", fix=fix)
    volume = case.image.read()
    label = None if case.label is None else case.label.read(image=volume, classes=task.classes)
    image, annotation, stored = _on_stored_grid(volume, label, task.spacing_mm)
    resampled = stored is not volume.geometry
    attrs, voxels, intensities = _describe(image, annotation, case.scan_id, volume.modality, task.classes)
    attrs |= {
        "split": case.split,
        "sha256": image_sha256,
        "label_sha256": label_sha256,
        "labelled": label is not None,
        "modality": volume.modality,
        "resampled": resampled,
        "native": volume.native.to_json(),
        "stored": stored.to_json(),
    }
    with contextlib.ExitStack() as later:
        folder = task.staging or later.enter_context(tempfile.TemporaryDirectory(prefix="distseg-"))
        staged = Path(folder) / f"{case.scan_id}-{uuid.uuid4().hex[:8]}"
        later.callback(shutil.rmtree, staged, ignore_errors=True)
        with needing_room("for this scan", case.scan_id):
            group = zarr.create_group(staged, zarr_format=3, attributes=image_attrs(stored))
            write_array(group, "0", image)
            if annotation is not None:
                native = (label, volume.geometry) if resampled else None
                write_labels(group, annotation=annotation, stored=stored, native=native, classes=task.classes)
            write_samples(group, voxels, intensities)
            group.update_attributes({**attrs, "files": count_files(staged)})
            group.update_attributes({"complete": True})
            put_in_place(staged, as_place(task.cohort) / case.scan_id)
    return Converted(record_of(case.scan_id, attrs), written=True)


def record_of(scan_id: str, attrs: dict[str, Any]) -> ScanRecord:
    """The index line that a stored scan's attributes say."""
    return ScanRecord.from_json(
        {
            **{name: attrs[name] for name in ("split", "sha256", "label_sha256", "labelled", "modality")},
            "id": scan_id,
            "shape": attrs["stored"]["shape"],
            "spacing_mm": attrs["stored"]["spacing_mm"],
            "voxels": {name: entry["count"] for name, entry in attrs["foreground"].items()},
        }
    )


def _already_there(known: Known, *, case: Case, image_sha256: str, label_sha256: str | None) -> ScanRecord | None:
    """The stored record if nothing is to be done. The same image without its label, from another folder, is no reason
    to drop the label; another image under the same id, from another folder, is another patient."""
    elsewhere = known.image is not None and known.image != str(case.image.path.absolute())
    if image_sha256 == known.record.sha256:
        same = label_sha256 == known.record.label_sha256
        return known.record if same or (label_sha256 is None and elsewhere) else None
    if elsewhere:
        rule = "the cohort holds another image under this id, from another folder"
        fix = "rename the case, or take the old scan out with distseg cohort action=remove"
        raise DataError("scan id is taken", where=case.scan_id, rule=rule, fix=fix)
    return None


def _is_whole(scan: Path, record: ScanRecord) -> bool:
    """Whether the store holds what the index says: a replacement behind a URL may have been cut off, or a copy of the
    store."""
    attrs = read_attrs(scan)
    if attrs is None or attrs.get("complete") is not True:
        return False
    same = (attrs.get("sha256"), attrs.get("label_sha256")) == (record.sha256, record.label_sha256)
    return same and not lacking(scan, attrs.get("files", {}))


def _on_stored_grid(
    volume: Volume, label: npt.NDArray[np.uint8] | None, spacing_mm: Spacing | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None, Geometry]:
    """Image and label on the grid to store. The image becomes int16 where its values are whole and fit, else float32;
    a resampled CT of whole numbers is rounded back to them (0.5 HU is far below its noise, float32 twice the bytes)."""
    whole = fits_int16(volume.array)
    if spacing_mm is None:
        image = volume.array.astype(np.int16 if whole else np.float32, copy=False)
        return image, label, volume.geometry
    stored = target_geometry(volume.geometry, spacing_mm)
    rounded = whole and volume.modality == "CT"
    kept = Narrowest(stored.shape, INT16_OR_FLOAT if whole else (np.float32,))
    annotation = None if label is None else np.empty(stored.shape, np.uint8)
    for planes in slabs(stored.shape):
        box: dict[str, Any] = {
            "source_spacing_mm": volume.geometry.spacing_mm,
            "target_spacing_mm": spacing_mm,
            "start_zyx": (planes.start, 0, 0),
            "size_zyx": (planes.stop - planes.start, *stored.shape[1:]),
            "fill": 0,
        }
        values = resample_box(volume.array, order=1, **box)
        kept.put((planes,), np.rint(values) if rounded else values)
        if label is not None and annotation is not None:
            annotation[planes] = resample_box(label, order=0, **box)
    return kept.array, annotation, stored


def _describe(
    image: npt.NDArray[Any],
    annotation: npt.NDArray[np.uint8] | None,
    scan_id: str,
    modality: str,
    classes: dict[str, int],
) -> tuple[dict[str, Any], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Attributes, sampled voxels int32 [n, 4] (region, z, y, x), their intensities float32 [n]. What is drawn depends
    on the scan's id and content alone."""
    seed = int.from_bytes(hashlib.sha256(scan_id.encode()).digest()[:8], "little")
    random = np.random.Generator(np.random.Philox(seed))
    body = find_body(image, modality=modality)
    regions = [(0, body.draw(BODY_SAMPLES, random))]
    foreground: dict[str, Any] = {}
    if annotation is not None:
        counts = count_by_plane(annotation)
        for name, value in classes.items():
            count = int(counts[:, value].sum())
            if value == 0 or count == 0:
                continue
            chosen = np.sort(random.choice(count, min(count, CLASS_SAMPLES), replace=False, shuffle=False))
            box, drawn = box_and_voxels(annotation, value, counts[:, value], chosen)
            foreground[name] = {"value": value, "count": count, "box": box}
            regions.append((value, drawn))
    voxels = np.concatenate([np.insert(points, 0, value, axis=1) for value, points in regions]).astype(np.int32)
    intensities = image[voxels[:, 1], voxels[:, 2], voxels[:, 3]].astype(np.float32)
    mean, sd = nonzero_mean_and_sd(image)
    attrs = {
        "body_box": [list(corner) for corner in body.box],
        "foreground": foreground,
        "intensity": {
            "minimum": float(image.min()),
            "nonzero_mean": mean,
            "nonzero_sd": sd,
        },
    }
    return attrs, voxels, intensities
