"""DICOM files for tests: a series as slices, or as one enhanced multi-frame file, and an RTSTRUCT, written by pydicom.

Arrays are [slices, rows, columns] of stored values; geometry is LPS mm, as DICOM says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    RTStructureSetStorage,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def series(
    folder: Path,
    array: np.ndarray,
    *,
    origin: Sequence[float] = (-20.0, -30.0, 100.0),
    orientation: Sequence[float] = AXIAL,
    step: Sequence[float] | None = None,
    spacing: tuple[float, float] = (2.0, 1.5),
    uid: str | None = None,
    modality: str = "CT",
    tags: Mapping[str, Any] | None = None,
    prefix: str = "IM",
) -> list[Path]:
    """One file a slice. `spacing` is between rows, between columns; `step` from slice to slice, None: 3 mm along the
    normal. `tags` are set on every slice; a value of None leaves the element out."""
    uid = uid or generate_uid()
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    step = 3.0 * np.cross(row, column) if step is None else np.array(step)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, pixels in enumerate(array):
        dataset = slice_dataset(pixels, modality=modality)
        dataset.SeriesInstanceUID = uid
        dataset.ImagePositionPatient = numbers(np.array(origin) + k * step)
        dataset.ImageOrientationPatient = numbers(orientation)
        dataset.PixelSpacing = numbers(spacing)
        dataset.InstanceNumber = k + 1
        paths.append(folder / f"{prefix}{k:04d}.dcm")
        save(paths[-1], dataset, tags)
    return paths


def slice_dataset(pixels: np.ndarray, *, modality: str = "CT") -> Dataset:
    """An image module of one plane, without geometry."""
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    dataset.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.2"
    dataset.Modality = modality
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientID = "p"
    pixel_module(dataset, pixels)
    if modality == "CT":
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    return dataset


def pixel_module(dataset: Dataset, pixels: np.ndarray) -> None:
    """`pixels` [rows, columns] or [frames, rows, columns] of (u)int8 or (u)int16."""
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    bits = pixels.dtype.itemsize * 8
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()


def save(path: Path, dataset: Dataset, tags: Mapping[str, Any] | None = None) -> None:
    """Explicit VR little endian; the file meta follows from the dataset."""
    for keyword, value in (tags or {}).items():
        if value is None:
            if keyword in dataset:
                delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID") or CTImageStorage
    meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID") or generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def enhanced(
    path: Path,
    array: np.ndarray,
    *,
    positions: Sequence[Sequence[float]],
    scale: Sequence[tuple[float, float]],
    spacing: tuple[float, float] = (2.0, 1.5),
    uid: str | None = None,
) -> Path:
    """One multi-frame CT; frames have their own position and (slope, intercept), one orientation and spacing."""
    dataset = slice_dataset(array)
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.SeriesInstanceUID = uid or generate_uid()
    dataset.NumberOfFrames = len(array)
    shared = Dataset()
    shared.PixelMeasuresSequence = one(PixelSpacing=numbers(spacing), SliceThickness=3)
    shared.PlaneOrientationSequence = one(ImageOrientationPatient=numbers(AXIAL))
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    frames = []
    for position, (slope, intercept) in zip(positions, scale, strict=True):
        frame = Dataset()
        frame.PlanePositionSequence = one(ImagePositionPatient=numbers(position))
        frame.PixelValueTransformationSequence = one(RescaleSlope=str(slope), RescaleIntercept=str(intercept))
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    save(path, dataset)
    return path


def rtstruct(
    path: Path, rois: Mapping[str, Sequence[np.ndarray]], *, refers_to: str | None, kind: str = "CLOSED_PLANAR"
) -> Path:
    """`rois`: name -> contours [points, 3] LPS mm. `refers_to` None: it names no series."""
    dataset = Dataset()
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.Modality = "RTSTRUCT"
    if refers_to is not None:
        study = Dataset()
        study.RTReferencedSeriesSequence = one(SeriesInstanceUID=refers_to)
        frame = Dataset()
        frame.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.2"
        frame.RTReferencedStudySequence = DicomSequence([study])
        dataset.ReferencedFrameOfReferenceSequence = DicomSequence([frame])
    dataset.StructureSetROISequence = DicomSequence(
        [item(ROINumber=number, ROIName=name) for number, name in enumerate(rois, start=1)]
    )
    contours = []
    for number, polygons in enumerate(rois.values(), start=1):
        roi = item(ReferencedROINumber=number)
        roi.ContourSequence = DicomSequence(
            [
                item(
                    ContourGeometricType=kind,
                    NumberOfContourPoints=len(polygon),
                    ContourData=numbers(np.asarray(polygon).ravel()),
                )
                for polygon in polygons
            ]
        )
        contours.append(roi)
    dataset.ROIContourSequence = DicomSequence(contours)
    save(path, dataset)
    return path


def item(**elements: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def one(**elements: Any) -> DicomSequence:
    return DicomSequence([item(**elements)])


def numbers(values: Any) -> list[str]:
    """Decimal strings of at most 16 characters."""
    return [f"{float(value):.10g}"[:16] for value in values]
