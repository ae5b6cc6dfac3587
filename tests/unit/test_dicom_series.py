"""DICOM series as volumes: against the standard's equation, against SimpleITK, and every bad series in one line."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its own documentation
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from scipy.spatial.transform import Rotation

from distseg.data.dicom import file as dicom_file
from distseg.data.dicom.file import decoded_frames, read_elements, transfer_syntax
from distseg.data.dicom.folder import find_series
from distseg.data.dicom.series import DicomSeries
from distseg.data.nifti import read_nifti, write_nifti
from distseg.data.volume import Volume
from distseg.errors import DataError
from tests.unit import dicom_writer as write

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "dicom_ct_series"
AXES = [np.eye(3)[axis] * sign for axis in range(3) for sign in (1, -1)]
AXIS_PAIRS = [(*a, *b) for a, b in itertools.permutations(AXES, 2) if a @ b == 0]  # 24, and each slice order: 48


def stored(seed: int = 0, shape: tuple[int, int, int] = (4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, shape).astype(np.uint16)


def read(folder: Path) -> Volume:
    (found,) = find_series(folder).series
    return found.image.read()


def by_simpleitk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def check_against_simpleitk(volume: Volume, image: sitk.Image) -> None:
    """Voxels exactly, positions of all corners to 1e-3 mm."""
    native = volume.native.from_canonical(volume.array)  # [i, j, k], as SimpleITK indexes
    assert np.array_equal(native, sitk.GetArrayFromImage(image).T.astype(native.dtype))
    for corner in itertools.product(*[(0, n - 1) for n in native.shape]):
        ras = volume.native.affine @ [*corner, 1]
        there = image.TransformIndexToPhysicalPoint([int(n) for n in corner])
        assert ras[:3] * [-1, -1, 1] == pytest.approx(there, abs=1e-3)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the shared DICOM series beside the repository")
@pytest.mark.parametrize("slices", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_real_jpeg2000_series_equals_simpleitk(tmp_path: Path, slices: int) -> None:
    """The anonymiser left it without SeriesInstanceUID and SOPClassUID."""
    for path in sorted(REAL.iterdir())[:slices]:
        (tmp_path / path.name).symlink_to(path.resolve())
    volume, image = read(tmp_path), by_simpleitk(tmp_path)
    check_against_simpleitk(volume, image)
    assert (volume.modality, volume.array.dtype, volume.array.shape) == ("CT", np.int16, (slices, 512, 512))
    mask = (volume.native.from_canonical(volume.array) > 200).astype(np.uint8)
    write_nifti(tmp_path / "mask.nii.gz", mask, volume.native)
    written = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    assert written.GetSize() == image.GetSize()
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(written, name)() == pytest.approx(getattr(image, name)(), abs=1e-3)
    assert np.array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(image) > 200)


def check_positions(volume: Volume, array: np.ndarray, to_mm: Callable[[int, int, int], np.ndarray]) -> None:
    """Every stored value is unique: find it in the volume, and compare its place with DICOM's equation."""
    for k, r, c in np.ndindex(*array.shape):
        (zyx,) = np.argwhere(volume.array == int(array[k, r, c]) - 1024)
        assert volume.geometry.affine @ [*zyx, 1] == pytest.approx([*to_mm(k, r, c), 1], abs=1e-4)


