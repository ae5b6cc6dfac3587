"""Every command of the guides composes; those of the first two guides run, on small scans, in the order of the page."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distseg.cli import main
from distseg.doors import Verb
from tests.unit import dicom_writer
from tests.unit.tiny_cohort import write_source

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PAGES = sorted([DEPLOY / "README.md", *(DEPLOY / "guides").glob("*.md")])


def commands(page: Path) -> list[list[str]]:
    """The words of each `distseg ...` line in a page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert all(line.startswith("distseg ") for line in lines), f"{page.name}: other commands stand in plain blocks"
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_composes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(Verb, "call", lambda self, _config: called.append(self.name))
    words = commands(page)
    for command in words:
        assert main(command) == 0, command
    assert set(called) == {command[0] for command in words}


def test_the_page_on_thresholds_answers_with_a_sweep() -> None:
    verbs = [words[0] for words in commands(DEPLOY / "guides" / "which-threshold.md")]
    assert verbs.index("tune") < verbs.index("train")  # --multirun is for a few that one names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere_and_a_page_is_a_page(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:distseg|tests|deploy|conf)/[\w./-]+\w)`", text):
        assert "NAME" in named or (DEPLOY.parent / named).exists(), named
    assert page.name == "README.md" or len(text.splitlines()) <= 60


SMALL = (
    "launcher=local", "resources.workers=1", "logging.progress=false", "logging.tensorboard=false", "train.threads=1",
    "network.base_filters=2", "network.levels=2", "sampling.patch_zyx=[8,8,8]", "train.steps=2",
    "train.validation_patches=4", "method.passes=2", "references.patches=2",
)  # fmt: skip
QUICK: dict[str, tuple[str, ...]] = {
    "doctor": ("storage_mib=1",),
    "ingest": ("launcher=local", "resources.workers=1", "logging.progress=false"),
    "cohort": (),
    "train": SMALL,
    "evaluate": ("overlap=0", "logging.progress=false"),
    "predict": ("overlap=0", "logging.progress=false"),
    "export": (),
}


@pytest.mark.slow
def test_the_page_on_your_own_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "DATA")
    (tmp_path / "DATA" / "splits.json").unlink()  # the page asks for shares
    (tmp_path / "NEW").mkdir()
    shutil.copy(tmp_path / "DATA" / "imagesTr" / "u_0000.nii.gz", tmp_path / "NEW" / "u.nii.gz")
    dicom_writer.series(tmp_path / "DICOM" / "one", np.full((7, 10, 12), 1000, np.uint16))
    run_page("your-own-data")
    assert (tmp_path / "runs" / "em" / "evaluation" / "val" / "report.html").is_file()
    assert (tmp_path / "masks" / "u.nii.gz").is_file()
    assert (tmp_path / "segmentations" / "one.dcm").is_file()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("scans=2", "labelled=1", "validation=1", "warmup_steps=2", "steps=2")
    run_page("first-run", {"demo": small})
    assert (tmp_path / "first" / "masks").is_dir()
    assert (tmp_path / "first" / "bundle" / "configs" / "inference.json").is_file()


def run_page(name: str, more: dict[str, tuple[str, ...]] | None = None) -> None:
    """Run a page's commands in order, with the keys that make them small; a key said twice is the page's no longer."""
    quick: dict[str, Any] = {**QUICK, **(more or {})}
    for verb, *words in commands(DEPLOY / "guides" / f"{name}.md"):
        said = {word.split("=", 1)[0] for word in quick[verb]}
        kept = [word for word in words if word.split("=", 1)[0] not in said]
        assert main([verb, *kept, *quick[verb]]) == 0, (verb, words)


def test_the_page_on_scaling_shows_what_the_model_says() -> None:
    from tests.bench.scaling import load, table

    page = (DEPLOY / "guides" / "scaling.md").read_text()
    assert table() in page
    eight, many = load(8), load(64)
    assert "one core 34 ms a step, 7 %" in page
    assert round(many.decode_share, 2) == 0.07
    assert many.storage_mib_s == pytest.approx(8 * eight.storage_mib_s)
    assert eight.allreduce_share["25 Gbit/s"] == 0  # one node
