"""What a DICOM file is, from a few identifying elements: an image of a series, a label that refers to one, or neither.

The identifiers stay in memory: they order files into series and are never written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    RTStructureSetStorage,
    SegmentationStorage,
)

from distseg.data.dicom.file import parsing, read_elements

KEYWORDS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID",
    "Modality", "ImageType", "Rows", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence",
)  # fmt: skip
IMAGES = (
    CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage,
    MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage,
)  # fmt: skip
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"  # Label Map Segmentation Storage, younger than pydicom 3.0's table
SEGMENTATIONS = (SegmentationStorage, LABEL_MAP)
MODALITIES = ("CT", "MR")

Kind = Literal["image", "localizer", "segmentation", "contours", "directory", "other"]


@dataclass(frozen=True)
class DicomFile:
    """`series` is the SeriesInstanceUID, "" where the file has none; `group` tells series apart all the same;
    `refers_to` are SeriesInstanceUIDs."""

    path: Path
    kind: Kind
    modality: str
    series: str
    group: tuple[str, ...]
    patient: str
    instance: str
    frame_of_reference: str
    refers_to: frozenset[str]


def read_kind(path: Path) -> DicomFile:
    """Raises DataError for a file that is not readable as DICOM."""
    dataset = read_elements(path, KEYWORDS)
    with parsing(path):
        text = {name: _text(dataset, name) for name in KEYWORDS[:7]}
        series = text["SeriesInstanceUID"]
        # Anonymisers blank identifiers; then the folder and what else is left keep series apart.
        left = (str(path.parent), text["StudyInstanceUID"], text["FrameOfReferenceUID"], text["PatientID"])
        return DicomFile(
            path=path,
            kind=_kind(dataset, text),
            modality=text["Modality"],
            series=series,
            group=(series,) if series else ("", *left),
            patient=text["PatientID"],
            instance=text["SOPInstanceUID"],
            frame_of_reference=text["FrameOfReferenceUID"] or _referred_frame(dataset),
            refers_to=frozenset(_referred(dataset)),
        )


def _text(dataset: Dataset, keyword: str) -> str:
    value: Any = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def _kind(dataset: Dataset, text: dict[str, str]) -> Kind:
    said = text["SOPClassUID"] or str(dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    if said == MediaStorageDirectoryStorage:
        return "directory"
    if said == RTStructureSetStorage:
        return "contours"
    if said in SEGMENTATIONS:
        return "segmentation"
    if said not in IMAGES and (said or text["Modality"] not in MODALITIES or dataset.get("Rows") is None):
        return "other"
    types = dataset.get("ImageType") or []
    values = [types] if isinstance(types, str) else types
    return "localizer" if "LOCALIZER" in [str(value).upper() for value in values] else "image"


def _referred_frame(dataset: Dataset) -> str:
    """Of an RTSTRUCT, which has none of its own."""
    items = dataset.get("ReferencedFrameOfReferenceSequence") or []
    return _text(items[0], "FrameOfReferenceUID") if items else ""


def _referred(dataset: Dataset) -> Iterable[str]:
    """Series that a SEG names directly, and an RTSTRUCT by frame of reference and study."""
    for series in dataset.get("ReferencedSeriesSequence") or []:
        yield _text(series, "SeriesInstanceUID")
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                yield _text(series, "SeriesInstanceUID")