@settings(max_examples=40)
@given(
    rotation=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(st.floats(0.3, 5), st.floats(0.3, 5)),
    gap=st.floats(0.5, 6) | st.floats(-6, -0.5),
    tilt_degrees=st.sampled_from([0.0, 0.0, 12.0, -25.0]),
    order=st.permutations(range(3)),
)
def test_every_voxel_lies_where_dicom_says(
    tmp_path_factory: pytest.TempPathFactory,
    rotation: tuple[float, ...],
    spacing: tuple[float, float],
    gap: float,
    tilt_degrees: float,
    order: list[int],
) -> None:
    """Position + column index x spacing along the row + row index x spacing along the column (PS3.3 C.7.6.2.1.1), for
    oblique series, slices that run either way, gantry tilt, and file names in any order."""
    folder = tmp_path_factory.mktemp("series")
    axes = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix().round(9)
    row, column = axes[:, 0], axes[:, 1]
    step = gap * np.cross(row, column) + abs(gap) * np.tan(np.deg2rad(tilt_degrees)) * column
    array = stored(shape=(3, 2, 3))
    array = np.argsort(np.argsort(array, axis=None)).reshape(array.shape).astype(np.uint16)
    origin = np.array([-20.0, 35.5, 110.25])
    paths = write.series(folder, array, origin=origin, orientation=(*row, *column), step=step, spacing=spacing)
    for k, name in enumerate(order):
        paths[k].rename(folder / f"{name}.dcm")
    to_mm = lambda k, r, c: origin + k * step + c * spacing[1] * row + r * spacing[0] * column  # noqa: E731  # a formula
    check_positions(read(folder), array, to_mm)


@pytest.mark.parametrize("sign", [1, -1])
def test_all_48_axis_codes_equal_simpleitk_and_survive_nifti(tmp_path: Path, sign: int) -> None:
    for number, axes in enumerate(AXIS_PAIRS):
        folder = tmp_path / str(number)
        step = sign * 2.5 * np.cross(axes[:3], axes[3:])
        array = stored(number, (3, 4, 5))
        write.series(folder, array, orientation=axes, step=step)
        volume = read(folder)
        check_against_simpleitk(volume, by_simpleitk(folder))
        write_nifti(tmp_path / "x.nii", volume.native.from_canonical(volume.array), volume.native)
        again = read_nifti(tmp_path / "x.nii")
        assert np.array_equal(again.array, volume.array)
        assert np.allclose(again.geometry.affine, volume.geometry.affine, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("modality", "dtype", "slope", "intercept", "kept"),
    [
        ("CT", np.uint16, "1", "-1024", np.int32),
        ("CT", np.int16, "1", "0", np.int16),
        ("CT", np.uint16, "2", "-1024", np.int32),
        ("MR", np.uint16, None, None, np.int32),
        ("MR", np.uint8, None, None, np.int16),
        ("MR", np.uint16, "0.3663003663", "-1.25", np.float32),
        ("CT", np.int16, "1", "0.5", np.float32),
    ],
)
def test_rescale_is_exact(
    tmp_path: Path, modality: str, dtype: type, slope: str | None, intercept: str | None, kept: type
) -> None:
    limits = np.iinfo(dtype)
    array = np.random.default_rng(0).integers(limits.min, limits.max, (3, 4, 5), endpoint=True).astype(dtype)
    array.flat[:2] = limits.min, limits.max
    tags = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    write.series(tmp_path, array, modality=modality, tags=tags)
    volume = read(tmp_path)
    assert (volume.modality, volume.array.dtype) == (modality, kept)
    by_hand = array.astype(np.float64) * float(slope or 1) + float(intercept or 0)
    assert np.array_equal(volume.native.from_canonical(volume.array), by_hand.T.astype(kept))
    check_against_simpleitk(volume, by_simpleitk(tmp_path))


def test_slices_may_each_have_their_scale(tmp_path: Path) -> None:
    array = stored(shape=(3, 4, 5))
    paths = write.series(tmp_path, array, modality="MR")
    for path, slope in zip(paths, ("0.5", "2", "0.25"), strict=True):
        dataset = dcmread(path)
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, 1
        dataset.save_as(path)
    expected = array * np.array([0.5, 2, 0.25])[:, None, None] + 1
    assert np.array_equal(read(tmp_path).native.from_canonical(read(tmp_path).array), expected.T.astype(np.float32))


@pytest.mark.parametrize("name", ["implicit", "bigendian", "padded", "RLE", "jp2klossless", "jpeg_ls_lossless"])
def test_every_transfer_syntax_gives_the_same_pixels(name: str) -> None:
    """One image in pydicom's own files; what Pillow does not decode comes from the extra `dicom`."""
    frames = []
    for variant in ("MR_small.dcm", f"MR_small_{name}.dcm"):
        path = Path(str(get_testdata_file(variant, download=False)))
        syntax = transfer_syntax(read_elements(path, ["Rows"]))
        frames.append(next(decoded_frames(path, syntax, count=1)))
    assert np.array_equal(*frames)


