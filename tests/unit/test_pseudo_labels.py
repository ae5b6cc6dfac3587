"""data.pseudo_labels: unsure voxels have no part in the loss, and only what a model made of unlabelled scans trains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from distseg.data.cohort import Cohort
from distseg.data.intensity import Intensity
from distseg.data.label_output import committed_path, ledger_path
from distseg.data.nifti import write_nifti
from distseg.data.patches import PatchReader
from distseg.data.pseudo_labels import PseudoLabels
from distseg.data.volume import NativeGrid
from distseg.errors import ConfigError, DataError, RunMismatchError
from distseg.losses.supervised import DICE_SMOOTHING, IGNORE, supervised_loss
from distseg.training.feed import Feed
from distseg.training.reduce import SingleProcess
from distseg.training.setup import open_run, start_session
from tests.unit.test_training import Quiet, config, newest, rows_of, train

CLASSES = ["background", "hip", "femur"]


def pseudo_output(folder: Path, cohort_path: str, scans: str = "abcdefuvw", *, model: str = "m" * 64) -> Path:
    """What distseg label leaves, with masks and confidences at random."""
    cohort, versions = Cohort.open(cohort_path), {}
    for record in cohort.records:
        versions[record.scan_id] = record.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"format": 1, "identity": {"model": model, "classes": CLASSES}}]
    for number, scan_id in enumerate(scans):
        scan = cohort.scan(scan_id)
        rng = np.random.default_rng(number)
        shape = scan.native.geometry.shape
        scan.write_mask(committed_path(folder, "masks", scan_id), rng.integers(0, 3, shape))
        trust = 64 * rng.integers(0, 3, shape) + rng.integers(0, 64, shape)
        scan.write_mask(committed_path(folder, "trust", scan_id), trust)
        lines.append({"done": scan_id, "version": versions[scan_id]})
    ledger_path(folder).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def output(cohort_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pseudo_output(tmp_path_factory.mktemp("out"), cohort_path)


# --- the loss --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 50), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_ignored_voxels_are_as_if_they_were_not_there(seed: int, share: float) -> None:
    """Against cross-entropy and Dice written out over the known voxels alone; no gradient where ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 3, 4, 5), generator=generator)
    ignored = torch.rand(2, 3, 4, 5, generator=generator) < share
    target[ignored] = IGNORE
    loss = supervised_loss(logits, target)
    loss.sum().backward()
    for b in range(2):
        known = ~ignored[b]
        voxels, truth = logits[b][:, known].T, target[b][known]  # [n, K], [n]
        cross_entropy = functional.cross_entropy(voxels, truth) if len(truth) else torch.zeros(())
        p, dice = torch.softmax(voxels, 1), []
        for value in (1, 2):
            y = (truth == value).double()
            total = (p[:, value] ** 2).sum() + y.sum()
            dice.append((2 * (p[:, value] * y).sum() + DICE_SMOOTHING) / (total + DICE_SMOOTHING))
        expected = cross_entropy + 1 - torch.stack(dice).mean()
        torch.testing.assert_close(loss[b], expected.to(loss.dtype))
        assert not logits.grad[b][:, ignored[b]].any()
    assert torch.isfinite(logits.grad).all()


