"""DICOM series folders: every CT and MR series anywhere below SOURCE is a case, told apart by its SeriesInstanceUID.

SOURCE/.../*                    DICOM files under any name, with other files beside them; localizers, reports and images
                                of other kinds are left out and counted
labels, beside or elsewhere     DICOM-SEG and RTSTRUCT that refer to the series; or FOLDER.nii[.gz] beside its folder;
                                or the one NIfTI file of a folder with one series in or below it

`structures` (data.structures) name the segments or ROIs that become the classes 1, 2, ...; for a NIfTI label they name
its values 1, 2, ... A series' id is a keyed hash of its SeriesInstanceUID; of its files' content where it has none.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from distseg.data.dicom.contours import DicomContours, roi_names
from distseg.data.dicom.folder import Found, FoundSeries, find_series
from distseg.data.dicom.kinds import DicomFile
from distseg.data.dicom.segmentation import DicomSegmentation, segment_labels
from distseg.data.formats.case import Case, LabelSource, NiftiLabel, Source, classes_of
from distseg.data.formats.files import Failures, nifti_stem, source_of
from distseg.errors import DataError, InputError

Salt = Callable[[], bytes]
KINDS = {"segmentation": "DICOM-SEG", "contours": "RTSTRUCT"}


def discover_dicom(root: Path, structures: Sequence[str] | None, salt: Salt, *, only_images: bool = False) -> Source:
    """Raises InputError where there are labels and `structures` is None; an empty list takes no labels. `only_images`
    asks which series have one, and no more."""
    found = find_series(root)
    failures = list(found.failures)
    labels: dict[str, list[LabelSource]] = {}
    if structures is None or structures:
        labels, label_failures = _labels(found, root, tuple(structures or ()))
        failures += [] if only_images else label_failures
        if structures is None and not only_images and (labels or label_failures):
            raise _which_classes(found)
    notes = list(found.notes)
    unnamed = sum(not series.uid for series in found.series)
    if unnamed:
        notes.append(f"{unnamed} series have no SeriesInstanceUID: the id is of the files' content")
    cases: dict[str, Case] = {}
    taken: dict[str, str] = {}
    key = salt() if found.series else b""
    for series in found.series:
        try:
            own = labels.get(series.name, [])
            label = _one(own[:1] if only_images else own)
            case = Case(_scan_id(series, key), series.image, label, None, series.name)
            if case.scan_id in taken:
                raise DataError("the same files are there twice", value=f"as {taken[case.scan_id]}", fix="drop one")
        except DataError as error:
            failures.append((series.name, str(error)))
            continue
        taken[case.scan_id] = series.name
        cases[series.name] = case
    return source_of(
        root,
        "dicom",
        cases,
        failures,
        classes=classes_of(structures or ()),
        channel_names=None,
        names_are="a series' folder below the source",
        notes=notes,
    )


def _scan_id(series: FoundSeries, key: bytes) -> str:
    text = f"uid {series.uid}" if series.uid else f"content {series.image.sha256()}"
    return f"dicom-{hmac.new(key, text.encode('utf-8', 'surrogatepass'), hashlib.sha256).hexdigest()[:16]}"


def _one(labels: list[LabelSource]) -> LabelSource | None:
    if len(labels) > 1:
        value = " and ".join(sorted(label.path.name for label in labels))
        raise DataError("more than one label", value=value, rule="one label a series", fix="move the others away")
    return labels[0] if labels else None


def _labels(found: Found, root: Path, structures: tuple[str, ...]) -> tuple[dict[str, list[LabelSource]], Failures]:
    """Series' name -> its labels, and the label files that belong to none."""
    labels: dict[str, list[LabelSource]] = defaultdict(list)
    failures: Failures = []
    for file in found.labels:
        kind = DicomSegmentation if file.kind == "segmentation" else DicomContours
        owners = _owners(file, found.series)
        for series in owners:
            labels[series.name].append(kind(file.path, structures))
        if not owners:
            rule = "it refers to a series of the source, or shares its frame of reference with one alone"
            why = DataError(f"{KINDS[file.kind]} of no series here", where=file.path.name, rule=rule)
            failures.append((str(file.path.relative_to(root)), str(why)))
    for path in found.others:
        stem = nifti_stem(path)
        if stem is None:
            continue
        beside = [series for series in found.series if series.folder == path.parent / stem]
        below = [series for series in found.series if series.folder.is_relative_to(path.parent)]
        owners = beside or below
        if len(owners) == 1:
            labels[owners[0].name].append(NiftiLabel(path))
        else:
            rule = "FOLDER.nii.gz beside a series' folder, or a file in a folder that holds one series"
            value = f"{len(owners)} series it could be of"
            why = DataError("it is not clear whose label this is", where=path.name, value=value, rule=rule)
            failures.append((str(path.relative_to(root)), str(why)))
    return labels, failures


def _owners(file: DicomFile, series: Sequence[FoundSeries]) -> list[FoundSeries]:
    """What a SEG or RTSTRUCT refers to; where it refers to nothing, the one series of its frame of reference."""
    named = file.refers_to - {""}
    if named:
        return [one for one in series if one.uid in named]
    same = [one for one in series if one.frame_of_reference == file.frame_of_reference]
    return same if len(same) == 1 else []


def _which_classes(found: Found) -> InputError:
    """The question, with the names that the first label would answer it with."""
    names: list[str] = []
    for file in found.labels[:1]:
        names = segment_labels(file.path) if file.kind == "segmentation" else roi_names(file.path)
    some = f": {', '.join(names[:20])}" if names else ""
    rule = f"names of segments or ROIs, or of a NIfTI label's values 1, 2, ...{some}"
    fix = "set data.structures=[NAME,...], or data.structures=[] to take no labels"
    return InputError("the source has labels; which are classes?", where="data.structures", rule=rule, fix=fix)