def test_jpeg_lossless_and_signed_jpeg2000(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(-2000, 2000, (1, 16, 24)).astype(np.int16)
    for compressor in ("JPEG", "JPEG2000"):  # "JPEG" is the lossless one
        writer = sitk.ImageFileWriter()
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        path = tmp_path / f"{compressor}.dcm"
        writer.SetFileName(str(path))
        writer.Execute(sitk.GetImageFromArray(array))
        syntax = transfer_syntax(read_elements(path, ["Rows"]))
        assert "Lossless" in syntax.name
        assert np.array_equal(next(decoded_frames(path, syntax, count=1)), array[0])


def test_a_codec_without_decoder_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        is_available = False

    monkeypatch.setattr(dicom_file, "get_decoder", lambda _syntax: Without)
    write.series(tmp_path, stored())
    with pytest.raises(DataError, match=r"IM0000\.dcm: no decoder for its transfer syntax .*'distseg\[io\]'"):
        read(tmp_path)


def test_enhanced_multi_frame_equals_the_series(tmp_path: Path) -> None:
    """Frames in any order, each with its own scale."""
    array = stored(shape=(4, 5, 6))
    write.series(tmp_path / "slices", array, tags={"RescaleSlope": "2", "RescaleIntercept": "-5"})
    order = [2, 0, 3, 1]
    positions = [(-20, -30, 100 + 3 * k) for k in order]
    path = write.enhanced(tmp_path / "one/x.dcm", array[order], positions=positions, scale=[(2, -5)] * 4)
    one, slices = read(tmp_path / "one"), read(tmp_path / "slices")
    assert np.array_equal(one.array, slices.array)
    assert np.allclose(one.geometry.affine, slices.geometry.affine)
    half = write.enhanced(tmp_path / "half.dcm", array, positions=positions, scale=[(1, k / 2) for k in range(4)])
    by_hand = array[np.argsort(order)] + np.argsort(order)[:, None, None] / 2
    volume = DicomSeries(half, (half,)).read()
    assert np.array_equal(volume.native.from_canonical(volume.array), by_hand.T.astype(np.float32))
    dataset = dcmread(path)
    del dataset.PerFrameFunctionalGroupsSequence
    dataset.save_as(path)
    with pytest.raises(DataError, match=r"x\.dcm: frames without geometry \(got 4 frames\)"):
        read(tmp_path / "one")


def edit(path: Path, **elements: object) -> None:
    """Set elements of a file; None deletes."""
    dataset = dcmread(path)
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)


def spoil(**elements: object) -> Callable[[Path], None]:
    """The second of five slices with other elements."""

    def make(folder: Path) -> None:
        edit(write.series(folder, stored(shape=(5, 4, 6)))[1], **elements)

    return make


def all_with(**tags: object) -> Callable[[Path], None]:
    return lambda folder: write.series(folder, stored(shape=(5, 4, 6)), tags=tags) and None


