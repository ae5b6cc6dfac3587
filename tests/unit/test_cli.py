"""The command line: composition equals the library's, paths arrive untouched, every mistake is one line and a code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distseg import api
from distseg.cli import main
from distseg.config.compose import train_config, tune_config
from distseg.config.presets import METHODS, PRESETS
from distseg.config.verbs import PredictConfig
from distseg.doors import VERBS, Verb, literal_override, nearest_key
from distseg.errors import DataError, FinishedWithFailures


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configs that reached the verb, in place of doing its work."""
    configs: list[Any] = []
    monkeypatch.setattr(Verb, "call", lambda _, config: configs.append(config))
    return configs


def run(*arguments: str) -> int:
    return main(list(arguments))


# --- composition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "preset", "gpus"),
    [(method, preset, 0.0) for method in METHODS for preset in PRESETS]
    + [("embedding_matching", preset, 1.0) for preset in PRESETS],
)
def test_hydra_composes_what_the_library_composes(caught: list[Any], method: str, preset: str, gpus: float) -> None:
    keys = {"train.steps": 7, "resources.gpus_per_worker": gpus, "data.spacing_mm": [3, 4, 4]}
    words = [f"{key}={value}".replace(" ", "") for key, value in keys.items()]
    assert run("train", "cohort=c", "run=r", f"method={method}", f"preset={preset}", *words) == 0
    assert caught == [train_config(cohort="c", run="r", method=method, preset=preset, overrides=keys)]


def test_matching_group_equals_the_library(caught: list[Any]) -> None:
    assert run("train", "cohort=c", "run=r", "matching=prototypes") == 0
    assert caught == [train_config(cohort="c", run="r", matching="prototypes")]


@pytest.mark.parametrize(("gpus", "expected"), [("0", "small"), ("1", "full")])
def test_preset_not_given_follows_the_device_and_is_said(
    caught: list[Any], capsys: pytest.CaptureFixture[str], gpus: str, expected: str
) -> None:
    assert run("train", "cohort=c", "run=r", f"resources.gpus_per_worker={gpus}") == 0
    assert caught[0].preset == expected
    assert f"preset={expected} (default" in capsys.readouterr().out


def test_users_key_beats_preset_and_method(caught: list[Any]) -> None:
    assert run("train", "cohort=c", "run=r", "preset=xie2024", "method.temperature=0.5", "references.k=3") == 0
    assert (caught[0].method.temperature, caught[0].references.k) == (0.5, 3)


def test_a_sweeps_keys_are_trains_and_its_own(caught: list[Any]) -> None:
    assert run("tune", "cohort=c", "run=r", "space=thresholds", "tune.trials=3", "method.passes=2") == 0
    keys = {"tune.trials": 3, "method.passes": 2}
    assert caught == [tune_config(cohort="c", run="r", space="thresholds", overrides=keys)]


@pytest.mark.parametrize("verb", [name for name in VERBS if name not in ("train", "tune")])
def test_defaults_are_the_schemas(caught: list[Any], verb: str) -> None:
    schema = VERBS[verb].schema()
    missing = [key for key in ("source", "cohort", "run", "input", "output") if getattr(schema(), key, "") == "???"]
    assert run(verb, *(f"{key}=p" for key in missing)) == 0
    assert caught == [schema(**dict.fromkeys(missing, "p"))]