# --- labels on the run's grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(3.0, 2.0, 2.0), (4.0, 3.0, 2.5)])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_labels_are_the_nearest_voxels_and_unsure_ones_ignored(
    output: Path, cohort_path: str, tmp_path: Path, spacing: tuple[float, float, float], floor: float
) -> None:
    cohort = Cohort.open(cohort_path)
    reader = PatchReader(cohort, spacing_mm=spacing, intensity=Intensity("per_scan"), memory_nbytes=0)
    labels = PseudoLabels(
        output, scans=("c", "u"), cohort=cohort, reader=reader, spacing_mm=spacing, folder=tmp_path, confidence=floor
    )
    scan = cohort.scan("u")
    rng = np.random.default_rng(6)  # as pseudo_output drew for u
    shape = scan.native.geometry.shape
    mask, codes = rng.integers(0, 3, shape), rng.integers(0, 3, shape)
    confidence = rng.integers(0, 64, shape)
    assert ((codes == 2) & (confidence == 0)).any()
    expected = np.full(reader.shape("u"), IGNORE)
    for voxel in np.ndindex(expected.shape):
        at = [(v + 0.5) * run / native - 0.5 for v, run, native in zip(voxel, spacing, (3, 2, 2), strict=True)]
        z, y, x = (min(max(int(np.floor(a + 0.5)), 0), n - 1) for a, n in zip(at, shape, strict=True))
        no_label = codes[z, y, x] == 2 and confidence[z, y, x] == 0  # taken from a largest component
        if confidence[z, y, x] >= floor * 63 and not no_label:
            expected[voxel] = mask[z, y, x]
    whole = labels.label("u", (0, 0, 0), expected.shape)
    np.testing.assert_array_equal(whole, expected)
    box = labels.label("u", (-2, 3, 4), (5, 6, 40))
    np.testing.assert_array_equal(box[2:, :, : expected.shape[2] - 4], expected[:3, 3:9, 4:])
    assert (box[:2] == IGNORE).all()
    assert (labels.label("u", (90, 0, 0), (4, 4, 4)) == IGNORE).all()
    for name, voxels in labels.foreground("u").items():
        assert (whole[tuple(voxels.T)] == CLASSES.index(name)).all()
        assert len(np.unique(voxels, axis=0)) == len(voxels) == min(2000, (whole == CLASSES.index(name)).sum())
    again = PseudoLabels(
        output, scans=("u",), cohort=cohort, reader=reader, spacing_mm=spacing, folder=tmp_path, confidence=floor
    )
    np.testing.assert_array_equal(again.label("u", (0, 0, 0), expected.shape), expected)  # from the folder now
    assert sorted(p.name for p in tmp_path.iterdir()) == ["u"]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_hidden_labels_change_nothing_and_the_labels_asked_for_do(
    output: Path, cohort_path: str, poisoned_path: str, tmp_path: Path
) -> None:
    """Scans c to f are annotated but unlabelled in this run: their pseudo-labels train, their truth does not."""
    for name, cohort, labels in (
        ("true", cohort_path, output),
        ("poisoned", poisoned_path, output),
        ("without", cohort_path, None),
    ):
        more = {"data__pseudo_labels": str(labels), "data__pseudo_share": 0.7} if labels else {}
        reporter = Quiet()
        train(config(cohort, tmp_path / name, data__labeled_ids=["a", "b"], **more), reporter)
        if labels:
            assert "6 of 6 unlabelled training scans have pseudo-labels, which train too" in reporter.notes
    weights = [(newest(tmp_path / n) / "student.safetensors").read_bytes() for n in ("true", "poisoned", "without")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize("matching", ["prototypes", "index"])
def test_references_are_labelled_voxels(output: Path, cohort_path: str, tmp_path: Path, matching: str) -> None:
    """A pseudo-labelled patch's references come from a labelled scan, and targets hold classes or IGNORE."""
    settings = config(
        cohort_path, tmp_path / "run", matching=matching, data__labeled_ids=["a", "b"],
        data__pseudo_labels=str(output), data__pseudo_share=0.5, data__pseudo_confidence=0.6,
    )  # fmt: skip
    open_run(settings)
    feed: Feed = start_session(settings, SingleProcess()).feed
    from_pseudo = 0
    for step in range(1, 15):
        batch = feed.batch(step)
        for slot in range(2):
            labelled = batch.scan_ids[slot].split("+")[0]
            values = set(batch.labelled_target[slot].unique().tolist())
            if labelled in "ab":
                assert IGNORE not in values
                continue
            from_pseudo += 1
            assert labelled in "cdefuw"  # not v, which is held out
            assert IGNORE in values
            assert values <= {0, 1, 2, IGNORE}
            if matching == "prototypes":
                assert not torch.equal(batch.reference_image[slot], batch.labelled_image[slot])
                assert batch.reference_present[slot].any()
    assert 5 < from_pseudo < 23


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(output: Path, cohort_path: str, tmp_path: Path) -> None:
    settings = {"data__labeled_ids": ["a", "b"], "data__pseudo_labels": str(output)}
    train(config(cohort_path, tmp_path / "whole", **settings))
    with pytest.raises(KeyboardInterrupt):
        train(config(cohort_path, tmp_path / "cut", **settings), Quiet(interrupt_at=3))
    train(config(cohort_path, tmp_path / "cut", **settings))
    for name in ("student.safetensors", "teacher.safetensors"):
        assert (newest(tmp_path / "cut") / name).read_bytes() == (newest(tmp_path / "whole") / name).read_bytes()
    assert [row["loss"] for row in rows_of(tmp_path / "cut")] == [row["loss"] for row in rows_of(tmp_path / "whole")]


def test_what_is_refused(output: Path, cohort_path: str, tmp_path: Path) -> None:
    labelled = {"data__labeled_ids": ["a", "b"]}
    run = tmp_path / "run"
    with pytest.raises(DataError, match="no output of distseg label"):
        open_run(config(cohort_path, run, data__pseudo_labels=str(tmp_path / "gone"), **labelled))
    with pytest.raises(ConfigError, match=r"no pseudo-labels with this method \(got dtc\)"):
        open_run(config(cohort_path, run, method="dtc", data__pseudo_labels=str(output), **labelled))
    held_out = pseudo_output(tmp_path / "held_out", cohort_path, "av")
    with pytest.raises(DataError, match="no pseudo-label that this run can use"):
        open_run(config(cohort_path, run, data__pseudo_labels=str(held_out), **labelled))
    with pytest.raises(ConfigError, match=r"data\.pseudo_confidence: value not allowed \(got 2"):
        config(cohort_path, run, data__pseudo_confidence=2)
    other = pseudo_output(tmp_path / "classes", cohort_path, "c")
    ledger_path(other).write_text(ledger_path(other).read_text().replace("femur", "tibia"))
    with pytest.raises(ConfigError, match=r"pseudo-labels of other classes .*tibia"):
        open_run(config(cohort_path, run, data__pseudo_labels=str(other), **labelled))
    assert not run.exists()

    mine = pseudo_output(tmp_path / "mine", cohort_path, "cdu")
    text = ledger_path(mine).read_text()
    versions = [json.loads(line)["version"] for line in text.splitlines()[1:]]
    ledger_path(mine).write_text(text.replace(versions[1], "0" * 16))
    settings = config(cohort_path, run, data__pseudo_labels=str(mine), **labelled)
    _, plan = open_run(settings)
    assert plan.pseudo == ("c", "u")
    assert "1 pseudo-labels are of images that have changed since, and are left out" in plan.notes
    pseudo_output(mine, cohort_path, "cdu", model="n" * 64)
    with pytest.raises(RunMismatchError, match=r"pseudo-labels of another model \(got n"):
        train(settings)
    pseudo_output(mine, cohort_path, "cdu")
    native = Cohort.open(cohort_path).scan("c").native
    moved = native.affine.copy()
    moved[0, 3] += 5
    grid = NativeGrid(native.shape, moved)
    write_nifti(committed_path(mine, "masks", "c"), np.zeros(native.shape, np.uint8), grid)
    anew = config(cohort_path, tmp_path / "anew", data__pseudo_labels=str(mine), data__pseudo_share=1.0, **labelled)
    with pytest.raises(DataError, match="c: pseudo-label of another image"):
        train(anew)
