"""What distseg label must not write over, take for its own, or tell: other people's files, stores and runs, another
cohort's masks, a commit that was cut off, names of patients."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from distseg import api
from distseg.cli import main
from distseg.config.verbs import LabelConfig
from distseg.data.cohort import Cohort
from distseg.data.label_output import KINDS, committed_path, read_ledger
from distseg.errors import DataError, InputError, RunMismatchError
from distseg.work.label_task import Labelled, LabelTask
from distseg.work.ledger import Ledger, staged_path
from tests.unit import dicom_writer
from tests.unit.test_label_cohort import SETTINGS, _forget_models, contents, estimate, label, run
from tests.unit.tiny_cohort import AFFINE, scan_arrays

__all__ = ["_forget_models", "run"]  # fixtures
QUIET = dataclasses.replace(SETTINGS, review_scans=0)

pytestmark = pytest.mark.usefixtures("one_thread")


def never(task: LabelTask) -> Labelled:
    raise AssertionError(f"{task.scan_id} is labelled")


def images(folder: Path, *names: str, first: int = 0) -> str:
    folder.mkdir()
    for number, name in enumerate(names, start=first):
        nib.save(nib.Nifti1Image(scan_arrays(number)[0], AFFINE), folder / f"{name}.nii.gz")
    return str(folder)


@pytest.mark.parametrize("theirs", ["masks/a.nii.gz", "trust/z.nii.gz", "scans.csv"])
def test_files_that_it_did_not_make_stay(run: str, tmp_path: Path, theirs: str) -> None:
    source = images(tmp_path / "in", "a")
    precious = tmp_path / "o" / theirs
    precious.parent.mkdir(parents=True)
    precious.write_text("by hand")
    with pytest.raises(InputError, match=rf"o: not an output of distseg label \(got {theirs}\).*take another output="):
        label(run, source, tmp_path / "o", QUIET, labeller=never)
    assert precious.read_text() == "by hand"
    assert {path.name for path in (tmp_path / "o").rglob("*") if path.is_file()} == {precious.name, "owner.json"}


def test_stores_and_runs_are_no_output(run: str, cohort_path: str, tmp_path: Path) -> None:
    store = Path(shutil.copytree(cohort_path, tmp_path / "c.zarr"))
    before = sorted(store.rglob("*"))
    for output in (store, store / "masks", store / "a/0/deeper"):
        with pytest.raises(InputError, match=rf"output: inside a Zarr store \(got {output}\); \S+ is one"):
            api.label_from_config(LabelConfig(run=run, cohort=cohort_path, output=str(output), launcher="local"))
    for call in (
        lambda: api.train(cohort=cohort_path, run=store / "run", overrides={"launcher": "local"}),
        lambda: api.predict(run=run, input=tmp_path, output=store / "out"),
        lambda: api.ingest(source=tmp_path, cohort=store / "inner.zarr"),
    ):
        with pytest.raises(InputError, match="inside a Zarr store"):
            call()
    assert sorted(store.rglob("*")) == before
    with pytest.raises(InputError, match="output: a run lives here"):
        label(run, cohort_path, Path(run), labeller=never)


def test_a_commit_that_an_error_cuts_off_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a scan that had files of an older version: never one file of each."""
    identity: dict[str, Any] = {"model": "m"}

    def stage(ledger: Ledger, text: str) -> None:
        for kind in KINDS:
            file = staged_path(Path(ledger.staging), kind, "s")
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)

    ledger = Ledger(tmp_path / "o", identity, "c")
    stage(ledger, "old")
    ledger.commit("s", "1", {})
    ledger.close()
    real, done = os.replace, []

    def interrupted(source: Any, target: Any) -> None:
        done.append(target)
        if len(done) == 2:
            raise KeyboardInterrupt
        real(source, target)

    ledger = Ledger(tmp_path / "o", identity, "c")
    stage(ledger, "new")
    with monkeypatch.context() as patch:
        patch.setattr("distseg.work.ledger.os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.commit("s", "2", {})
    ledger.close()
    ledger = Ledger(tmp_path / "o", identity, "c")
    ledger.close()
    assert ledger.versions == {"s": "2"}
    assert [committed_path(tmp_path / "o", kind, "s").read_text() for kind in KINDS] == ["new", "new"]


def test_another_cohort_with_the_same_ids_is_refused(run: str, tmp_path: Path) -> None:
    """One that has moved is not another."""
    first, second = images(tmp_path / "one", "a", "b"), images(tmp_path / "two", "a", "b", first=5)
    assert label(run, first, tmp_path / "o", QUIET).labelled == 2
    before = contents(tmp_path / "o")
    with pytest.raises(RunMismatchError, match="of another cohort; it has other images under 2 of the ids, a"):
        label(run, second, tmp_path / "o", QUIET, labeller=never)
    assert contents(tmp_path / "o") == before
    moved = tmp_path / "moved"
    Path(first).rename(moved)
    assert label(run, str(moved), tmp_path / "o", QUIET, labeller=never).done_before == 2


def test_annotated_folders_of_others_are_labelled(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TotalSegmentator's and DICOM's: what their masks are called is no matter here, whether there are any is."""
    for case in ("x", "y"):
        (tmp_path / "ts" / case).mkdir(parents=True)
        nib.save(nib.Nifti1Image(scan_arrays(1)[0], AFFINE), tmp_path / f"ts/{case}/ct.nii.gz")
    (tmp_path / "ts/x/segmentations").mkdir()
    nib.save(nib.Nifti1Image(scan_arrays(1)[1], AFFINE), tmp_path / "ts/x/segmentations/hip.nii.gz")
    assert label(run, str(tmp_path / "ts"), tmp_path / "o1", QUIET).labelled == 2
    only = dataclasses.replace(QUIET, only="unlabelled")
    assert label(run, str(tmp_path / "ts"), tmp_path / "o2", only).labelled == 1
    for name in ("one", "two"):
        dicom_writer.series(tmp_path / "dicom" / name, np.full((9, 10, 11), 1000, np.uint16))
    nib.save(nib.Nifti1Image(np.zeros((11, 10, 9), np.uint8), np.eye(4)), tmp_path / "dicom/one.nii.gz")
    for labelled in (2, 0):
        assert label(run, str(tmp_path / "dicom"), tmp_path / "o3", QUIET).labelled == labelled
    assert label(run, str(tmp_path / "dicom"), tmp_path / "o4", only).labelled == 1
    with pytest.raises(InputError, match=r"output: inside the DICOM folder.*choose one beside it"):
        label(run, str(tmp_path / "dicom"), tmp_path / "dicom/out", QUIET)
    assert not (tmp_path / "dicom/out").exists()


def test_a_dry_run_passes_over_what_the_labelling_would(run: str, tmp_path: Path) -> None:
    source = images(tmp_path / "in", "a", "b")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), AFFINE), tmp_path / "in/bad.nii.gz")
    assert (estimate(run, source).scans, estimate(run, source).looked_at) == (3, 2)


def test_a_damaged_line_is_named(run: str, cohort_path: str, tmp_path: Path) -> None:
    output = tmp_path / "o"
    label(run, images(tmp_path / "in", "a"), output, QUIET)
    lines = (output / "ledger.jsonl").read_text().splitlines()
    for bad in ('{"done": "a"}', '{"done": 3, "version": "1"}', "[1]", '{"x": 1}'):
        (output / "ledger.jsonl").write_text("\n".join([*lines, bad]) + "\n")
        with pytest.raises(DataError, match=r"ledger\.jsonl:3: damaged line of the ledger.*its scan is labelled again"):
            label(run, str(tmp_path / "in"), output, QUIET)
    done = json.loads(lines[1])
    without_facts = json.dumps({key: done[key] for key in ("done", "version")})
    (output / "ledger.jsonl").write_text(f"{lines[0]}\n{without_facts}\n")
    with pytest.raises(DataError, match=r"damaged line of the ledger: KeyError 'expected_dice' \(got a\)"):
        label(run, str(tmp_path / "in"), output, QUIET)


def test_scans_of_another_modality_are_told(
    run: str, cohort_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mr = tmp_path / "mr"
    shutil.copytree(run, mr)
    described = mr / "model/model.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "modality": "MR"}))
    keys = [f"cohort={cohort_path}", "launcher=local", "logging.progress=false"]
    assert main(["label", f"run={mr}", f"output={tmp_path / 'o'}", *keys, "label.review_scans=0"]) == 0
    assert "note: 9 of 9 scans are CT, the model was trained on MR" in capsys.readouterr().err
    assert main(["evaluate", f"run={mr}", "split=val", *keys]) == 0
    assert "note: 1 of 1 scans are CT, the model was trained on MR" in capsys.readouterr().err


def test_a_scan_that_lost_files_is_no_scan_of_zeros(run: str, cohort_path: str, tmp_path: Path) -> None:
    """As after a copy that stopped half-way: labelling, repair and ingest say so, and ingest mends it."""
    source, store = Path(cohort_path).parent / "source", tmp_path / "c.zarr"
    for path in Path(cohort_path).parent.glob("tiny.*"):
        target = tmp_path / path.name.replace("tiny", "c")
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    shutil.rmtree(store / "b/0/c")
    report = label(run, str(store), tmp_path / "o", QUIET)
    (told,) = report.set_aside
    assert told[0] == "b"
    assert told[1].startswith("b: the scan is not all there (got 0: 0 of 1 files); what is missing would read as zeros")
    keys = [f"cohort={store}"]
    assert main(["cohort", "action=repair", *keys]) == 3
    assert len(Cohort.open(store).records) == 9
    again = api.ingest(source=source, cohort=store, launcher="local", progress=False)
    assert (again.added, len(again.skipped)) == (["b"], 8)
    assert main(["cohort", "action=repair", *keys]) == 0
    assert np.array_equal(Cohort.open(store).scan("b").image[...], Cohort.open(cohort_path).scan("b").image[...])
    assert [line["done"] for line in read_ledger(tmp_path / "o") if "done" in line].count("b") == 0
