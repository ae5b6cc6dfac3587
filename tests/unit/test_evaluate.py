"""evaluate and predict end to end on a tiny cohort, with a fake model whose masks are known: bright is foreground."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from distseg.config.schema import NetworkConfig
from distseg.data.cohort import Cohort
from distseg.data.formats import NiftiImage
from distseg.data.intensity import Intensity
from distseg.errors import DataError, FinishedWithFailures, InputError
from distseg.inference import whole_scan
from distseg.inference.model import ModelInfo
from distseg.work import evaluate as evaluate_module
from distseg.work.evaluate import evaluate_run
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort
from distseg.work.predict import predict_files

# Native axes: first to the Posterior, second to the Right, third to the Inferior; 2, 1, 3 mm voxels.
AFFINE = np.array([[0, 1.0, 0, -7], [-2.0, 0, 0, 20], [0, 0, -3.0, 5], [0, 0, 0, 1]])


class Bright(torch.nn.Module):
    """Foreground where the image exceeds `threshold`."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.cat([self.threshold - x, x - self.threshold], dim=1))


class Hundredth:
    """The intensity of the fake run."""

    def normalise(self, array: np.ndarray, *, nonzero_mean: float, nonzero_sd: float) -> np.ndarray:
        return np.asarray(array, np.float32) / 100


def fake_model(run: str) -> Any:
    info = ModelInfo(
        ("background", "bone"), "CT", (3.0, 2.0, 1.0), (6, 8, 8), NetworkConfig(), Intensity("per_scan"),
        "embedding_matching", 0.5, 40, "last", whole=("bone",),
    )  # fmt: skip
    return SimpleNamespace(
        networks={"student": Bright(4.0), "teacher": Bright(6.0)},
        patch_zyx=(6, 8, 8),
        spacing_mm=(3.0, 2.0, 1.0),
        class_names=("background", "bone"),
        intensity=Hundredth(),
        info=info,
    )


@pytest.fixture(autouse=True)
def _fake_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(whole_scan, "load_model", fake_model)
    whole_scan.cached_model.cache_clear()
    yield
    whole_scan.cached_model.cache_clear()


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def scan_arrays(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image in native axes with a bright box (700), and the box's mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((11, 14, 9), np.uint8)
    mask[2:6, 4 + seed : 9 + seed, 3:7] = 1
    image = np.where(mask, 700, rng.integers(-200, 200, mask.shape)).astype(np.int16)
    image[0, 0, 0] = -1000
    return image, mask


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("source")
    for seed, name in enumerate(["a", "b", "c", "d", "e"]):
        image, mask = scan_arrays(seed)
        save(root / "imagesTr" / f"{name}_0000.nii.gz", image)
        if name != "d":
            save(root / "labelsTr" / f"{name}.nii.gz", mask * 0 if name == "e" else mask)
    splits = {"train": ["c"], "val": ["a", "b", "d"], "test": ["e"]}
    (root / "splits.json").write_text(json.dumps(splits))
    (root / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "bone": 1}, "file_ending": ".nii.gz"})
    )
    path = root / "cohort.zarr"
    ingest_cohort(source=str(root), cohort=str(path), executor=LocalExecutor(1), progress=False)
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> str:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "model.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    return str(tmp_path / "run")


def evaluate(run: str, cohort: str, **changes: Any) -> dict[str, Any]:
    options = {"split": "val", "name": "val", "network": "student", "overlap": 0.5, "components": "model"}
    return evaluate_run(run=run, cohort=cohort, executor=LocalExecutor(1), progress=False, **{**options, **changes})


