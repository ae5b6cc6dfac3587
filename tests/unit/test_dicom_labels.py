"""Labels of DICOM series: NIfTI in any orientation, DICOM-SEG written by highdicom, RTSTRUCT against a solid's equation
and a naive polygon fill; and how a label finds its series."""

from __future__ import annotations

from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from distseg.data.dicom.contours import DicomContours, fill_even_odd
from distseg.data.dicom.segmentation import DicomSegmentation
from distseg.data.formats import Source, discover
from distseg.data.formats.case import NiftiLabel
from distseg.data.volume import Volume
from distseg.errors import ConfigError, DataError, InputError
from tests.unit import dicom_writer as write

SHAPE = (6, 9, 12)  # slices, rows, columns
CLASSES = {"background": 0, "hip": 1, "femur": 2}
STRUCTURES = ("hip", "femur")
ALL_TYPES = ["BINARY", "LABELMAP"]
OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)


def stored() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)


def truth() -> np.ndarray:
    """[slices, rows, columns]; the first slice is empty."""
    label = np.zeros(SHAPE, np.uint8)
    label[1:5, 2:6, 3:8] = 1
    label[2:6, 5:8, 6:11] = 2
    return label


def series(folder: Path, **changes: object) -> list[Path]:
    """With what highdicom wants of a source image."""
    tags = {
        "PatientName": "x", "PatientBirthDate": "", "PatientSex": "", "StudyDate": "", "StudyTime": "",
        "StudyID": "", "AccessionNumber": "", "ReferringPhysicianName": "", "Manufacturer": "m", "SliceThickness": "3",
    }  # fmt: skip
    return write.series(folder, stored(), **{"tags": tags, "orientation": OBLIQUE, **changes})