def test_multirun_gives_each_job_its_own_run(
    caught: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", "-m", "cohort=c", "run=a,b", "preset=small", "method=supervised,uamt", "seed=3,4") == 0
    assert [(config.run, config.method.name, config.seed) for config in caught] == [
        (f"a,b/method={method},seed={seed}", method, seed) for method in ("supervised", "uamt") for seed in (3, 4)
    ]
    assert list(tmp_path.iterdir()) == []


def test_hydra_leaves_nothing_behind(caught: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ), list(sys.argv)
    assert run("demo") == 0
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path
    assert (dict(os.environ), list(sys.argv)) == before


# --- paths are taken verbatim ----------------------------------------------------------------------------------------

# No NUL, no surrogates: neither can be in an argument.
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
hostile = st.lists(
    st.sampled_from(
        ["=", ",", " ", "[", "]", "{", "}", "'", '"', "\\", "${", "$", "}", ":", "\u00e9", "~", "+", "#", "@"]
    )
    | text,
    max_size=8,
).map("".join)


parser = OverridesParser.create()


@settings(max_examples=150)
@given(value=hostile)
@example(value="${\\")
@example(value="\\\\${'\\")
@example(value="")
def test_quoting_survives_hydras_grammar_and_interpolation(value: str) -> None:
    parsed = parser.parse_override(literal_override(f"run={value}"))
    assert not parsed.is_sweep_override()
    if value != "???":  # OmegaConf's own word for a missing value
        assert OmegaConf.merge(OmegaConf.structured(PredictConfig), {"run": parsed.value()}).run == value


NASTY = """a=b,c [x]{y} 'q' "d" \\${run}\\\\${x:y} ${\\' \u00fc\u6f22:~+#@\\"""


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_any_path_reaches_the_function_unchanged(caught: list[Any], mode: list[str]) -> None:
    assert run("predict", *mode, f"run={NASTY}", f"input={NASTY}", f"output={NASTY}", "network=teacher") == 0
    assert caught == [PredictConfig(run=NASTY, input=NASTY, output=NASTY, network="teacher")]


@pytest.mark.parametrize(
    "path", ["a=b", "a,b", "[x]", "a b", "it's", 'q"q', "${run}", r"\${run}", "null", "1e5", "${\\"]
)
def test_branching_from_any_path(caught: list[Any], path: str) -> None:
    assert run("train", "cohort=c", f"run={path}", f"train.init_from={path}") == 0
    assert (caught[0].run, caught[0].train.init_from) == (path, path)


def test_api_makes_paths_absolute_and_refuses_urls_where_none_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from distseg.training import local

    seen: list[Any] = []
    monkeypatch.setattr(local, "train_local", lambda config, **_: seen.append(config))
    monkeypatch.chdir(tmp_path)
    overrides = {"launcher": "local", "train.init_from": "w${x}"}
    api.train(cohort="c.zarr", run="${r}", overrides=overrides)
    assert (seen[0].cohort, seen[0].run) == (str(tmp_path / "c.zarr"), str(tmp_path / "${r}"))
    assert seen[0].train.init_from == str(tmp_path / "w${x}")
    api.train(cohort="s3://bucket/c.zarr", run="s3://bucket/r", overrides={"launcher": "local"})
    assert (seen[1].cohort, seen[1].run) == ("s3://bucket/c.zarr", "s3://bucket/r")
    api.train(cohort="c.zarr", run="r", overrides={"launcher": "local", "data.pseudo_labels": "s3://bucket/p"})
    assert seen[2].data.pseudo_labels == "s3://bucket/p"


# --- mistakes --------------------------------------------------------------------------------------------------------

GOOD = ("cohort=c", "run=r")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], ["trian", "unknown verb", "did you mean distseg train?"]),
        (["xyzzy"], ["xyzzy", "unknown verb", "distseg --help"]),
        (["train"], ["cohort: key not given", "cohort=..."]),
        (["train", "cohort=c"], ["run: key not given"]),
        (["train", *GOOD, "steps=5"], ["steps", "no such key", "did you mean train.steps"]),
        (["train", *GOOD, "train.stesp=5"], ["train.stesp", "did you mean train.steps"]),
        (["train", *GOOD, "+new=5"], ["new", "no such key"]),
        (["train", *GOOD, "derived/device=gpu"], ["derived/device", "no such key"]),
        (["train", *GOOD, "method=uatm"], ["method", "uatm", "supervised", "did you mean method=uamt?"]),
        (["train", *GOOD, "-m", "method=uamt,nope"], ["method", "nope"]),
        (["train", *GOOD, "preset=smal"], ["preset", "small, full, xie2024", "did you mean preset=small?"]),
        (["train", *GOOD, "matching=prototype"], ["matching", "did you mean matching=prototypes?"]),
        (["train", *GOOD, "train.steps=abc"], ["train.steps", "abc", "Integer"]),
        (["train", *GOOD, "train.steps=0"], ["train.steps", "got 0", "at least 1"]),
        (["train", *GOOD, "resources.gpus_per_worker=x"], ["resources.gpus_per_worker", "not a number"]),
        (["train", *GOOD, "-m", "resources.gpus_per_worker=0,1"], ["resources.gpus_per_worker", "sweep"]),
        (["train", *GOOD, "data.spacing_mm=[1,2"], ["data.spacing_mm=[1,2", "key=value"]),
        (["train", *GOOD, "data.spacing_mm=[1,2]"], ["data.spacing_mm", "Z, Y, X"]),
        (["train", *GOOD, "sampling.patch_zyx=[30,32,32]"], ["sampling.patch_zyx", "multiple"]),
        (["train", *GOOD, "launcher=loca"], ["launcher", "did you mean launcher=local?"]),
        (["train", *GOOD, "~train.steps"], ["train.steps"]),
        (["train", *GOOD, "steps"], ["steps", "key=value"]),
        (["train", *GOOD, "--bogus"], ["--bogus"]),
        (["train", *GOOD, "--cfg", "jib"], ["jib"]),
        (["train", *GOOD, "-m", "--cfg", "job"], ["multirun"]),
        (["train", *GOOD, "seed=1,2"], ["seed=1,2", "--multirun"]),
        (["evaluate", *GOOD, "netwrok=teacher"], ["netwrok", "did you mean network"]),
        (["evaluate", *GOOD, "overlap=2"], ["overlap", "from 0.0 to 0.9"]),
        (["cohort", "cohort=c", "action=delete"], ["action", "list, remove, repair"]),
        (["tune", *GOOD], ["space: key not given", "add space=..."]),
        (["tune", *GOOD, "space=thresholds", "tune.trails=3"], ["tune.trails", "did you mean tune.trials"]),
        (["tune", *GOOD, "space=thresholds", "tune.runner=trian"], ["did you mean tune.runner=train?"]),
        (["tune", *GOOD, "space=thresholds", "tune.objective=val_hd"], ["tune.objective", "one of val_dice"]),
        (["demo", "labelled=20"], ["labelled", "from 1 to 16"]),
    ],
)
def test_config_mistakes_are_one_line_and_code_2(
    caught: list[Any], capsys: pytest.CaptureFixture[str], words: list[str], says: list[str]
) -> None:
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert all(part in said for part in says), said
    assert not caught


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "cohort=", "run=r", "launcher=local"], "cohort: empty path"),
        (["ingest", "source=gone", "cohort=c.zarr", "launcher=local"], "gone"),
        (["cohort", "cohort=gone.zarr"], "gone.zarr"),
        (["cohort", "cohort=gone.zarr", "action=remove"], "scan: key not given"),
        (["cohort", "cohort=gone.zarr", "action=repair"], "gone.zarr"),
        (["train", "cohort=gone.zarr", "run=r", "launcher=local"], "gone.zarr"),
        (["tune", "cohort=gone.zarr", "run=r", "space=thresholds"], "gone.zarr"),
        (["tune", "cohort=gone.zarr", "run=r", "space=treshold"], "did you mean space=thresholds?"),
        (["tune", "cohort=gone.zarr", "run=r", "space=gone.yaml"], "gone.yaml"),
        (["evaluate", "cohort=gone.zarr", "run=gone"], "gone"),
        (["predict", "run=gone", "input=gone.nii.gz", "output=o"], "gone"),
    ],
)
def test_missing_inputs_are_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert says in said


