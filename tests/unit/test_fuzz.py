"""Damaged files of every kind: each is one clear line or a correct read; none hangs, ends the ingest, writes elsewhere.

A few hundred in the ordinary suite, 10 000 of each kind with `-m slow`. Numbers, not seeds drawn at run time, so that a
finding is a line of a test.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distseg.data.cohort import Cohort
from distseg.data.convert import ScanTask, convert_scan
from distseg.data.formats import discover
from distseg.data.nifti import read_label, read_nifti
from distseg.errors import DataError, DistsegError
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import IngestReport, ingest_cohort
from tests.unit import dicom_writer
from tests.unit.fuzzing import mutated, mutated_gzip, tree

SECONDS = 5.0  # of CPU: a file of some kilobytes that takes more hangs; one that waits meets the suite's timeout
SHAPE = (6, 5, 7)
CLASSES = {"background": 0, "bone": 1}
# nibabel parses the extensions that we pass over; then there is nothing to compare with.
NIBABEL_STUMBLES = (ValueError, TypeError, nib.spatialimages.HeaderDataError, nib.filebasedimages.ImageFileError)
HEAD = 400  # a NIfTI header and its flag of extensions


def nifti(number: int) -> bytes:
    """int16, uint8 or float32 in some orientation, NIfTI-1 or -2, with and without an extension."""
    random = np.random.default_rng(number)
    kind = (np.int16, np.uint8, np.float32)[number % 3]
    affine = np.diag([-1.5, 1.5, 3.0, 1.0])[[0, 2, 1, 3] if number % 2 else [0, 1, 2, 3]]
    image = (nib.Nifti2Image if number % 5 == 4 else nib.Nifti1Image)(
        random.integers(0, 200, SHAPE).astype(kind), affine
    )
    if number % 7 == 3:
        image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    return image.to_bytes()


def check_read(path: Path) -> str:
    """ "read" or "refused"; what is read is what nibabel says of the file."""
    begun = time.process_time()
    try:
        volume = read_nifti(path)
    except DataError as error:
        line = str(error)
        assert "\n" not in line
        assert line.startswith(path.name), line
        assert str(path.parent) not in line
        outcome = "refused"
    else:
        outcome = "read"
        with warnings.catch_warnings(), contextlib.suppress(*NIBABEL_STUMBLES):
            warnings.simplefilter("ignore")
            truth = np.asanyarray(nib.load(path).dataobj).reshape(volume.native.shape)
            back = volume.native.from_canonical(volume.array)
            assert np.array_equal(back, truth.astype(back.dtype))
            assert np.allclose(back.astype(np.float64), truth, rtol=1e-6, atol=1e-37)  # the least of float32
    assert time.process_time() - begun < SECONDS
    return outcome


def fuzz_nifti(folder: Path, numbers: range) -> dict[str, int]:
    seen = {"read": 0, "refused": 0}
    for number in numbers:
        packed = number % 3 == 0
        path = folder / ("x.nii.gz" if packed else "x.nii")
        path.write_bytes((mutated_gzip if packed else mutated)(nifti(number % 105), number, head=HEAD))
        seen[check_read(path)] += 1
    return seen


def test_damaged_nifti_is_refused_or_read_right(tmp_path: Path) -> None:
    seen = fuzz_nifti(tmp_path, range(600))
    assert min(seen.values()) > 60, seen  # the damage is neither always fatal nor never


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_niftis(tmp_path: Path) -> None:
    seen = fuzz_nifti(tmp_path, range(600, 10_600))
    assert min(seen.values()) > 1000, seen


def test_a_compressed_file_is_read_to_its_checksum_and_no_further(tmp_path: Path) -> None:
    content = nifti(1)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(content + bytes(2**20)))  # something follows, as in some files
    assert read_nifti(tmp_path / "x.nii.gz").array.shape == (5, 7, 6)
    packed = bytearray(gzip.compress(content))
    packed[-6] ^= 1
    (tmp_path / "x.nii.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"x\.nii\.gz: truncated or damaged \(got CRC check failed"):
        read_nifti(tmp_path / "x.nii.gz")
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(content + bytes(2**25)))
    with pytest.raises(DataError, match="file holds more than its header claims; at most 16777216 bytes"):
        read_nifti(tmp_path / "x.nii.gz")


def test_sizes_that_an_extension_or_an_offset_claims_are_not_believed(tmp_path: Path) -> None:
    content = bytearray(nifti(3))  # with an extension: its size stands at 352
    content[352:356] = np.int32(2**31 - 16).tobytes()
    (tmp_path / "x.nii").write_bytes(content)
    assert read_nifti(tmp_path / "x.nii").array.size == np.prod(SHAPE)
    for offset in (1e12, 0.0):
        content[108:112] = np.float32(offset).tobytes()
        (tmp_path / "x.nii").write_bytes(content)
        with pytest.raises(DataError, match="voxels at an unusable place"):
            read_nifti(tmp_path / "x.nii")


def test_damaged_labels(tmp_path: Path) -> None:
    affine = np.diag([-1.5, 1.5, 3.0, 1.0])
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), affine), tmp_path / "image.nii")
    image = read_nifti(tmp_path / "image.nii")
    label = np.random.default_rng(0).integers(0, 2, SHAPE).astype(np.uint8)
    content = nib.Nifti1Image(label, affine).to_bytes()
    for number in range(150):
        (tmp_path / "x.nii").write_bytes(mutated(content, number, head=HEAD))
        with contextlib.suppress(DataError):
            got = read_label(tmp_path / "x.nii", image=image, classes=CLASSES)
            assert (got.shape, got.dtype) == (image.array.shape, np.uint8)
            assert set(np.unique(got)) <= {0, 1}


def fuzz_ingest(root: Path, numbers: range) -> IngestReport:
    """nnU-Net raw of which every file is damaged, beside one case that is not, through the whole ingest."""
    source, path = root / "source", root / "out" / "c.zarr"
    for folder in ("imagesTr", "labelsTr"):
        (source / folder).mkdir(parents=True)
    for number in numbers:
        (source / f"imagesTr/x{number}_0000.nii.gz").write_bytes(mutated_gzip(nifti(number), number, head=HEAD))
        if number % 2:
            label = nib.Nifti1Image(np.ones(SHAPE, np.uint8), np.diag([-1.5, 1.5, 3.0, 1.0])).to_bytes()
            (source / f"labelsTr/x{number}.nii.gz").write_bytes(mutated_gzip(label, number + 1, head=HEAD))
    (source / "imagesTr/good_0000.nii").write_bytes(nifti(0))
    (source / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": CLASSES}))
    before = tree(root, but=root / "out")
    report = ingest_cohort(source=str(source), cohort=str(path), executor=LocalExecutor(1), progress=False)
    assert tree(root, but=root / "out") == before
    assert {entry.name for entry in (root / "out").iterdir()} == {
        "c.zarr",
        "c.index.jsonl",
        "c.sources.jsonl",
        "c.lock",
    }
    assert len(report.added) + len(report.failed) == len(numbers) + 1
    assert not [why for _, why in report.failed if "Error:" in why.split("(got")[0]], "an error that is not ours"
    for record in Cohort.open(path).records:
        assert np.isfinite(Cohort.open(path).scan(record.scan_id).image[...]).all()
    return report


def test_damaged_cases_do_not_stop_the_others(tmp_path: Path) -> None:
    assert "good" in fuzz_ingest(tmp_path, range(60)).added


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_damaged_cases(tmp_path: Path) -> None:
    assert "good" in fuzz_ingest(tmp_path, range(2000)).added


def fuzz_dicom(root: Path, numbers: range) -> dict[str, int]:
    """A series with one damaged slice: discovered and converted, its label beside it damaged now and then."""
    pixels = np.random.default_rng(0).integers(0, 3000, (3, 6, 5)).astype(np.uint16)
    paths = dicom_writer.series(root / "series", pixels, uid="1.2.826.0.1.3680043.8.498.7")
    whole = [path.read_bytes() for path in paths]
    seen = {"read": 0, "refused": 0}
    for number in numbers:
        at = number % len(paths)
        content = whole[at]
        # Elements begin after the preamble; most of the damage goes to them.
        paths[at].write_bytes(
            content[:132] + mutated(content[132:], number, head=len(content) - 132 - pixels[0].nbytes)
        )
        (root / "out").mkdir()
        begun = time.process_time()
        seen[_convert_first(root)] += 1
        assert time.process_time() - begun < SECONDS
        shutil.rmtree(root / "out")
        paths[at].write_bytes(content)
    assert sorted(entry.name for entry in root.iterdir()) == ["series"]
    return seen


def _convert_first(root: Path) -> str:
    try:
        found = discover(root / "series", salt=lambda: b"0" * 16)
        assert all("\n" not in why for _, why in found.failures)
        if not found.cases:
            return "refused"
        out = str(root / "out")
        task = ScanTask(case=found.cases[0], cohort=out, staging=out, classes={"background": 0}, spacing_mm=None)
        convert_scan(task)
        return "read"
    except DistsegError as error:
        line = str(error)
    assert "\n" not in line
    assert str(root) not in line.replace(f"{root / 'series'}: no image found", "")
    return "refused"


def test_damaged_dicom_is_refused_or_read(tmp_path: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        seen = fuzz_dicom(tmp_path, range(200))
    assert min(seen.values()) > 15, seen
    assert not shown.getvalue()  # a library's words may quote tags


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_damaged_dicoms(tmp_path: Path) -> None:
    seen = fuzz_dicom(tmp_path, range(200, 10_200))
    assert min(seen.values()) > 1000, seen
