"""One NIfTI file: read with every check a clear line, written atomically in its native grid."""

from __future__ import annotations

import gzip
import os
import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distseg.data.digest import file_size
from distseg.data.limits import MAX_DEFLATE_RATIO, check_size, of_storage
from distseg.data.values import distinct, is_whole, read_narrow
from distseg.data.volume import Affine, NativeGrid, Shape, Volume, shape3
from distseg.errors import DataError

CT_MINIMUM_HU = -500.0
MAX_OFFSET_NBYTES = 2**26  # of comments between a header and its voxels
MAX_REST_NBYTES = 2**24  # of whatever follows the voxels of a compressed file
_PIECE_NBYTES = 2**20
# What nibabel and gzip raise on damaged files: nibabel checks some of a header and lets numpy's own errors through.
DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, TypeError,
    ValueError, struct.error, zlib.error, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError,
    nib.spatialimages.HeaderTypeError, nib.wrapstruct.WrapStructError,
)  # fmt: skip
LABEL_GRID_TOLERANCE = 0.1  # share of the smallest voxel size by which a corner of the label's grid may be off


def read_nifti(path: str | Path, *, modality: str | None = None) -> Volume:
    """The image as a Volume. Modality None: "CT" for whole numbers with a minimum of at most -500, else "unknown".

    A 4-D file is taken if its further axes have length 1. Without sform and qform the affine is nibabel's: spacing from
    the header, x to the Left. Raises DataError for a file that cannot be used, in one line.
    """
    native, array = _read(Path(path))
    if modality is None:
        modality = "CT" if float(array.min()) <= CT_MINIMUM_HU and is_whole(array) else "unknown"
    return Volume(native.to_canonical(array), native.geometry, native, modality)


def read_label(path: str | Path, *, image: Volume, classes: Mapping[str, int]) -> npt.NDArray[np.uint8]:
    """The label of `image`, uint8 [Z, Y, X] in canonical axes. Raises DataError where it does not belong to the image:
    another shape, a corner of its grid off by more than 0.1 of the smallest voxel size, values not in `classes`. It
    may be stored with its axes in another order or direction than the image."""
    path = Path(path)
    native, array = _read(path)
    label = label_on_image(path.name, native, array, image=image)
    values = distinct(label)
    if not np.array_equal(values, np.rint(values)):
        wrong = values[values != np.rint(values)][0]
        raise DataError("label values are not whole numbers", where=path.name, value=wrong, rule="one class a voxel")
    unknown = sorted({int(value) for value in values} - set(classes.values()))
    if unknown:
        rule = f"values of the classes {dict(classes)}"
        raise DataError("label holds unknown classes", where=path.name, value=unknown[:5], rule=rule)
    return label.astype(np.uint8, copy=False)


def read_masks(
    masks: Sequence[tuple[str, Path]], *, image: Volume, classes: Mapping[str, int]
) -> npt.NDArray[np.uint8]:
    """The label of `image` from one binary file a class, as (class, file); checks as in `read_label`. Where masks
    overlap the class of the larger value counts."""
    label = np.zeros(image.array.shape, np.uint8)
    for name, path in masks:
        native, array = _read(path)
        mask = label_on_image(path.name, native, array, image=image)
        values = distinct(mask)
        if len(values[values != 0]) > 1:
            rule = "0 outside the structure, one other value inside"
            raise DataError("not a binary mask", where=path.name, value=values[:5].tolist(), rule=rule)
        np.maximum(label, np.where(mask != 0, np.uint8(classes[name]), np.uint8(0)), out=label)
    return label


def label_on_image(name: str, native: NativeGrid, array: npt.NDArray[Any], *, image: Volume) -> npt.NDArray[Any]:
    """`array` of the grid `native` as [Z, Y, X] on the image's canonical grid, never interpolated. Raises DataError,
    naming `name`, where the two are not the same voxels."""
    tolerance_mm = LABEL_GRID_TOLERANCE * min(image.geometry.spacing_mm)
    ours, theirs = native.geometry, image.geometry
    off_mm = None
    if native.shape == image.native.shape:
        off_mm = _largest_corner_distance_mm(native.shape, native.affine, image.native.affine)
        if off_mm <= tolerance_mm:
            return image.native.to_canonical(array)
    if ours.shape == theirs.shape:
        canonical_off_mm = _largest_corner_distance_mm(ours.shape, ours.affine, theirs.affine)
        if canonical_off_mm <= tolerance_mm:
            return native.to_canonical(array)
        off_mm = canonical_off_mm if off_mm is None else min(off_mm, canonical_off_mm)
    if off_mm is None:
        rule = f"image: {image.native.shape}"
        raise DataError("label and image differ in shape", where=name, value=native.shape, rule=rule)
    raise DataError(
        "label and image differ in affine",
        where=name,
        value=f"a corner {off_mm:.3g} mm off",
        rule=f"at most {tolerance_mm:.3g} mm, {LABEL_GRID_TOLERANCE} of the smallest voxel size",
        fix="resample the label to the image's grid",
    )


