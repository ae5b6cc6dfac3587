"""distseg label on a tiny cohort: what is written, each scan once whatever kills the driver, failures."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from distseg.cli import main
from distseg.config.verbs import LabelConfig, LabelSectionConfig
from distseg.data.cohort import Cohort
from distseg.data.intensity import Intensity
from distseg.data.label_output import KINDS, ledger_path, read_identity, read_ledger
from distseg.data.nifti import read_nifti
from distseg.data.patches import PatchReader
from distseg.data.pseudo_labels import PseudoLabels
from distseg.errors import DataError, InputError, RunMismatchError
from distseg.evaluation.metrics import largest_components
from distseg.inference import whole_scan
from distseg.inference.sliding_window import run_grid
from distseg.losses.supervised import IGNORE
from distseg.work.executor import STOPPING, LocalExecutor
from distseg.work.label_cohort import LabelReport, label_cohort
from distseg.work.label_estimate import LabelEstimate, estimate_label
from distseg.work.label_task import Labelled, LabelTask, label_one
from distseg.work.ledger import Ledger
from tests.unit import dicom_writer
from tests.unit.tiny_run import CLASS_NAMES, make_run

SETTINGS = LabelSectionConfig(overlap=0.25, review_scans=2, next_scans=3)
ALL = ["a", "b", "c", "d", "e", "f", "u", "v", "w"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _forget_models() -> Iterator[None]:
    whole_scan.cached_model.cache_clear()
    yield
    whole_scan.cached_model.cache_clear()


def label(run: str, cohort: str, output: Path, settings: LabelSectionConfig = SETTINGS, **more: Any) -> LabelReport:
    more.setdefault("executor", LocalExecutor(1))
    return label_cohort(run=run, cohort=cohort, output=str(output), settings=settings, progress=False, **more)


def contents(output: Path) -> dict[str, bytes]:
    return {f"{kind}/{f.name}": f.read_bytes() for kind in KINDS for f in sorted((output / kind).iterdir())}


def reviewed(output: Path) -> list[str]:
    """next_to_label.csv, and scans.csv but for `seconds`, its last column."""
    rows = [line.rpartition(",")[0] for line in (output / "scans.csv").read_text().splitlines()]
    return [(output / "next_to_label.csv").read_text(), *rows]


@pytest.fixture(scope="module")
def undisturbed(run: str, cohort_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scans labelled in one go; read only."""
    output = tmp_path_factory.mktemp("out") / "labels"
    report = label(run, cohort_path, output)
    assert (report.labelled, report.done_before, report.set_aside) == (9, 0, [])
    return output


