"""distseg label into a URL, in fsspec's memory and (slow) in a real S3 server, leaves what it leaves in a folder,
whoever is killed and whatever store is away; and what it leaves there trains."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from distseg import api
from distseg.config.verbs import LabelConfig, LabelSectionConfig
from distseg.data.cohort import Cohort
from distseg.data.intensity import Intensity
from distseg.data.label_output import committed, pieces, read_identity, read_ledger
from distseg.data.patches import PatchReader
from distseg.data.place import as_place
from distseg.data.pseudo_labels import PseudoLabels
from distseg.errors import InputError, RunMismatchError
from distseg.training.pseudo_labels import find_pseudo_labels
from distseg.work import url_ledger, url_owner
from distseg.work.executor import LocalExecutor
from distseg.work.label_cohort import LabelReport, label_cohort
from distseg.work.label_task import Labelled, LabelTask, label_one
from distseg.work.url_ledger import open_ledger
from distseg.work.url_owner import owning_folder
from tests.unit.test_cohort_url import s3_bucket
from tests.unit.test_label_cohort import ALL, SETTINGS, _forget_models, contents, reviewed, run, undisturbed
from tests.unit.test_run_url import Killed, away, downloaded, elsewhere, killed_at
from tests.unit.test_training import config

__all__ = ["_forget_models", "elsewhere", "run", "s3_bucket", "undisturbed"]  # fixtures
URL = "memory://bucket/labels"

pytestmark = pytest.mark.usefixtures("one_thread")


def label(run: str, cohort: str, settings: LabelSectionConfig = SETTINGS, **more: Any) -> LabelReport:
    more.setdefault("executor", LocalExecutor(1))
    return label_cohort(run=run, cohort=cohort, output=URL, settings=settings, progress=False, **more)


def check(url: str, undisturbed: Path, tmp_path: Path) -> Path:
    """The files of the undisturbed labelling, and each scan done once; no lock is left."""
    copy = downloaded(url, tmp_path / "copy")
    assert contents(copy) == contents(undisturbed)
    assert reviewed(copy) == reviewed(undisturbed)
    assert sorted(path.name for path in copy.iterdir()) == [
        "ledger", "masks", "next_to_label.csv", "review.html", "scans.csv", "trust",
    ]  # fmt: skip
    assert (copy / "review.html").read_text().count("<img ") == 2
    assert sorted(line["done"] for line in read_ledger(as_place(url)) if "done" in line) == ALL
    return copy


def never(task: LabelTask) -> Labelled:
    raise AssertionError(f"{task.scan_id} is labelled again")


def test_behind_a_url_it_is_the_local_one(
    run: str, cohort_path: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, whatever the size of a piece; and it may be copied to a folder and back, and goes on in either."""
    monkeypatch.setattr(url_ledger, "PIECE_LINES", 4)
    assert label(run, cohort_path).labelled == 9
    assert pieces(as_place(URL)) == ["0000000.jsonl", "0000001.jsonl", "0000002.jsonl"]  # 1 + 9 lines
    copy = check(URL, undisturbed, tmp_path)
    assert label(run, cohort_path, labeller=never).done_before == 9
    with pytest.raises(RunMismatchError, match=rf"{URL}: this output was labelled otherwise.*overlap: 0\.25 there"):
        label(run, cohort_path, LabelSectionConfig(overlap=0.5))
    (copy / "masks/c.nii.gz").unlink()  # of a copy that was not whole
    here = {"run": run, "cohort": cohort_path, "settings": SETTINGS, "executor": LocalExecutor(1), "progress": False}
    assert label_cohort(output=str(copy), **here).labelled == 1
    assert contents(copy) == contents(undisturbed)
    fsspec.filesystem("memory").rm("/bucket/labels", recursive=True)
    fsspec.filesystem("memory").put(f"{copy}/", "/bucket/labels/", recursive=True)
    assert label_cohort(output=URL, labeller=never, **here).done_before == 9


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_write_no_scan_is_done_twice(
    run: str, cohort_path: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """At seeded uploads, again and again: a scan whose line is there is never labelled again, none is lost."""
    rng, deaths = random.Random(seed), 0
    for _ in range(40):
        done = {line["done"] for line in read_ledger(as_place(URL)) if "done" in line}

        def labeller(task: LabelTask, done: set[str] = done) -> Labelled:
            assert task.scan_id not in done
            return label_one(task)

        try:
            with killed_at(rng.randint(0, 12), monkeypatch):
                assert label(run, cohort_path, labeller=labeller).set_aside == []
            break
        except Killed:
            deaths += 1
            fsspec.filesystem("memory").store.pop("/bucket/labels/owner.json", None)
    assert 3 <= deaths < 40
    check(URL, undisturbed, tmp_path)


def test_an_image_that_changed_is_labelled_anew(run: str, cohort_path: str) -> None:
    """Its last line counts, from whichever piece; a mask that is gone is made again."""
    label(run, cohort_path)
    before = fsspec.filesystem("memory").cat(f"{URL}/trust/b.nii.gz")
    fsspec.filesystem("memory").rm(f"{URL}/masks/b.nii.gz")
    ledger = open_ledger(as_place(URL), read_identity(as_place(URL)), cohort_path)
    assert sorted(ledger.versions) == sorted(set(ALL) - {"b"})
    line = next(line for line in read_ledger(as_place(URL)) if line.get("done") == "d")
    ledger.commit("d", "another", {key: line[key] for key in line.keys() - {"done", "version"}})
    assert open_ledger(as_place(URL), read_identity(as_place(URL)), cohort_path).versions["d"] == "another"
    calls: list[str] = []

    def counted(task: LabelTask) -> Labelled:
        calls.append(task.scan_id)
        return label_one(task)

    label(run, cohort_path, labeller=counted)
    assert sorted(calls) == ["b", "d"]
    assert fsspec.filesystem("memory").cat(f"{URL}/trust/b.nii.gz") == before


def test_a_store_that_is_away(
    run: str, cohort_path: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while: nobody notices. For longer: one line, and the same command goes on."""
    with away(monkeypatch, after=20, requests=1000), pytest.raises(InputError) as told:
        label(run, cohort_path)
    said = str(told.value)
    assert said.startswith(f"{URL}")
    assert "storage does not answer" in said
    assert "the same command goes on from what is there" in said
    assert "\n" not in said
    done = [line["done"] for line in read_ledger(as_place(URL)) if "done" in line]
    assert 0 < len(done) < 9
    as_place(URL).joinpath("owner.json").unlink()  # as it could not be taken away
    with away(monkeypatch, after=12, requests=3) as asked:
        assert label(run, cohort_path).done_before == len(done)
    assert len(asked) > 25
    check(URL, undisturbed, tmp_path)


def test_one_driver_at_a_time(run: str, cohort_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_owner, "HEARTBEAT_S", 0.05)
    with (
        owning_folder(URL, what="output", key="output"),
        pytest.raises(InputError, match=rf"{URL}: another process writes this output"),
    ):
        label(run, cohort_path, labeller=never)
    with pytest.raises(InputError, match=r"output: .*nowhere://b/labels"):
        api.label_from_config(LabelConfig(run=run, cohort=cohort_path, output="nowhere://b/labels", launcher="local"))


def test_a_scan_that_fails_is_told(run: str, cohort_path: str) -> None:
    def failing(task: LabelTask) -> Labelled:
        if task.scan_id == "e":
            raise ValueError("no")
        return label_one(task)

    assert label(run, cohort_path, labeller=failing).set_aside == [("e", "ValueError: no")]
    assert [line["attempt"] for line in read_ledger(as_place(URL)) if "failed" in line] == [1, 2]
    assert committed(as_place(URL)) == set(ALL) - {"e"}


def test_they_train(run: str, cohort_path: str, undisturbed: Path, tmp_path: Path) -> None:
    """What training finds and reads is what it would in the folder."""
    label(run, cohort_path)
    cohort = Cohort.open(cohort_path)
    settings = config(cohort_path, tmp_path / "r", data__pseudo_labels=URL)
    found = find_pseudo_labels(settings, cohort, ["u", "w"])
    settings.data.pseudo_labels = str(undisturbed)
    assert found == find_pseudo_labels(settings, cohort, ["u", "w"])
    assert found.scans == ("u", "w")
    spacing = (2.0, 2.5, 3.0)
    reader = PatchReader(cohort, spacing_mm=spacing, intensity=Intensity("CT", -900, 900, 0, 1), memory_nbytes=0)
    both = []
    for place in (as_place(URL), undisturbed):
        folder = tmp_path / f"{len(both)}"
        folder.mkdir()
        labels = PseudoLabels(
            place, scans=("u", "w"), cohort=cohort, reader=reader, spacing_mm=spacing, folder=folder, confidence=0.1
        )
        both.append([labels.label(scan, (0, 0, 0), reader.shape(scan)) for scan in ("u", "w")])
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "workers"), [("local", 1), ("local", 2), pytest.param("ray", 2, marks=pytest.mark.ray)]
)
def test_on_s3(
    run: str,
    cohort_path: str,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3_bucket: str,
    launcher: str,
    workers: int,
) -> None:
    """By a real S3 server; two processes, or actors, need no file system in common. Then a round that finds nothing to
    do."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    url = f"{s3_bucket}/labels-{launcher}-{workers}"
    settings = LabelConfig(run=run, cohort=cohort_path, output=url, label=SETTINGS, launcher=launcher)
    settings.resources.workers, settings.logging.progress = workers, False
    for labelled in (9, 0):
        report = api.label_from_config(settings)
        assert isinstance(report, LabelReport)
        assert (report.labelled, report.output) == (labelled, url)
    check(url, undisturbed, tmp_path)
    shutil.rmtree(tmp_path / "copy")