def without(*numbers: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        paths = write.series(folder, stored(shape=(8, 4, 6)))
        for number in numbers:
            paths[number].unlink()

    return make


def truncated(folder: Path) -> None:
    path = write.series(folder, stored(shape=(5, 40, 60)))[2]
    path.write_bytes(path.read_bytes()[:-100])


def twice_at_each_place(folder: Path) -> None:
    uid = generate_uid()
    for echo in ("a", "b"):
        write.series(folder, stored(), uid=uid, prefix=echo)


def other_syntax(uid: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for path in write.series(folder, stored()):
            content, was = path.read_bytes(), b"UI\x14\x001.2.840.10008.1.2.1\0"
            assert was in content
            padded = uid.encode() + b"\0" * (len(uid) % 2)
            now = b"UI" + len(padded).to_bytes(2, "little") + padded
            length = int.from_bytes(content[140:144], "little") + len(now) - len(was)  # of the file meta group
            content = content[:140] + length.to_bytes(4, "little") + content[144:]
            path.write_bytes(content.replace(was, now))

    return make


BAD_SERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (without(3), r"slices are missing \(got 1 missing, first after IM0002.dcm\); a slice every 3 mm;"),
    "two missing": (without(2, 3), r"slices are missing \(got 2 missing, .*one gap is 9 mm"),
    "uneven": (
        spoil(ImagePositionPatient=["-20", "-30", "104.2"]),
        r"series of 5 slices: gaps between slices differ \(got from 1.8 to 4.2 mm\).*resample",
    ),
    "shifted": (spoil(ImagePositionPatient=["-19", "-30", "103"]), r"not on an even grid \(got IM0001.dcm is 1 mm off"),
    "two at one place": (twice_at_each_place, r"a000\d\.dcm and .*two slices at one place; one image a place"),
    "orientation": (
        spoil(ImageOrientationPatient=["0.8", "0.6", "0", "-0.6", "0.8", "0"]),
        r"IM0000.dcm and IM0001.dcm: slices differ in orientation",
    ),
    "pixel spacing": (spoil(PixelSpacing=["2.2", "1.5"]), "slices differ in orientation"),
    "modality": (spoil(Modality="MR"), r"slices differ in modality \(got CT and MR\)"),
    "rows": (spoil(Rows=2, PixelData=bytes(24)), r"slices differ in size \(got \(4, 6\) and \(2, 6\)\)"),
    "bits": (spoil(BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=bytes(24)), "slices differ in BitsAllocated"),
    "no position": (spoil(ImagePositionPatient=None), r"IM0001.dcm: no geometry \(got no ImagePositionPatient\)"),
    "no geometry": (
        all_with(ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None),
        r"no geometry \(got no PixelSpacing, ImagePositionPatient, ImageOrientationPatient\)",
    ),
    "empty position": (spoil(ImagePositionPatient=""), "no ImagePositionPatient"),
    "two numbers": (spoil(ImagePositionPatient=["1", "2"]), "geometry not understood"),
    "far": (spoil(ImagePositionPatient=["1", "2", "1e30"]), r"geometry not understood .*at most 1000000 mm"),
    "flat": (spoil(PixelSpacing=["0", "1"]), "IM0001.dcm: no usable scale"),
    "slope 0": (spoil(RescaleSlope="0"), r"no usable scale \(got \[1.5, 2.0, 0.0, -1024.0\]\)"),
    "not unit": (
        all_with(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]),
        "unusable ImageOrientationPatient",
    ),
    "one slice": (without(1, 2, 3, 4, 5, 6, 7), r"IM0000.dcm: one slice; a volume has at least two"),
    "colour": (all_with(SamplesPerPixel=3), r"more than one channel \(got 3\)"),
    "inverted": (all_with(PhotometricInterpretation="MONOCHROME1"), "not a CT or MR image"),
    "table": (all_with(ModalityLUTSequence=write.one(LUTExplanation="x")), "intensities by a look-up table"),
    "no rows": (all_with(Rows=None), "no Rows"),
    "bomb": (all_with(Rows=20000, Columns=20000), r"header claims more than the file holds \(got 4000000000 bytes\)"),
    "absurd": (all_with(Rows=60000, Columns=60000), r"damaged header \(got \(60000, 60000, 5\)\)"),
    "truncated": (truncated, r"IM0002.dcm: not readable as DICOM \(got ValueError"),
    "deflated": (other_syntax("1.2.840.10008.1.2.1.99"), r"deflated transfer syntax"),
    "video": (other_syntax("1.2.840.10008.1.2.4.100"), "no decoder for its transfer syntax"),
    "not a syntax": (other_syntax("1.2.840.10008.9.9.9"), "not readable as DICOM"),
}