def segmentation(
    path: Path, sources: list[Path], label: np.ndarray, *, kind: str = "BINARY", names: tuple[str, ...] = STRUCTURES
) -> Path:
    descriptions = [
        hd.seg.SegmentDescription(
            number,
            name,
            codes.SCT.AnatomicalStructure,
            codes.SCT.AnatomicalStructure,
            hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(names, start=1)
    ]
    made = hd.seg.Segmentation(
        [dcmread(source) for source in sources],
        label,
        kind,
        descriptions,
        generate_uid(),
        1,
        generate_uid(),
        1,
        "m",
        "m",
        "1",
        "1",
        omit_empty_frames=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path)
    return path


def image(folder: Path) -> Volume:
    (case,) = discover(folder, structures=[]).cases
    return case.image.read()


def in_canonical(volume: Volume, label: np.ndarray) -> np.ndarray:
    return volume.native.to_canonical(label.T)


@pytest.mark.filterwarnings("ignore::UserWarning")  # highdicom and pydicom remark on values of the writer
@pytest.mark.parametrize("kind", ALL_TYPES)
def test_segmentation_by_another_writer_comes_back(tmp_path: Path, kind: str) -> None:
    """Oblique; empty frames are not in the file; not every segment is asked for."""
    sources = series(tmp_path / "a")
    volume = image(tmp_path / "a")
    path = segmentation(tmp_path / "seg.dcm", sources, truth(), kind=kind)
    label = DicomSegmentation(path, STRUCTURES).read(image=volume, classes=CLASSES)
    assert np.array_equal(label, in_canonical(volume, truth()))
    swapped = DicomSegmentation(path, ("femur",)).read(image=volume, classes={"background": 0, "femur": 1})
    assert np.array_equal(swapped, in_canonical(volume, (truth() == 2).astype(np.uint8)))
    with pytest.raises(DataError, match=r"seg\.dcm: structure without a segment \(got knee\).*there are .*femur, hip"):
        DicomSegmentation(path, ("hip", "knee")).read(image=volume, classes=CLASSES)
    series(tmp_path / "b", origin=(-20, -30, 100.5))
    with pytest.raises(DataError, match=r"seg\.dcm: label and image differ in geometry \(got frame 1: 0\.5 mm off\)"):
        DicomSegmentation(path, STRUCTURES).read(image=image(tmp_path / "b"), classes=CLASSES)
    write.series(tmp_path / "c", stored()[:3], orientation=OBLIQUE)
    with pytest.raises(DataError, match=r"differ in geometry \(got frame \d: outside the image's grid\)"):
        DicomSegmentation(path, STRUCTURES).read(image=image(tmp_path / "c"), classes=CLASSES)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_segments_that_overlap_and_are_stored_across(tmp_path: Path) -> None:
    """The structure named last counts; planes may run along another axis than the image's slices."""
    sources = series(tmp_path / "a", orientation=write.AXIAL)
    volume = image(tmp_path / "a")
    both = np.stack([truth() > 0, truth() == 2], axis=-1)
    path = segmentation(tmp_path / "seg.dcm", sources, both)
    label = DicomSegmentation(path, STRUCTURES).read(image=volume, classes=CLASSES)
    assert np.array_equal(label, in_canonical(volume, truth()))
    hidden = DicomSegmentation(path, ("femur", "hip")).read(
        image=volume, classes={"background": 0, "femur": 1, "hip": 2}
    )
    assert np.array_equal(hidden, in_canonical(volume, 2 * (truth() > 0)))
    # The same voxels as planes of constant row: sagittal-like, rows run along the slices, backwards.
    across = [dcmread(source) for source in series(tmp_path / "across", orientation=write.AXIAL)]
    flipped = truth()[::-1].transpose(1, 0, 2)  # [row, slice from the top, column]
    for number, source in enumerate(across):
        source.Rows, source.PixelData = SHAPE[0], bytes(2 * SHAPE[0] * SHAPE[2])
        source.PixelSpacing = [3, 1.5]
        source.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        source.ImagePositionPatient = [-20, -30 + 2 * number, 100 + 3 * (SHAPE[0] - 1)]
        source.save_as(tmp_path / f"across/{number}.dcm")
    paths = [tmp_path / f"across/{number}.dcm" for number in range(SHAPE[0])]
    path = segmentation(tmp_path / "across.dcm", paths, flipped[: SHAPE[0]])
    label = DicomSegmentation(path, STRUCTURES).read(image=volume, classes=CLASSES)
    expected = truth()
    expected[:, SHAPE[0] :] = 0
    assert np.array_equal(label, in_canonical(volume, expected))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fractional_segmentation_is_refused(tmp_path: Path) -> None:
    path = segmentation(tmp_path / "seg.dcm", series(tmp_path / "a"), truth())
    dataset = dcmread(path)
    dataset.SegmentationType = "FRACTIONAL"
    dataset.save_as(path)
    with pytest.raises(DataError, match=r"not a segmentation of classes \(got FRACTIONAL\)"):
        DicomSegmentation(path, STRUCTURES).read(image=image(tmp_path / "a"), classes=CLASSES)


def naive_fill(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A ray from every point, edge by edge."""
    inside = np.zeros(shape, bool)
    for i, j in np.ndindex(*shape):
        for (xa, ya), (xb, yb) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            if (ya > j) != (yb > j) and i < (xb - xa) * (j - ya) / (yb - ya) + xa:
                inside[i, j] = not inside[i, j]
    return inside


@settings(max_examples=60)
@given(points=st.lists(st.tuples(st.floats(-3, 12), st.floats(-3, 12)), min_size=1, max_size=12))
def test_even_odd_fill_equals_a_ray_from_every_point(points: list[tuple[float, float]]) -> None:
    polygon = np.array(points) + 0.0137  # off the grid: what lies on an edge is another rule's affair
    assert np.array_equal(fill_even_odd(polygon, (9, 7)), naive_fill(polygon, (9, 7)))


def circle(middle: tuple[float, float, float], radius: float, axes: np.ndarray) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)[:, None]
    return np.array(middle) + radius * (np.cos(angle) * axes[0] + np.sin(angle) * axes[1])


def test_contours_of_a_sphere_with_a_hole(tmp_path: Path) -> None:
    """On oblique slices, against the distance of each voxel's centre; a shell's inner contour is its hole."""
    shape, radius, inner = (20, 40, 50), 20.0, 8.0
    axes = np.array(OBLIQUE).reshape(2, 3)
    normal = np.cross(*axes)
    write.series(tmp_path / "a", np.zeros(shape, np.uint16), orientation=OBLIQUE)
    volume = image(tmp_path / "a")
    k, r, c = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    middle = np.array([25 * 1.5, 20 * 2.0, 10 * 3.0])  # mm along a row, a column, the normal
    distance = np.sqrt((c * 1.5 - middle[0]) ** 2 + (r * 2.0 - middle[1]) ** 2 + (k * 3.0 - middle[2]) ** 2)
    contours = []
    for slice_ in range(shape[0]):
        at = np.array([-20.0, -30, 100]) + middle[0] * axes[0] + middle[1] * axes[1] + 3.0 * slice_ * normal
        for size in (radius, inner):
            squared = size**2 - (3.0 * slice_ - middle[2]) ** 2
            if squared > 0:
                contours.append(circle(tuple(at), np.sqrt(squared), axes))
    path = write.rtstruct(tmp_path / "rt.dcm", {"body": [], "hip": contours}, refers_to=None)
    label = DicomContours(path, ("hip",)).read(image=volume, classes=CLASSES)
    expected = (distance <= radius) & (distance > inner)
    unsure = (np.abs(distance - radius) < 0.05) | (np.abs(distance - inner) < 0.05)  # a polygon is not a circle
    got = volume.native.from_canonical(label).T == 1
    assert np.array_equal(got[~unsure], expected[~unsure])
    assert not DicomContours(path, ("body",)).read(image=volume, classes={"body": 1}).any()


def test_centres_on_a_contour_are_inside_on_every_side(tmp_path: Path) -> None:
    """As contours that were traced through boundary voxels need it; the structure named last counts."""
    write.series(tmp_path / "a", np.zeros((3, 8, 9), np.uint16), spacing=(1, 1), origin=(0, 0, 0))
    volume = image(tmp_path / "a")
    square = np.array([[2, 3, 3], [5, 3, 3], [5, 6, 3], [2, 6, 3]], float)
    path = write.rtstruct(
        tmp_path / "rt.dcm", {"hip": [square], "femur": [square + np.array([3, 0, 0])]}, refers_to=None
    )
    label = DicomContours(path, STRUCTURES).read(image=volume, classes=CLASSES)
    expected = np.zeros((3, 8, 9), np.uint8)
    expected[1, 3:7, 2:6] = 1
    expected[1, 3:7, 5:9] = 2
    assert np.array_equal(volume.native.from_canonical(label).T, expected)


@pytest.mark.parametrize(
    ("points", "kind", "message"),
    [
        ([[0, 0, 101.5], [9, 0, 101.5], [9, 9, 101.5]], "CLOSED_PLANAR", r"not on a slice .*0\.5 gaps off slice 1 of"),
        ([[0, 0, 100], [9, 0, 100], [9, 9, 103]], "CLOSED_PLANAR", "not on a slice of the image"),
        ([[0, 0, 130], [9, 0, 130], [9, 9, 130]], "CLOSED_PLANAR", "not on a slice of the image"),
        ([[0, 0, 100], [9, 0, 100]], "OPEN_PLANAR", r"contour not understood \(got hip: OPEN_PLANAR\)"),
        ([[0, 0, 1e9], [9, 0, 100], [1, 1, 1]], "CLOSED_PLANAR", "contour not understood"),
    ],
)
def test_bad_contours_are_one_line(tmp_path: Path, points: list[list[float]], kind: str, message: str) -> None:
    write.series(tmp_path / "a", stored())
    path = write.rtstruct(tmp_path / "rt.dcm", {"hip": [np.array(points)]}, refers_to=None, kind=kind)
    with pytest.raises(DataError, match=message):
        DicomContours(path, ("hip",)).read(image=image(tmp_path / "a"), classes=CLASSES)
    with pytest.raises(DataError, match=r"structure without a ROI \(got knee\); .*there are hip"):
        DicomContours(path, ("knee",)).read(image=image(tmp_path / "a"), classes=CLASSES)


@pytest.mark.parametrize("code", ["LPS", "RAS", "IPR", "SAL"])
def test_nifti_label_in_another_orientation_than_the_series(tmp_path: Path, code: str) -> None:
    """Converters turn axes round: the label lies on the same voxels all the same."""
    write.series(tmp_path / "a", stored(), orientation=OBLIQUE)
    volume = image(tmp_path / "a")
    nifti = nib.Nifti1Image(truth().T, volume.native.affine)
    turned = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(nifti.affine), nib.orientations.axcodes2ornt(code)
    )
    nib.save(nifti.as_reoriented(turned), tmp_path / "label.nii.gz")
    label = NiftiLabel(tmp_path / "label.nii.gz").read(image=volume, classes=CLASSES)
    assert np.array_equal(label, in_canonical(volume, truth()))


def labels_of(found: Source) -> dict[str, str | None]:
    return {case.shown: None if case.label is None else case.label.path.name for case in found.cases}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_label_finds_its_series(tmp_path: Path) -> None:
    root, ids = tmp_path / "in", {name: generate_uid() for name in "abcde"}
    for name, uid in ids.items():
        sources = write.series(root / name, stored(), uid=uid)
        if name == "a":
            segmentation(root / "other" / "seg.dcm", series(tmp_path / "elsewhere", uid=uid), truth())
        if name == "b":
            write.rtstruct(root / "b/rt.dcm", {"hip": [], "femur": []}, refers_to=uid)
        assert sources
    nib.save(nib.Nifti1Image(truth(), np.eye(4)), root / "c.nii.gz")
    nib.save(nib.Nifti1Image(truth(), np.eye(4)), root / "d/drawn.nii")
    nib.save(nib.Nifti1Image(truth(), np.eye(4)), root / "f.nii")
    write.rtstruct(root / "lost.dcm", {"hip": []}, refers_to=generate_uid())
    found = discover(root, structures=["hip", "femur"])
    assert labels_of(found) == {"a": "seg.dcm", "b": "rt.dcm", "c": "c.nii.gz", "d": "drawn.nii", "e": None}
    assert found.classes == CLASSES
    failures = dict(found.failures)
    assert failures.keys() == {"f.nii", "lost.dcm"}
    assert "it is not clear whose label this is (got 5 series it could be of)" in failures["f.nii"]
    assert "lost.dcm: RTSTRUCT of no series here" in failures["lost.dcm"]
    with pytest.raises(InputError, match=r"data\.structures: the source has labels; which are classes\?; .*: hip"):
        discover(root)
    assert set(labels_of(discover(root, structures=[])).values()) == {None}
    write.rtstruct(root / "b/rt2.dcm", {"hip": []}, refers_to=ids["b"])
    found = discover(root, structures=["hip"])
    assert "more than one label (got rt.dcm and rt2.dcm)" in dict(found.failures)["b"]
    assert "b" not in labels_of(found)


def test_a_label_that_names_no_series_goes_by_frame_of_reference(tmp_path: Path) -> None:
    write.series(tmp_path / "in", stored())
    path = write.rtstruct(tmp_path / "in/rt.dcm", {"hip": []}, refers_to="")
    assert labels_of(discover(tmp_path / "in", structures=["hip"])) == {"in": "rt.dcm"}
    write.series(tmp_path / "in/second", stored())
    found = discover(tmp_path / "in", structures=["hip"])
    assert [name for name, _ in found.failures] == [path.name]


def test_structures_are_not_for_every_source(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(truth(), np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(ConfigError, match=r"data\.structures: not for this source \(got folder\)"):
        discover(tmp_path, structures=["hip"])
