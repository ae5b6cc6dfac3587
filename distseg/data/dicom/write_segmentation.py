"""A mask as a DICOM-SEG of the series it was made of: one binary segment a class, each frame on its slice.

Written by highdicom (the extra `io`). As the standard has it the file names patient and study: unlike anything else
that distseg writes it is as identifying as the images. Identifiers that an anonymiser blanked are made up from what is
left, the same for every mask of the series.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from distseg import __version__
from distseg.data.dicom.file import DAMAGE, parsing, read_elements
from distseg.data.dicom.grid import stack_planes
from distseg.data.dicom.planes import Plane, read_planes
from distseg.data.dicom.series import DicomSeries
from distseg.data.limits import needing_room
from distseg.errors import ConfigError, DataError

# Type 2 in a DICOM-SEG: it must say them, if only that they are not known.
_MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator",
)  # fmt: skip
_IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
_OTHERS = (
    "SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "PixelSpacing", "SliceThickness",
    "ImagePositionPatient", "ImageOrientationPatient", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
_SEXES = ("M", "F", "O")
_MAX_LABEL = 64  # characters of a LO element
_SERIES_NUMBER = 9000  # behind the scanner's own
_WHERE, _FIX = "format=dicom_seg", "set format=nifti"


def write_segmentation(
    path: str | Path, mask: npt.NDArray[np.uint8], *, series: DicomSeries, class_names: Sequence[str], made_by: str
) -> None:
    """`mask` in the series' native axis order [column, row, slice], values index `class_names`; `made_by` identifies
    the model. Raises DataError, in one line, for a series that highdicom cannot refer to."""
    hd = require_highdicom()
    check_class_names(class_names)
    planes, native = stack_planes([plane for file in series.files for plane in read_planes(file)])
    native.expect(mask, native.shape, "native")
    slices = mask.transpose(2, 1, 0)  # [slices, rows, columns]
    first = planes[0].path
    if all(plane.path == first for plane in planes):  # multi-frame: pixels in the order of the file's frames
        frames = np.empty_like(slices)
        frames[[plane.frame for plane in planes]] = slices
        sources = [_source(planes[0])]
    elif len({plane.path for plane in planes}) == len(planes):
        frames, sources = slices, [_source(plane) for plane in planes]
    else:
        rule = "one file a slice, or one for all"
        raise DataError("series of several multi-frame files", where=first.name, rule=rule, fix=_FIX)
    _fill_in(sources, gap_mm=abs(float((planes[1].position_mm - planes[0].position_mm) @ planes[0].normal)))
    with _silent(first):
        made = hd.seg.Segmentation(
            source_images=sources,
            pixel_array=frames,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,  # what every viewer reads
            segment_descriptions=[_segment(hd, number, name) for number, name in enumerate(class_names[1:], start=1)],
            series_instance_uid=generate_uid(),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="distseg",
            manufacturer_model_name="distseg",
            software_versions=__version__,
            device_serial_number=made_by[:_MAX_LABEL],
            series_description="distseg, for research use only",
            omit_empty_frames=bool(mask.any()),
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with needing_room("for the mask", Path(path).name):
        made.save_as(path, enforce_file_format=True)


def require_highdicom() -> ModuleType:
    """The package. Raises ConfigError where it is not installed."""
    try:
        import highdicom
    except ImportError:
        fix = f"pip install 'distseg[io]', or {_FIX}"
        raise ConfigError("needs the package highdicom", where=_WHERE, fix=fix) from None
    return highdicom


def check_class_names(class_names: Sequence[str]) -> None:
    """Raises ConfigError for a class whose name cannot be a segment's."""
    for name in class_names[1:]:
        if len(name) > _MAX_LABEL or "\\" in name or not name.isprintable():
            rule = f"at most {_MAX_LABEL} printable characters, no backslash"
            raise ConfigError("a class whose name cannot be a segment's", where=_WHERE, value=name, rule=rule, fix=_FIX)


def _segment(hd: Any, number: int, name: str) -> Any:
    """Named by the class; coded as any anatomical structure, for the class's name is all that is known of it."""
    from pydicom.sr.codedict import codes

    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.AnatomicalStructure,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="distseg", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )


def _source(plane: Plane) -> Dataset:
    """What a DICOM-SEG needs to know of a file of the series, and nothing else of it."""
    dataset = read_elements(plane.path, [*_MAY_BE_EMPTY, *_IDENTIFIERS, *_OTHERS])
    with parsing(plane.path):
        meta = dataset.file_meta
        if not dataset.get("SOPInstanceUID"):
            dataset.SOPInstanceUID = meta.get("MediaStorageSOPInstanceUID") or ""
        if not dataset.get("SOPClassUID"):
            usual = CTImageStorage if plane.modality == "CT" else MRImageStorage
            dataset.SOPClassUID = meta.get("MediaStorageSOPClassUID") or usual
        for keyword in _MAY_BE_EMPTY:
            if dataset.get(keyword) is None:
                setattr(dataset, keyword, "")
        if dataset.PatientSex not in _SEXES:
            dataset.PatientSex = ""
    return dataset


def _fill_in(sources: Sequence[Dataset], *, gap_mm: float) -> None:
    """Identifiers that are blank, made from what is left of the others: the standard has no word for unknown ones."""
    for number, source in enumerate(sources):
        if source.get("SliceThickness") is None:
            source.SliceThickness = DSfloat(gap_mm, auto_format=True)
        if not source.get("SOPInstanceUID"):
            source.SOPInstanceUID = _made_up(sources[:1], "instance", str(number))
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if any(not source.get(keyword) for source in sources):
            made_up = _made_up(sources, keyword)
            for source in sources:
                setattr(source, keyword, made_up)


def _made_up(sources: Sequence[Dataset], *of: str) -> str:
    left = [str(source.get(keyword) or "") for source in sources for keyword in _IDENTIFIERS]
    places = [str(source.get("ImagePositionPatient") or "") for source in sources]
    return str(generate_uid(entropy_srcs=[*of, *left, *places]))


@contextmanager
def _silent(path: Path) -> Iterator[None]:
    """Around highdicom, whose log quotes what it finds odd, names of patients among it. Its errors become one line."""
    log = logging.getLogger("highdicom")
    handler, propagated = logging.NullHandler(), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        with parsing(path):
            try:
                yield
            except DAMAGE as error:
                kind, rule = type(error).__name__, "one patient and study, elements as the standard has them"
                raise DataError("no DICOM-SEG of it", where=path.name, value=kind, rule=rule, fix=_FIX) from error
    finally:
        log.propagate = propagated
        log.removeHandler(handler)