def write_nifti(path: str | Path, array: npt.NDArray[Any], native: NativeGrid) -> None:
    """Write `array`, in native axis order, into `native`'s grid; the file appears whole or not at all."""
    path = Path(path)
    native.expect(array, native.shape, "native")
    image: Any = nib.Nifti1Image(array, native.affine)  # type: ignore[no-untyped-call]  # nibabel has no hints
    image.set_sform(native.affine, code=1)
    columns = native.affine[:3, :3] / np.linalg.norm(native.affine[:3, :3], axis=0)
    if np.allclose(columns.T @ columns, np.eye(3), atol=1e-4):
        # ITK prefers the qform where both exist, and a quaternion cannot hold shear: only write one that is exact.
        image.set_qform(native.affine, code=1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            if path.name.lower().endswith(".gz"):
                # No time stamp and no name: equal arrays are equal bytes.
                with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as packed:
                    _stream(image.header, array, packed)
            else:
                _stream(image.header, array, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _stream(header: Any, array: npt.NDArray[Any], file: Any) -> None:
    """What nibabel writes of an unscaled array, slice by slice: it would make a copy of the volume on the way."""
    header.set_slope_inter(1, 0)
    header.set_data_offset(header.single_vox_offset)
    file.write(header.binaryblock)
    file.write(bytes(header.single_vox_offset - header.sizeof_hdr))  # no extension follows
    dtype = header.get_data_dtype()
    for last in range(array.shape[-1]):
        file.write(array[..., last].astype(dtype, copy=False).tobytes(order="F"))


def _read(path: Path) -> tuple[NativeGrid, npt.NDArray[Any]]:
    """Grid and values in native axis order, of the narrowest type, every value finite."""
    name = path.name
    file_nbytes = file_size(path)
    if file_nbytes == 0:
        raise DataError("empty file", where=name, value="0 bytes", fix="copy it again")
    try:
        # One open file: each slab goes on where the last ended, which is all that a compressed file can do.
        with nib.openers.ImageOpener(str(path)) as file:
            header = _header(file, name)
            native = _native_grid(header, name, file_nbytes)
            # No memory map: its pages would count as this process' memory.
            voxels: Any = nib.arrayproxy.ArrayProxy(file, header, mmap=False)  # type: ignore[no-untyped-call]  # nibabel's
            array = read_narrow(voxels, native, name=name)
            if name.lower().endswith(".gz"):
                _read_to_end(file, name)
    except DataError:
        raise
    except DAMAGE as error:
        away = of_storage(error, name)
        if away is not None:
            raise away from error
        # Not the folder: its name may be a patient's.
        why = str(error).replace(str(path), name) or type(error).__name__
        raise DataError("truncated or damaged", where=name, value=why, fix="copy or convert it again") from error
    return native, array


def _header(file: Any, name: str) -> Any:
    """NIfTI-1 or -2. Extensions are passed over unread: they hold free text, and a size that nothing bounds."""
    log, was_disabled = nib.imageglobals.logger, nib.imageglobals.logger.disabled
    try:
        block: bytes = file.read(nib.Nifti2Header.sizeof_hdr)
        kinds: tuple[Any, ...] = (nib.Nifti1Header, nib.Nifti2Header)
        for kind in kinds:
            if kind.may_contain_header(block):
                log.disabled = True  # it tells the terminal what it mends, and not in which file
                return kind(block[: kind.sizeof_hdr])
        why = "another kind of file"
    except DAMAGE as error:
        away = of_storage(error, name)
        if away is not None:
            raise away from error
        why = str(error) or "truncated"
    finally:
        log.disabled = was_disabled
    raise DataError("not readable as NIfTI", where=name, value=why, fix="copy or convert it again")


def _native_grid(header: Any, name: str, file_nbytes: int) -> NativeGrid:
    """Refuses a header that is damaged before anything of the size that it claims is read."""
    shape = tuple(int(n) for n in header.get_data_shape())
    shape = _check_header(name, shape, np.dtype(header.get_data_dtype()), file_nbytes)
    affine = np.asarray(header.get_best_affine(), np.float64)
    check_affine(name, affine)
    offset = header.get_data_offset()
    if not header.sizeof_hdr < offset <= MAX_OFFSET_NBYTES:
        rule = "voxels after the header, in the same file"
        raise DataError("voxels at an unusable place", where=name, value=f"byte {offset}", rule=rule)
    return NativeGrid(shape, affine)


def _read_to_end(file: Any, name: str) -> None:
    """A gzip file's checksum stands at its end, and is checked by who reads so far."""
    for _ in range(MAX_REST_NBYTES // _PIECE_NBYTES):
        if not file.read(_PIECE_NBYTES):
            return
    rule = f"at most {MAX_REST_NBYTES} bytes after the voxels"
    raise DataError("file holds more than its header claims", where=name, rule=rule, fix="copy or convert it again")


def _check_header(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], file_nbytes: int) -> Shape:
    """The 3-D shape; refuses before anything of the claimed size is read."""
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        what = f"{len(shape)}-D image" + (": more than one channel or time" if len(shape) > 3 else "")
        raise DataError(what, where=name, value=shape, rule="3-D, one channel", fix="split or stack it into 3-D")
    if dtype.kind not in "iufb":
        raise DataError("voxels are not numbers of one channel", where=name, value=dtype, rule="integers or floats")
    most = file_nbytes * (MAX_DEFLATE_RATIO if name.lower().endswith(".gz") else 1)
    check_size(name, shape, dtype.itemsize, at_most_nbytes=most)
    return shape3(shape[:3])


def check_affine(name: str, affine: Affine) -> None:
    """Raises DataError for an affine that is no grid: `name` says whose."""
    rule = "an invertible affine: three axes of positive voxel size, none along another"
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        usable = bool(np.isfinite(affine).all() and lengths.min() > 1e-6)
        if not usable or abs(float(np.linalg.det(affine[:3, :3] / lengths))) < 1e-3:
            fix = "mend the header's geometry"
            raise DataError("unusable affine", where=name, value=affine[:3].tolist(), rule=rule, fix=fix)


def _largest_corner_distance_mm(shape: Shape, one: Affine, other: Affine) -> float:
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)  # [3, 8]
    homogeneous = np.vstack([corners, np.ones((1, corners.shape[1]))])
    return float(np.linalg.norm(((one - other) @ homogeneous)[:3], axis=0).max())
