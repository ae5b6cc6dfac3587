"""One DICOM file through pydicom: only the elements asked for, every fault one line.

A tag's text is never passed on: elements that are not asked for are not parsed, and pydicom's warnings, which quote
values, are kept off terminal and logs.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import iter_pixels, pixel_array
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
)

from distseg.data.digest import file_size
from distseg.data.limits import of_storage
from distseg.errors import DataError, DistsegError

SUFFIXES = (".dcm", ".dicom", ".ima")  # files that must be DICOM; others are where they begin as one
# What pydicom 3 and its decoders raise on damaged files: they check little and let Python's own errors through.
DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
    NotImplementedError, OSError, RuntimeError, TypeError, ValueError, struct.error, BytesLengthException,
    InvalidDicomError,
)  # fmt: skip
# Pillow's decoders are fuzzed and refuse pictures beyond a size: for what they know they come before gdcm's.
BY_PILLOW = (JPEG2000, JPEG2000Lossless, JPEGBaseline8Bit)


@contextlib.contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Around a look at elements of `path`: pydicom converts values when they are asked for. Damage is DataError."""
    log = logging.getLogger("pydicom")
    was_disabled = log.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.disabled = True
        try:
            yield
        except DistsegError:
            raise
        except DAMAGE as error:
            away = of_storage(error, path.name)
            if away is not None:
                raise away from error
            why = f"{type(error).__name__}: {error}".replace(str(path), path.name)[:160]
            raise DataError("not readable as DICOM", where=path.name, value=why, fix="copy it again") from error
        finally:
            log.disabled = was_disabled


def looks_like_dicom(path: Path) -> bool:
    """By its suffix or its first bytes. Raises DataError where it cannot be read."""
    if path.name.lower().endswith(SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise DataError("not readable", where=path.name, value=error.strerror) from error


def read_elements(path: Path, keywords: Sequence[str]) -> Dataset:
    """The named elements, and `file_meta`; pixels are left alone. Look at them inside `parsing`. A file without the
    preamble is read too. Raises DataError for what is not DICOM, or deflated as a whole."""
    if file_size(path) == 0:
        raise DataError("empty file", where=path.name, value="0 bytes", fix="copy it again")
    with parsing(path):
        try:
            syntax = read_file_meta_info(path).get("TransferSyntaxUID")
            bare = False
        except InvalidDicomError:
            syntax, bare = None, True
        if syntax == DeflatedExplicitVRLittleEndian:
            # Its size is only known once it is inflated: there is no bound to refuse a bomb by.
            fix = "convert it, for example by gdcmconv --raw"
            raise DataError("deflated transfer syntax", where=path.name, rule="any other transfer syntax", fix=fix)
        dataset = dcmread(path, stop_before_pixels=True, specific_tags=list(keywords), force=bare)
        if len(dataset) == 0:
            raise DataError("not readable as DICOM", where=path.name, rule="a DICOM file", fix="copy it again")
        return dataset


def transfer_syntax(dataset: Dataset) -> UID:
    """As the file says, or as its elements were found to be encoded."""
    said = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    if said:
        return UID(said)
    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def decoded_frames(path: Path, syntax: UID, *, count: int) -> Generator[npt.NDArray[Any], None, None]:
    """Stored values of the file's `count` frames [rows, columns], in its order, one at a time."""
    _check_decoder(path, syntax)
    options: dict[str, Any] = {
        "raw": True,
        "decoding_plugin": "pillow" if syntax in BY_PILLOW else "",
        "transfer_syntax_uid": syntax,
        "allow_excess_frames": False,
    }
    if count == 1:  # iter_pixels of pydicom 3.0 cannot correct the sign of a JPEG 2000 frame, pixel_array can
        with parsing(path):
            frame = pixel_array(path, **options)
        yield np.asarray(frame)
        return
    frames = iter_pixels(path, **options)
    while True:
        with parsing(path):
            try:
                frame = next(frames)
            except StopIteration:
                return
        yield np.asarray(frame)


def _check_decoder(path: Path, syntax: UID) -> None:
    with parsing(path):
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
    if not available:
        fix = "pip install 'distseg[io]' (JPEG lossless and JPEG-LS), or convert it by gdcmconv --raw"
        raise DataError("no decoder for its transfer syntax", where=path.name, value=syntax.name, fix=fix)