class RayTaskLike(DataError):
    """As Ray wraps an error of a task: an instance of its class, with the original in `cause`."""

    def __init__(self) -> None:
        self.cause = DataError("empty file", where="a.nii")
        Exception.__init__(self, "a remote traceback\nof many lines")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("empty file", where="a.nii", fix="copy it again"), 2, "a.nii: empty file; copy it again\n"),
        (RayTaskLike(), 2, "a.nii: empty file\n"),
        (MemoryError(), 2, "out of memory; free some, or ask for less; dry_run=true tells what train and label take\n"),
        (PermissionError(13, "Permission denied", "/srv/x"), 2, "/srv/x: Permission denied; choose another path\n"),
        (OSError(28, "No space left on device"), 2, "No space left on device; make room; the same command goes on\n"),
        (
            OSError(5, "Input/output error", "x"),
            2,
            "x: Input/output error; the same command goes on once the storage answers\n",
        ),
        (
            FinishedWithFailures("2 done", [("a", "bad"), ("b", "worse")]),
            3,
            "2 done; 2 failed:\n  a: bad\n  b: worse\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command again resumes\n"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, says: str
) -> None:
    def fail(config: Any) -> None:
        raise error

    monkeypatch.setattr(api, "demo_from_config", fail)
    assert run("demo") == code
    assert capsys.readouterr().err == says