def test_perfect_masks_score_perfectly_and_the_folder_is_complete(run: str, cohort: str) -> None:
    metrics = evaluate(run, cohort)
    folder = Path(run) / "evaluation" / "val"
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert (metrics["split"], metrics["cohort"], metrics["scans"]) == ("val", "cohort.zarr", 2)
    assert (metrics["scans_without_annotation"], metrics["checkpoint"]) == (1, "step_0000040")
    for part in (metrics, metrics["largest_component"], metrics["teacher"], metrics["teacher"]["largest_component"]):
        assert part["classes"]["bone"]["dice"]["mean"] == 1.0
        assert part["classes"]["bone"]["hd95_mm"]["median"] == 0.0
        assert part["mean"]["missed"] == 0
    rows = list(csv.DictReader((folder / "per_scan.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 2
    assert rows[0]["scan_id"] == "a"
    assert float(rows[0]["truth_ml"]) == pytest.approx(4 * 5 * 4 * 6 / 1000)
    assert sorted(p.name for p in (folder / "figures").iterdir()) == ["best.png", "curves.png", "worst.png"]
    assert sorted(p.name for p in folder.iterdir()) == ["figures", "metrics.json", "per_scan.csv", "report.html"]
    assert "bone" in (folder / "report.html").read_text()
    assert "Warnings" not in (folder / "report.html").read_text()


def test_the_report_says_what_training_warned_of(run: str, cohort: str) -> None:
    report = Path(run) / "evaluation" / "val" / "report.html"
    shares = {"foreground_matched": 0.9, "foreground_unlabelled": 0.01, "foreground_target": 0.02}
    rows = [{"step": step, "loss": 1.0, **shares} for step in range(1, 9)]
    for row in rows[3:7]:
        row["alarm_matched_flood"] = 1
    (Path(run) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(run, cohort)
    box = re.search("<aside>.*?</aside>", report.read_text(), re.DOTALL)
    assert box is not None
    assert "Warnings while it trained" in box[0]
    assert "<b>Flood of matched labels</b> 90% of the voxels" in box[0]
    assert "; at 4 of 8 steps, from 4 to 7" in box[0]


def test_folder_of_before_is_replaced(run: str, cohort: str) -> None:
    stale = Path(run) / "evaluation" / "val" / "stale.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    evaluate(run, cohort)
    assert not stale.exists()
    assert [p.name for p in stale.parent.parent.iterdir()] == ["val"]


def test_all_takes_every_annotated_scan(run: str, cohort: str) -> None:
    metrics = evaluate(run, cohort, split="all", name="all", network="teacher")
    assert (metrics["scans"], metrics["scans_without_annotation"], metrics["network"]) == (4, 1, "teacher")
    assert "student" in metrics
    # Scan e has an empty annotation, and nothing is predicted there but what is bright: a false alarm.
    assert metrics["classes"]["bone"]["false_alarms"] == 1
    assert metrics["classes"]["bone"]["scans"] == 4


def test_a_scan_that_fails_is_listed_and_the_rest_is_written(
    run: str, cohort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_on_b(*args: Any, **kwargs: Any) -> Any:
        if args[1].shape[2] and Path(args[1].path).parts[-2] == "b":
            raise DataError("damaged chunk")
        return whole_scan.segment_scan(*args, **kwargs)

    monkeypatch.setattr(evaluate_module, "segment_scan", fail_on_b)
    with pytest.raises(FinishedWithFailures, match="damaged chunk") as caught:
        evaluate(run, cohort)
    assert caught.value.failures == (("b", "damaged chunk"),)
    metrics = json.loads((Path(run) / "evaluation" / "val" / "metrics.json").read_text())
    assert (metrics["scans"], metrics["scans_failed"]) == (1, 1)


def test_nothing_is_left_behind_when_every_scan_fails(run: str, cohort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no luck")

    monkeypatch.setattr(evaluate_module, "segment_scan", fail)
    with pytest.raises(FinishedWithFailures, match="nothing was written"):
        evaluate(run, cohort)
    assert list((Path(run) / "evaluation").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "tset"}, r"tset.*splits with annotated scans: test, train, val"),
        ({"name": "../else"}, "plain name"),
        ({"name": ""}, "plain name"),
    ],
)
def test_bad_words_are_one_line(run: str, cohort: str, changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        evaluate(run, cohort, **changes)
    assert "\n" not in str(caught.value)


def test_no_model_and_other_classes_are_refused(
    run: str, cohort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no trained model"):
        evaluate(str(tmp_path / "nothing"), cohort)
    monkeypatch.setattr(Cohort, "class_names", ["background", "organ"])
    with pytest.raises(InputError, match=r"differ in their classes.*background, bone"):
        evaluate(run, cohort)


def test_tasks_can_cross_process_borders(cohort: str) -> None:
    task = evaluate_module._Task("run", "print", Cohort.open(cohort).scan("a"), "student", 0.5, "model", 1)
    assert pickle.loads(pickle.dumps(task)).scan.scan_id == "a"
    assert pickle.loads(pickle.dumps(evaluate_module._measure_scan)) is evaluate_module._measure_scan


def predict(run: str, source: Path, output: Path, **changes: Any) -> Any:
    options = {"network": "student", "overlap": 0.5, "components": "model", **changes}
    return predict_files(
        run=run, input=str(source), output=str(output), executor=LocalExecutor(1), progress=False, **options
    )


def test_masks_lie_in_the_inputs_own_grid(run: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate(["a_0000.nii.gz", "plain.nii"]):
        save(source / name, scan_arrays(seed)[0])
    report = predict(run, source, out)
    assert [Path(path).name for path in report.written] == ["a.nii.gz", "plain.nii.gz"]
    assert report.failed == report.skipped == []
    for seed, name in enumerate(["a.nii.gz", "plain.nii.gz"]):
        mask = nib.load(out / name)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), scan_arrays(seed)[1])
        np.testing.assert_array_equal(mask.affine, AFFINE)
        assert mask.get_data_dtype() == np.uint8


def test_masks_and_measures_keep_the_largest_component(run: str, cohort: str, tmp_path: Path) -> None:
    """The model says that bone is one piece; `components=all` shows what the network said."""
    image, mask = scan_arrays(0)
    island = np.zeros_like(mask)
    island[8:10, 1, 1:3] = 1
    save(tmp_path / "in" / "a.nii.gz", np.where(island, 700, image))
    for components, expected in (("model", mask), ("all", mask + island)):
        predict(run, tmp_path / "in", tmp_path / components, components=components)
        written = np.asarray(nib.load(tmp_path / components / "a.nii.gz").dataobj)
        np.testing.assert_array_equal(written, expected)
    with pytest.raises(InputError, match=r"made otherwise|another model|not on record|other"):
        predict(run, tmp_path / "in", tmp_path / "model", components="all")


def test_evaluate_measures_the_masks_of_predict(run: str, tmp_path: Path) -> None:
    image, mask = scan_arrays(0)
    island = np.zeros_like(mask)
    island[8:10, 1, 1:3] = 1
    save(tmp_path / "raw" / "imagesTr" / "a_0000.nii.gz", np.where(island, 700, image))
    save(tmp_path / "raw" / "labelsTr" / "a.nii.gz", mask)
    (tmp_path / "raw" / "splits.json").write_text(json.dumps({"train": [], "val": ["a"]}))
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "bone": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(description))
    made = str(tmp_path / "islands.zarr")
    ingest_cohort(source=str(tmp_path / "raw"), cohort=made, executor=LocalExecutor(1), progress=False)
    dice = 2 * mask.sum() / (2 * mask.sum() + island.sum())
    for components, expected in (("model", 1.0), ("all", dice)):
        metrics = evaluate(run, made, components=components)
        assert metrics["mean"]["dice"]["mean"] == pytest.approx(expected)
        assert metrics["largest_component"]["mean"]["dice"]["mean"] == 1.0
        assert metrics["keeps_largest_component"] == (["bone"] if components == "model" else [])
        report = (Path(run) / "evaluation/val/report.html").read_text()
        assert ("as predicted, 1 of 1 filtered" in report) == (components == "model")


def test_one_file_to_one_file_and_no_clobbering(run: str, tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", scan_arrays(0)[0])
    report = predict(run, tmp_path / "a.nii.gz", tmp_path / "deep" / "mask.nii.gz")
    assert [Path(path).name for path in report.written] == ["mask.nii.gz"]
    before = (tmp_path / "deep" / "mask.nii.gz").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        predict(run, tmp_path / "a.nii.gz", tmp_path / "deep" / "mask.nii.gz")
    assert (tmp_path / "deep" / "mask.nii.gz").read_bytes() == before


def test_the_same_call_goes_on_and_another_model_is_refused(run: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save(source / "a.nii.gz", scan_arrays(0)[0])
    predict(run, source, out)
    save(source / "b.nii.gz", scan_arrays(1)[0])
    again = predict(run, source, out)
    assert ([Path(p).name for p in again.written], [Path(p).name for p in again.skipped]) == (
        ["b.nii.gz"],
        ["a.nii.gz"],
    )
    with pytest.raises(InputError, match=r"a\.nii\.gz.*differs in network; choose another output="):
        predict(run, source, out, network="teacher")
    with pytest.raises(InputError, match=r"a\.nii\.gz.*differs in overlap;"):
        predict(run, source, out, overlap=0.25)
    (Path(run) / "model" / "model.json").write_text('{"step": 2}')
    with pytest.raises(InputError, match=r"a\.nii\.gz.*differs in model;"):
        predict(run, source, out)
    save(tmp_path / "theirs/a.nii.gz", scan_arrays(0)[1])
    with pytest.raises(InputError, match=r"a\.nii\.gz.*does not say what made it"):
        predict(run, source, tmp_path / "theirs")


def test_a_mask_of_another_patient_with_the_same_file_name_is_refused(run: str, tmp_path: Path) -> None:
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    save(one / "image.nii.gz", scan_arrays(0)[0])
    save(two / "image.nii.gz", scan_arrays(1)[0])
    save(two / "before.nii.gz", scan_arrays(2)[0])
    predict(run, one, out)
    with pytest.raises(InputError, match=r"image\.nii\.gz.*differs in input_sha256; choose another") as caught:
        predict(run, two, out)
    assert "\n" not in str(caught.value)
    assert not (out / "before.nii.gz").exists()  # refused before any work
    np.testing.assert_array_equal(np.asarray(nib.load(out / "image.nii.gz").dataobj), scan_arrays(0)[1])
    (tmp_path / "moved").mkdir()
    (one / "image.nii.gz").rename(tmp_path / "moved" / "image.nii.gz")
    assert len(predict(run, tmp_path / "moved", out).skipped) == 1  # the same bytes are the same patient


def test_masks_of_two_models_in_one_folder_keep_their_own_records(run: str, tmp_path: Path) -> None:
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    save(one / "a.nii.gz", scan_arrays(0)[0])
    save(two / "b.nii.gz", scan_arrays(1)[0])
    predict(run, one, out)
    (Path(run) / "model" / "model.json").write_text('{"step": 2}')
    predict(run, two, out)
    with pytest.raises(InputError, match=r"a\.nii\.gz.*differs in model"):
        predict(run, one, out)
    assert len(predict(run, two, out).skipped) == 1
    masks = json.loads((out / ".distseg.json").read_text())["masks"]
    assert masks["a.nii.gz"]["model"] != masks["b.nii.gz"]["model"]
    (out / ".distseg.json").write_text("{")
    with pytest.raises(InputError, match=r"distseg\.json: not readable as JSON"):
        predict(run, two, out)


def test_a_killed_call_resumes(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the second mask is made, and killed between the record's line and the mask's appearance."""
    source, out = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate("ab"):
        save(source / f"{name}.nii.gz", scan_arrays(seed)[0])
    read, replace = NiftiImage.read, os.replace

    def killed_at_b(image: NiftiImage) -> Any:
        if image.path.name == "b.nii.gz":
            raise KeyboardInterrupt
        return read(image)

    monkeypatch.setattr(NiftiImage, "read", killed_at_b)
    with pytest.raises(KeyboardInterrupt):
        predict(run, source, out)
    monkeypatch.undo()
    monkeypatch.setattr(whole_scan, "load_model", fake_model)
    assert sorted(path.name for path in out.iterdir()) == [".distseg.json", "a.nii.gz"]

    def killed_before_it_shows(staged: str | Path, final: str | Path) -> None:
        if Path(final).name == "b.nii.gz":
            raise KeyboardInterrupt
        replace(staged, final)

    monkeypatch.setattr(os, "replace", killed_before_it_shows)
    with pytest.raises(KeyboardInterrupt):
        predict(run, source, out)
    monkeypatch.setattr(os, "replace", replace)
    assert sorted(path.name for path in out.iterdir()) == [".distseg.json", "a.nii.gz"]
    again = predict(run, source, out)
    assert ([Path(p).name for p in again.written], [Path(p).name for p in again.skipped]) == (
        ["b.nii.gz"],
        ["a.nii.gz"],
    )


def test_a_bad_file_does_not_stop_the_rest(run: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save(source / "good.nii.gz", scan_arrays(0)[0])
    (source / "bad.nii.gz").write_bytes(b"not gzip at all")
    report = predict(run, source, out)
    assert [Path(path).name for path in report.written] == ["good.nii.gz"]
    assert [name for name, _ in report.failed] == ["bad.nii.gz"]
    assert not (out / "bad.nii.gz").exists()
    with pytest.raises(DataError, match=r"bad\.nii\.gz"):
        predict(run, source / "bad.nii.gz", tmp_path / "other.nii.gz")


def test_bad_input_is_one_line(run: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    save(tmp_path / "two" / "a_0000.nii.gz", scan_arrays(0)[0])
    save(tmp_path / "two" / "a_0001.nii.gz", scan_arrays(0)[0])
    save(tmp_path / "twins" / "a.nii.gz", scan_arrays(0)[0])
    save(tmp_path / "twins" / "a.nii", scan_arrays(0)[0])
    (tmp_path / "notes.txt").write_text("")
    out = tmp_path / "out"
    for source, output, message in [
        (tmp_path / "nowhere", out, "no such file or folder"),
        (empty, out, "no NIfTI file"),
        (tmp_path / "notes.txt", out, "not a NIfTI file"),
        (tmp_path / "two", out, "more than one channel"),
        (tmp_path / "twins", out, "one mask"),
        (tmp_path / "twins", tmp_path / "x.nii.gz", "cannot go into one file"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            predict(run, source, output)
        assert "\n" not in str(caught.value)
    assert not out.exists()
