"""A patient's name in every text tag, file and folder name of a DICOM source is nowhere in store, run and reports."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import datadict, dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from distseg.cli import main
from distseg.data.cohort import Cohort, sources_path
from tests.unit import dicom_writer as write

NAME = "QZXDOEJANE"  # what a code string may hold, and no library's text does
TEXT = frozenset(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"))
TRAIN = [
    "launcher=local", "method=supervised", "network.base_filters=2", "network.levels=2", "sampling.patch_zyx=[8,8,8]",
    "train.steps=2", "train.threads=1", "train.validation_patches=2", "logging.progress=false",
]  # fmt: skip


def named_everywhere(dataset: Dataset) -> None:
    """The name in every text element of the dictionary, single or repeated, in a sequence, private, and in others'
    names of what the reader needs."""
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for tag, (vr, *_) in datadict.DicomDictionary.items():
        if vr in TEXT and tag >> 16 > 4 and tag not in dataset and not datadict.dictionary_is_retired(tag):
            dataset.add_new(tag, vr, NAME)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", NAME]
    dataset.OtherPatientIDsSequence = write.one(PatientID=NAME)
    private = dataset.private_block(0x0011, NAME, create=True)
    private.add_new(0x01, "LO", NAME)
    private.add_new(0x02, "UN", NAME.encode())
    dataset.PatientID = NAME


def patients(root: Path) -> list[str]:
    """Three series in folders of the patients' names: labelled by RTSTRUCT and by NIfTI, and one that is broken; the
    identifiers that must not show either."""
    uids = [generate_uid() for _ in range(3)]
    for number, uid in enumerate(uids):
        array = np.full((12, 14, 16), 1000, np.uint16)
        array[3:9, 4:9, 5:11] = 1700 + number
        for path in write.series(root / f"{NAME} {number}", array, uid=uid, prefix=NAME):
            dataset = dcmread(path)
            named_everywhere(dataset)
            dataset.save_as(path)
    square = [[-12.5, -22, 0], [-5, -22, 0], [-5, -14, 0], [-12.5, -14, 0]]
    contours = [np.array(square) + np.array([0, 0, 100 + 3 * k]) for k in range(3, 9)]
    path = write.rtstruct(root / f"{NAME}.dcm", {"hip": contours, NAME: contours}, refers_to=uids[0])
    dataset = dcmread(path)
    named_everywhere(dataset)
    dataset.save_as(path)
    label = np.zeros((16, 14, 12), np.uint8)
    label[5:11, 4:9, 3:9] = 1
    nifti = nib.Nifti1Image(label, np.array([[-1.5, 0, 0, 20], [0, -2, 0, 30], [0, 0, 3, 100], [0, 0, 0, 1.0]]))
    nifti.header["descrip"] = NAME.encode()
    nib.save(nifti, root / f"{NAME} 1.nii.gz")
    (root / f"{NAME} 2/{NAME}0003.dcm").unlink()
    return [*uids, "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"]


def contents(path: Path) -> Iterator[bytes]:
    """The file's bytes, and what gzip or zip holds in it."""
    yield path.read_bytes()
    if path.suffix == ".gz":
        yield gzip.decompress(path.read_bytes())
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def test_no_tag_name_or_path_leaves_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, cohort, run = tmp_path / NAME, tmp_path / "made/hips.zarr", tmp_path / "made/run"
    secrets = [NAME, *patients(source)]
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    local = ["launcher=local", "resources.workers=1", "logging.progress=false"]
    assert main(["ingest", f"source={source}", f"cohort={cohort}", "data.structures=[hip]", *local]) == 3
    ids = [record.scan_id for record in Cohort.open(cohort).select(labelled=True)]
    assert len(ids) == 2
    assert capsys.readouterr().err.count(NAME) == 2  # the broken series is named to who ran it: its folder, its file
    assert main(["train", f"cohort={cohort}", f"run={run}", *TRAIN]) == 0
    assert main(["evaluate", f"cohort={cohort}", f"run={run}", "split=all", *local]) == 0
    for where, output in ((cohort, "of_cohort"), (source, "of_folder")):
        keys = [f"run={run}", f"cohort={where}", f"output={tmp_path / 'made' / output}", "label.passes=2"]
        assert main(["label", *keys, *local]) == (0 if where == cohort else 3)
        assert (tmp_path / "made" / output / "review.html").is_file()
        if where == source:
            assert NAME in capsys.readouterr().err  # the broken series again, to who ran it
    said = capsys.readouterr()
    assert (run / "evaluation/all/report.html").is_file()
    lines = [json.loads(line) for line in sources_path(cohort).read_text().splitlines()]
    assert all(NAME in line["image"] and NAME in line["label"] for line in lines)  # the one place that may say it
    checked = 0
    for path in (tmp_path / "made").rglob("*"):
        for secret in secrets:
            assert secret.lower() not in str(path.relative_to(tmp_path / "made")).lower()
            if path.is_file() and path != sources_path(cohort):
                assert all(secret.lower().encode() not in content.lower() for content in contents(path)), path
                checked += 1
            assert secret not in said.out + said.err
    assert checked > 30