@pytest.mark.parametrize("kind", BAD_SERIES)
def test_a_bad_series_is_one_line(tmp_path: Path, kind: str) -> None:
    make, message = BAD_SERIES[kind]
    folder = tmp_path / "JANE DOE"
    make(folder)
    found = find_series(folder)
    if found.failures:
        said = found.failures[0][1]
    else:
        with pytest.raises(DataError) as caught:
            found.series[0].image.read()
        said = str(caught.value)
    assert re.search(message, said)
    assert "\n" not in said
    assert "JANE" not in said


def test_small_rounding_of_positions_is_an_even_grid(tmp_path: Path) -> None:
    """Gaps of 1.25 mm written to a tenth: 0, 1.2, 2.5, 3.8, ..."""
    paths = write.series(tmp_path, stored(shape=(9, 4, 6)), step=(0, 0, 1.25))
    for k, path in enumerate(paths):
        edit(path, ImagePositionPatient=["-20", "-30", f"{100 + np.floor(12.5 * k) / 10:.1f}"])
    assert read(tmp_path).geometry.spacing_mm == pytest.approx((1.25, 2.0, 1.5))


def test_each_series_of_a_folder_is_found_and_the_rest_is_left_out(tmp_path: Path) -> None:
    """Two patients in one folder, localizers, a report, other files, and one that cannot be read."""
    one, two, lone = generate_uid(), generate_uid(), generate_uid()
    write.series(tmp_path / "in", stored(0), uid=one, prefix="a", tags={"PatientID": "1"})
    write.series(tmp_path / "in", stored(1), uid=two, prefix="b", tags={"PatientID": "2"}, modality="MR")
    write.series(tmp_path / "in/deep/er", stored(2), uid=lone)
    edit(tmp_path / "in/a0000.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for name in ("reportsi.dcm", "rtdose.dcm"):
        shutil.copyfile(str(get_testdata_file(name, download=False)), tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("x")
    (tmp_path / "in/.hidden.dcm").write_bytes(b"x")
    (tmp_path / "in/junk.dcm").write_bytes(b"junk" * 100)
    (tmp_path / "in/empty.dcm").write_bytes(b"")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    found = find_series(tmp_path / "in")
    assert [(series.name, series.uid, len(series.image.files)) for series in found.series] == [
        ("a0001.dcm", one, 3),
        ("b0000.dcm", two, 4),
        ("deep/er", lone, 4),
    ]
    assert found.notes == [
        "DICOM files that are no slice of a CT or MR volume are left out: 1 RTDOSE, 1 SR, 1 localizer"
    ]
    assert [name for name, _ in found.failures] == ["empty.dcm", "junk.dcm"]
    assert "empty.dcm: empty file (got 0 bytes)" in found.failures[0][1]
    assert [path.name for path in found.others] == ["notes.txt"]


def test_a_file_that_cannot_be_read_spoils_the_one_series_of_its_folder(tmp_path: Path) -> None:
    """It may be the series' last slice, which nothing else would show."""
    write.series(tmp_path / "in/a", stored())[3].write_bytes(b"junk" * 100)
    write.series(tmp_path / "in/b", stored(1))
    found = find_series(tmp_path / "in")
    assert [series.name for series in found.series] == ["b"]
    assert [name for name, _ in found.failures] == ["a"]
    assert "a slice may be missing: IM0003.dcm: not readable as DICOM" in found.failures[0][1]


def test_copies_are_taken_once_and_contradictions_refused(tmp_path: Path) -> None:
    uid = generate_uid()
    paths = write.series(tmp_path / "in/a", stored(), uid=uid)
    shutil.copytree(tmp_path / "in/a", tmp_path / "in/b")
    (found,) = find_series(tmp_path / "in").series
    assert [path.parent.name for path in found.image.files] == ["a"] * 4
    edit(tmp_path / "in/b/IM0002.dcm", PatientAge="030Y")
    ((_, why),) = find_series(tmp_path / "in").failures
    assert "IM0002.dcm and IM0002.dcm: two versions of one slice" in why
    shutil.rmtree(tmp_path / "in/b")
    edit(paths[1], PatientID="another")
    ((_, why),) = find_series(tmp_path / "in").failures
    assert "IM0000.dcm and IM0001.dcm: two patients in one series" in why