@pytest.mark.parametrize("wanted", [False, True])
def test_a_fault_of_ours_is_code_1_and_tells_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: bool
) -> None:
    def fail(config: Any) -> None:
        raise IndexError("off by one\nsecond line")

    monkeypatch.setattr(api, "demo_from_config", fail)
    monkeypatch.setenv("DISTSEG_TRACEBACK", "1" if wanted else "")
    assert run("demo") == 1
    said = capsys.readouterr().err
    assert ("Traceback" in said) == wanted
    line = said.strip().splitlines()[-1]
    assert line.startswith("internal error: IndexError: off by one; ")
    assert "DISTSEG_TRACEBACK=1" in line


def test_the_worst_job_of_a_sweep_decides_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(verb: Verb, config: Any) -> None:
        if config.seed != 1:
            raise DataError("bad")

    monkeypatch.setattr(Verb, "call", fail)
    assert run("train", "-m", *GOOD, "preset=small", "seed=0,1") == 2


# --- what it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage_lists_each_verb_in_one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(sum(line.split()[:1] == [verb] for line in lines) == 1 for verb in VERBS)


@pytest.mark.parametrize("verb", ["train", "demo"])
def test_help_names_every_key(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run(verb, "--help") == 0
    said = capsys.readouterr().out
    assert all(f"{key.rsplit('.', 1)[-1]}:" in said for key in VERBS[verb].all_keys())
    assert "derived" not in said


def test_cfg_job_is_yaml_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "cohort=c", "--cfg", "job", "run=a=b") == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.cohort, shown.run, shown.preset) == ("c", "a=b", "small")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("distseg 0.")


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("distseg tr", "train"),
        ("distseg train method=u", "method=uamt"),
        ("distseg train train.ste", "train.steps="),
        ("distseg evaluate net", "network="),
    ],
)
def test_completion(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, offers: str
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert run("-sc", "query=bash") == 0
    assert capsys.readouterr().out.split() == [offers]


def test_nearest_key_by_its_last_word() -> None:
    assert nearest_key("batch_size", ["train.steps", "train.batch_size"]) == "train.batch_size"
    assert nearest_key("bacth_size", ["train.steps", "train.batch_size"]) == "train.batch_size"
    assert nearest_key("zzz", ["train.steps"]) is None


def test_launcher_local_imports_no_ray(tmp_path: Path) -> None:
    """A fresh process that ingests two phantoms and lists the cohort."""
    code = """
import sys
from distseg.cli import main
from distseg.data.phantom import write_phantoms
source, cohort = sys.argv[1:]
write_phantoms(source, scans=1, labelled=1, seed=0, val=1)
assert main(["ingest", f"source={source}", f"cohort={cohort}", "launcher=local", "resources.workers=1"]) == 0
assert main(["cohort", f"cohort={cohort}"]) == 0
loaded = [name for name in sys.modules if name == "ray" or name.startswith("ray.")]
assert not loaded, loaded[:5]
"""
    command = [sys.executable, "-c", code, str(tmp_path / "s=1"), str(tmp_path / "c,1.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 scans" in done.stdout
