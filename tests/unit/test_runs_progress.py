"""The bar over many runs: fed by what lies in their directories, silent where it is off."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from distseg.training.run import RunDirectory
from distseg.work import runs_progress
from distseg.work.runs_progress import RunsProgress, steps_of


class TwoRuns(RunsProgress):
    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self.folder, self.seen = folder, []
        super().__init__(total=20, left="left", speed_over_s=9.0, bar_width=4, enabled=enabled)

    def _words(self) -> str:
        return "runs 1/2"

    def _work_done(self) -> float:
        self.seen.append(sum(steps_of(self.folder / name) for name in "ab"))
        return self.seen[-1]


def trained(run: Path, steps: int) -> None:
    run.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, steps + 1))
    RunDirectory(run).metrics_file.write_text(lines)


def test_it_follows_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs_progress, "POLL_S", 0.01)
    trained(tmp_path / "a", 3)
    progress = TwoRuns(tmp_path, enabled=True)
    with progress:
        trained(tmp_path / "b", 4)
        deadline = time.monotonic() + 30
        while progress.seen[-1] < 7:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        progress._say("[1/2] a: [done], not markup")
    said = capsys.readouterr()
    assert said.out == ""
    assert "[1/2] a: [done], not markup" in said.err
    assert "runs 1/2" in said.err
    assert progress.seen[0] == 3


def test_off_it_says_and_reads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TwoRuns(tmp_path, enabled=False) as progress:
        pass
    assert capsys.readouterr() == ("", "")
    assert progress.seen == [0]


def test_a_file_being_replaced_is_not_known(tmp_path: Path) -> None:
    assert steps_of(tmp_path / "none") == 0
    (tmp_path / "a").mkdir()
    RunDirectory(tmp_path / "a").metrics_file.write_text("{not json}\n")
    assert steps_of(tmp_path / "a", unknown=5) == 5