def test_what_is_written(undisturbed: Path, cohort_path: str) -> None:
    assert sorted(p.name for p in undisturbed.iterdir()) == [
        "ledger.jsonl", "masks", "next_to_label.csv", "owner.json", "review.html", "scans.csv", "trust",
    ]  # fmt: skip
    cohort = Cohort.open(cohort_path)
    codes = set()
    for scan_id in ALL:
        native = cohort.scan(scan_id).native
        for kind in KINDS:
            image = nib.load(undisturbed / kind / f"{scan_id}.nii.gz")
            assert image.get_data_dtype() == np.uint8
            assert image.shape == native.shape
            np.testing.assert_allclose(image.affine, native.affine)
        mask, trust = (read_nifti(undisturbed / kind / f"{scan_id}.nii.gz").array for kind in KINDS)
        assert mask.max() < len(CLASS_NAMES)
        codes |= set(np.unique(trust // 64))
    assert codes == {0, 1}
    with open(undisturbed / "scans.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["scan_id"] for row in rows) == ALL
    errors = [float(row["expected_error"]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert [int(row["rank"]) for row in rows] == list(range(1, 10))
    facts = {line["done"]: line for line in read_ledger(undisturbed) if "done" in line}
    for row in rows:
        mask = read_nifti(undisturbed / "masks" / f"{row['scan_id']}.nii.gz").array
        for value, name in ((1, "hip"), (2, "femur")):
            native_ml = (mask == value).sum() * 0.012
            counted_ml = facts[row["scan_id"]]["class_voxels"][value - 1] * 0.015  # on the run's grid
            assert float(row[f"volume_ml_{name}"]) == pytest.approx(native_ml, abs=1e-3)
            # An untrained network's classes are all but tied, so its surfaces move between the grids.
            assert native_ml / 2.5 - 3 < counted_ml < native_ml * 2.5 + 3
    with open(undisturbed / "next_to_label.csv") as file:
        chosen = list(csv.DictReader(file))
    assert [row["by"] for row in chosen] == ["doubt_and_diversity"] * 2 + ["random"] * 2
    assert [row["rank"] for row in chosen] == ["1", "2"] * 2
    worst_first = [row["scan_id"] for row in rows if row["scan_id"] in ("u", "w")]
    assert [row["scan_id"] for row in chosen[:2]] == worst_first  # all the scans that nobody annotated yet
    assert {row["scan_id"] for row in chosen[2:]} == {"u", "w"}
    page = (undisturbed / "review.html").read_text()
    assert page.count("<img ") == 2
    assert all(scan in page for scan in ALL)
    assert "http" not in page.replace("http-equiv", "")


def test_again_does_nothing_and_other_settings_are_refused(undisturbed: Path, run: str, cohort_path: str) -> None:
    before = {f: f.stat().st_mtime_ns for kind in KINDS for f in (undisturbed / kind).iterdir()}

    def never(task: LabelTask) -> Labelled:
        raise AssertionError(f"{task.scan_id} is labelled again")

    report = label(run, cohort_path, undisturbed, labeller=never)
    assert (report.labelled, report.done_before, report.set_aside) == (0, 9, [])
    assert before == {f: f.stat().st_mtime_ns for kind in KINDS for f in (undisturbed / kind).iterdir()}
    other = dataclasses.replace(SETTINGS, threshold=0.9)
    with pytest.raises(RunMismatchError, match=r"labelled otherwise.*threshold_nats: 1\.05 there, 0\.9 asked"):
        label(run, cohort_path, undisturbed, other)
    with pytest.raises(InputError, match="no output of distseg label"):
        read_identity(undisturbed.parent)


def test_a_folder_of_images_gives_what_its_cohort_gives(
    undisturbed: Path, run: str, cohort_path: str, tmp_path: Path
) -> None:
    report = label(run, str(Path(cohort_path).parent / "source"), tmp_path / "o", executor=LocalExecutor(1, at_once=2))
    assert report.labelled == 9
    assert contents(tmp_path / "o") == contents(undisturbed)


def test_only_unlabelled_and_without_references(
    cohort_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, matching=False)
    settings = dataclasses.replace(SETTINGS, only="unlabelled", next_scans=1)
    assert label(run, cohort_path, tmp_path / "o", settings).labelled == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the run's method, uamt, has no references: voxels in doubt take the teacher's argmax" in said
    trust = read_nifti(tmp_path / "o/trust/u.nii.gz").array
    assert set(np.unique(trust // 64)) == {0, 2}
    assert "no references to match against" in (tmp_path / "o/review.html").read_text()


def test_nothing_to_label(run: str, cohort_path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image found"):
        label(run, str(tmp_path / "empty"), tmp_path / "o")
    with pytest.raises(InputError, match="no cohort and no folder of images there"):
        label(run, str(tmp_path / "gone"), tmp_path / "o")
    with pytest.raises(DataError, match="no trained model here"):
        label(str(tmp_path / "gone"), cohort_path, tmp_path / "o")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write there"):
        label(run, cohort_path, tmp_path / "file" / "o")
    assert not (tmp_path / "o").exists()


# --- failures --------------------------------------------------------------------------------------------------------


class Fails:
    """Fails on some scans, so many times each."""

    def __init__(self, times: dict[str, int]) -> None:
        self.left, self.calls = dict(times), []

    def __call__(self, task: LabelTask) -> Labelled:
        self.calls.append(task.scan_id)
        if self.left.get(task.scan_id, 0) > 0:
            self.left[task.scan_id] -= 1
            raise DataError("disk went away", where=task.scan_id)
        return label_one(task)


def test_a_failing_scan_is_tried_again_then_set_aside(run: str, cohort_path: str, tmp_path: Path) -> None:
    fails = Fails({"b": 1, "u": 2})
    report = label(run, cohort_path, tmp_path / "o", labeller=fails)
    assert (report.labelled, report.set_aside) == (8, [("u", "u: disk went away")])
    assert fails.calls == [*ALL, "b", "u"]  # after the others
    failed = [line for line in read_ledger(tmp_path / "o") if "failed" in line]
    assert [(line["failed"], line["attempt"]) for line in failed] == [("b", 1), ("u", 1), ("u", 2)]
    assert "1 scan has no mask" in (tmp_path / "o/review.html").read_text()
    again = label(run, cohort_path, tmp_path / "o")
    assert (again.labelled, again.done_before, again.set_aside) == (1, 8, [])


def test_an_image_that_changed_is_labelled_again(run: str, cohort_path: str, tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    image = nib.load(Path(cohort_path).parent / "source/imagesTr/a_0000.nii.gz")
    for name in ("one", "two"):
        nib.save(image, source / f"{name}.nii.gz")
    settings = dataclasses.replace(SETTINGS, review_scans=0)
    assert label(run, str(source), tmp_path / "o", settings).labelled == 2
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), source / "two.nii.gz")
    before = contents(tmp_path / "o")
    assert label(run, str(source), tmp_path / "o", settings).labelled == 1
    after = contents(tmp_path / "o")
    assert {name for name in before if before[name] != after[name]} == {"masks/two.nii.gz", "trust/two.nii.gz"}
    for kind in KINDS:
        (tmp_path / "o" / kind / "one.nii.gz").unlink()  # a file is gone: not done any more
        assert label(run, str(source), tmp_path / "o", settings).labelled == 1
        assert contents(tmp_path / "o") == after


# --- whatever kills the driver ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing after it runs but the kernel's part."""


@pytest.mark.parametrize("replaces", [0, 1, 2])
def test_killed_inside_a_commit(
    undisturbed: Path, run: str, cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: int
) -> None:
    """The line is the commit: with it, the next driver finishes what is left; before it, the scan is labelled again."""
    output = tmp_path / "o"
    real, made = os.replace, []

    def dying(source: Any, target: Any) -> None:
        if Path(target).parent.parent == output:
            if len(made) == 2 * 3 + replaces:
                raise Killed
            made.append(target)
        real(source, target)

    monkeypatch.setattr(Ledger, "close", lambda ledger: ledger._file.close())
    monkeypatch.setattr("distseg.work.ledger.os.replace", dying)
    with pytest.raises(Killed):
        label(run, cohort_path, output)
    monkeypatch.undo()
    with open(ledger_path(output), "ab") as file:
        file.write(b'{"done":"torn')
    committed = [line["done"] for line in list(read_ledger(output)) if "done" in line]
    assert len(committed) == 4 + replaces // 2
    calls = Fails({})
    report = label(run, cohort_path, output, labeller=calls)
    assert report.done_before == len(committed)
    assert sorted([*committed, *calls.calls]) == ALL
    assert contents(output) == contents(undisturbed)
    assert not (output / ".staging").exists()


def _drive(run: str, cohort: str, output: str) -> None:
    label_cohort(
        run=run, cohort=cohort, output=output, settings=SETTINGS, executor=LocalExecutor(1, at_once=2), progress=False
    )


def test_three_kills_leave_what_no_kill_leaves(undisturbed: Path, run: str, cohort_path: str, tmp_path: Path) -> None:
    """SIGKILL of a real driver at three points; no committed scan is done again. Twenty, of the command line, and Ray's
    actors are in the slow suite."""
    output = tmp_path / "o"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distseg.work.label_cohort"])
    committed: dict[str, int] = {}
    for masks in (1, 3, 6):
        process = context.Process(target=_drive, args=(run, cohort_path, str(output)))
        process.start()
        while process.is_alive() and len(list((output / "masks").glob("[!.]*"))) < masks:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        inodes = {f.name: f.stat().st_ino for f in (output / "masks").glob("[!.]*")}
        assert committed.items() <= inodes.items()
        committed = inodes
    report = label(run, cohort_path, output)
    assert report.done_before >= 6
    assert committed.items() <= {f.name: f.stat().st_ino for f in (output / "masks").iterdir()}.items()
    assert contents(output) == contents(undisturbed)
    assert reviewed(output) == reviewed(undisturbed)
    lines = [line["done"] for line in read_ledger(output) if "done" in line]
    assert sorted(lines) == ALL


def test_what_a_dead_drivers_worker_still_writes_is_never_shown(
    undisturbed: Path, run: str, cohort_path: str, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    stale = output / ".staging/dead/masks"
    stale.mkdir(parents=True)
    (stale / "a.nii.gz").write_bytes(b"half")
    (stale / ".b.nii.gz.12345678").write_bytes(b"half")
    label(run, cohort_path, output)
    assert contents(output) == contents(undisturbed)


def test_a_damaged_ledger_is_said(run: str, cohort_path: str, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/ledger.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"ledger\.jsonl:1: damaged line of the ledger"):
        label(run, cohort_path, tmp_path / "o")
    (tmp_path / "o/ledger.jsonl").write_text(json.dumps({"format": 99}) + "\n")
    with pytest.raises(DataError, match="no output of distseg label"):
        label(run, cohort_path, tmp_path / "o")


def test_predict_by_label_is_label_on_one_file(undisturbed: Path, run: str, cohort_path: str, tmp_path: Path) -> None:
    """And its masks are kept apart from the network's: another way of making them is another mask."""
    image = Path(cohort_path).parent / "source/imagesTr/a_0000.nii.gz"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.nii.gz").write_bytes(image.read_bytes())
    keys = [f"run={run}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "logging.progress=false"]
    assert main(["predict", *keys, "by=label", "label.overlap=0.25"]) == 0
    assert (tmp_path / "out/a.nii.gz").read_bytes() == (undisturbed / "masks/a.nii.gz").read_bytes()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [".distseg.json", "a.nii.gz"]
    assert main(["predict", *keys, "by=label", "label.overlap=0.25"]) == 0  # kept
    for other in (["by=label", "label.overlap=0.25", "label.threshold=0.3"], ["network=teacher", "overlap=0.25"]):
        assert main(["predict", *keys, *other]) == 2


def test_classes_of_one_piece_keep_one_piece(run: str, cohort_path: str, undisturbed: Path, tmp_path: Path) -> None:
    """As predict and evaluate do. What goes is told, and is no label that a next round would trust."""
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    described = whole / "model/model.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "whole": ["femur"]}))
    label(str(whole), cohort_path, tmp_path / "o")
    removed = 0
    with (tmp_path / "o/scans.csv").open() as file:
        rows = {row["scan_id"]: row for row in csv.DictReader(file)}
    for scan_id in ALL:
        before, after, trust = (
            read_nifti(folder / kind / f"{scan_id}.nii.gz").array.astype(np.uint8)
            for folder, kind in ((undisturbed, "masks"), (tmp_path / "o", "masks"), (tmp_path / "o", "trust"))
        )
        np.testing.assert_array_equal(after, largest_components(before, values=[2]))
        gone = before != after
        assert float(rows[scan_id]["removed_voxels"]) == gone.sum()
        assert float(rows[scan_id]["volume_ml_femur"]) == pytest.approx((after == 2).sum() * 0.012, abs=1e-3)
        assert set(np.unique(trust[gone])) <= {2 * 64}
        unchanged = read_nifti(undisturbed / f"trust/{scan_id}.nii.gz").array
        np.testing.assert_array_equal(trust[~gone], unchanged[~gone])
        removed += int(gone.sum())
        if scan_id == "u":
            target = _as_training_reads(tmp_path / "o", cohort_path, tmp_path / "read")
            np.testing.assert_array_equal(target == IGNORE, trust % 64 < 0.25 * 63)
            assert gone.any()
            assert (target[gone] == IGNORE).all()
    assert removed > 0
    everything = tmp_path / "all"
    label(str(whole), cohort_path, everything, settings=dataclasses.replace(SETTINGS, components="all"))
    assert (everything / "masks/a.nii.gz").read_bytes() == (undisturbed / "masks/a.nii.gz").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.nii.gz").write_bytes((Path(cohort_path).parent / "source/imagesTr/a_0000.nii.gz").read_bytes())
    keys = [f"run={whole}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "logging.progress=false"]
    assert main(["predict", *keys, "by=label", "label.overlap=0.25"]) == 0
    assert (tmp_path / "out/a.nii.gz").read_bytes() == (tmp_path / "o/masks/a.nii.gz").read_bytes()


def _as_training_reads(output: Path, cohort_path: str, folder: Path) -> np.ndarray:
    """What `data.pseudo_labels` makes of scan u at its native spacing, with the default floor of confidence."""
    folder.mkdir()
    cohort, spacing = Cohort.open(cohort_path), (3.0, 2.0, 2.0)
    reader = PatchReader(cohort, spacing_mm=spacing, intensity=Intensity("per_scan"), memory_nbytes=0)
    labels = PseudoLabels(
        output, scans=("u",), cohort=cohort, reader=reader, spacing_mm=spacing, folder=folder, confidence=0.25
    )
    return labels.label("u", (0, 0, 0), reader.shape("u"))


def test_a_dry_run_writes_nothing_and_says_what_it_takes(
    run: str, cohort_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["label", f"run={run}", f"output={tmp_path / 'o'}", "dry_run=true", "launcher=local", "label.overlap=0.25"]
    assert main([*keys, f"cohort={cohort_path}"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "o").exists()
    voxels = sum(int(np.prod(record.shape)) for record in Cohort.open(cohort_path).records)
    grid = run_grid((18, 22, 20), (3.0, 2.0, 2.0), (3.0, 2.5, 2.0), patch_zyx=(8, 8, 8), overlap=0.25)
    windows = 9 * int(np.prod([len(starts) for starts in grid.starts]))
    assert f"scans:   9\nvoxels:  {voxels / 1e6:.1f} million in {windows} windows\n" in said
    assert "hours:   0.00 with 1 worker like this one" in said
    source = estimate(run, str(Path(cohort_path).parent / "source"))
    stored = estimate(run, cohort_path)
    assert (source.scans, source.windows, source.voxels) == (stored.scans, stored.windows, stored.voxels)
    label(run, cohort_path, tmp_path / "real", dataclasses.replace(SETTINGS, review_scans=0))
    assert stored.nbytes == pytest.approx(sum(map(len, contents(tmp_path / "real").values())), rel=0.1)
    assert stored.hours == pytest.approx(stored.seconds_per_window * windows / 3600)


def estimate(run: str, cohort: str) -> LabelEstimate:
    settings = LabelSectionConfig(overlap=0.25)
    return estimate_label(LabelConfig(run=run, cohort=cohort, output="o", launcher="local", label=settings))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["label.threshold=0.5", "label.quantile=0.5"], "label.threshold: value not allowed (got 0.5); must be null"),
        (["label.only=labelled"], "label.only: unknown value (got labelled); one of all, unlabelled"),
        (["label.overlap=1"], "label.overlap: value not allowed (got 1.0); must be from 0.0 to 0.9"),
        (["label.quantile=2"], "label.quantile"),
        (["label.min_similarity=3"], "label.min_similarity"),
        (["label.passes=0"], "label.passes"),
        (["label.attempts=0"], "label.attempts"),
        (["threshold=0.5"], "did you mean label.threshold=...?"),
        (["run=gone"], "no trained model here"),
        (["cohort=gone"], "no cohort and no folder of images there"),
        (["launcher=slurm"], "launcher: unknown value"),
    ],
)
def test_what_the_command_line_refuses(
    run: str, cohort_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[str], said: str
) -> None:
    given = [f"run={run}", f"cohort={cohort_path}", f"output={tmp_path / 'o'}", "launcher=local"]
    given = [word for word in given if word.split("=")[0] not in {key.split("=")[0] for key in keys}]
    assert main(["label", *given, *keys]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_set_aside_scan_is_exit_code_3(
    run: str, cohort_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    source = Path(cohort_path).parent / "source/imagesTr/a_0000.nii.gz"
    (folder / "good.nii.gz").write_bytes(source.read_bytes())
    (folder / "bad.nii.gz").write_bytes(source.read_bytes()[:400])
    keys = [f"run={run}", f"cohort={folder}", f"output={tmp_path / 'o'}", "launcher=local", "logging.progress=false"]
    assert main(["label", *keys, "label.overlap=0.25"]) == 3
    said = capsys.readouterr().err
    assert "1 scans labelled, 0 done before; 1 failed:\n  bad: bad.nii.gz:" in said
    assert sorted(f.name for f in (tmp_path / "o/masks").iterdir()) == ["good.nii.gz"]


def test_dicom_series_keep_their_ids(run: str, tmp_path: Path) -> None:
    """Hashed with a key that the output keeps: the next call knows them again, and no id tells the series."""
    pixels = np.random.default_rng(0).integers(-500, 500, (9, 10, 11)).astype(np.int16)
    for name in ("one", "two"):
        dicom_writer.series(tmp_path / "in" / name, pixels)
    settings = dataclasses.replace(SETTINGS, review_scans=0)
    assert label(run, str(tmp_path / "in"), tmp_path / "o", settings).labelled == 2
    masks = sorted(f.name for f in (tmp_path / "o/masks").iterdir())
    again = label(run, str(tmp_path / "in"), tmp_path / "o", settings)
    assert (again.labelled, again.done_before) == (0, 2)
    assert sorted(f.name for f in (tmp_path / "o/masks").iterdir()) == masks
    assert (tmp_path / "o/dicom.salt").stat().st_mode & 0o077 == 0


def test_an_interrupted_thread_gives_up(run: str, cohort_path: str, tmp_path: Path) -> None:
    """Ctrl-C: what is in flight stops at its next plane, and the same command goes on."""

    class Interrupts(Fails):
        def __call__(self, task: LabelTask) -> Labelled:
            made = super().__call__(task)
            if len(self.calls) >= 3:
                raise KeyboardInterrupt
            return made

    with pytest.raises(KeyboardInterrupt):
        label(run, cohort_path, tmp_path / "o", labeller=Interrupts({}), executor=LocalExecutor(1, at_once=2))
    assert not STOPPING.is_set()
    report = label(run, cohort_path, tmp_path / "o")
    assert report.done_before + report.labelled == 9
