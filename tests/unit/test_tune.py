"""Sweeps on the tiny cohort, without Ray: what is tried, what is kept, what a failing or killed trial leaves."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distseg.config.compose import tune_config
from distseg.config.schema import TrainRunConfig
from distseg.config.spaces import load_space, parse_space, space_folder
from distseg.config.verbs import TuneRunConfig
from distseg.errors import ConfigError, DataError, FinishedWithFailures, RunMismatchError
from distseg.inference.model import load_model
from distseg.training.local import train_local
from distseg.work.executor import LocalExecutor
from distseg.work.tune import LocalTrials, TuneResult, run_tune

TINY: dict[str, Any] = {
    "launcher": "local",
    "network.base_filters": 2,
    "network.levels": 2,
    "sampling.patch_zyx": [8, 8, 8],
    "train.steps": 2,
    "train.validation_patches": 2,
    "train.threads": 1,
    "method.passes": 2,
    "references.patches": 2,
    "matching.k": 2,
    "logging.progress": False,
    "logging.tensorboard": False,
    "tune.looks": 1,
    "tune.warmup_steps": 1,
    "tune.validation_share": 1.0,
}
SPACE = {
    "description": "two keys",
    "parameters": {
        "method.threshold": {"choice": ["paper", "fixed"]},
        "method.threshold_value": {"uniform": [0.5, 1.0], "when": {"method.threshold": ["fixed"]}},
        "method.weight_ua": {"loguniform": [0.1, 1.0]},
    },
}


def config(cohort: str, run: Path, **more: Any) -> TuneRunConfig:
    """Double underscores in `more` are dots; the space is written beside the run."""
    space = more.pop("space", SPACE)
    file = run.parent / "space.yaml"
    run.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(space, sort_keys=False))
    keys = {**TINY, "tune.trials": 3, **{key.replace("__", "."): value for key, value in more.items()}}
    return tune_config(cohort=cohort, run=str(run), space=str(file), overrides=keys)


class Trains:
    """Trains for real and remembers what; raises what it is told to, at the run of that name."""

    def __init__(self, **faults: BaseException) -> None:
        self.faults, self.trained = faults, []

    def __call__(self, run: TrainRunConfig) -> Any:
        name = Path(run.run).name
        if name in self.faults:
            raise self.faults[name]
        self.trained.append(name)
        return train_local(run)


def sweep(settings: TuneRunConfig, train: Trains) -> TuneResult:
    return run_tune(settings, runner=LocalTrials(LocalExecutor(1), train), train=train)


def table(run: Path) -> list[dict[str, str]]:
    with (run / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_and_the_same_command_again(cohort_path: str, tmp_path: Path) -> None:
    """One warm-up for all, the default first, a best model like any other; the second time nothing is left to do."""
    run, train = tmp_path / "sweep", Trains()
    result = sweep(config(cohort_path, run), train)
    assert train.trained == ["warmup", "default", *result.finished[1:]]
    assert (len(result.finished), result.stopped, result.failed) == (3, (), ())
    rows = {row["trial"]: row for row in table(run)}
    assert set(rows) == set(result.finished)
    best = max(float(row["value"]) for row in rows.values())
    assert result.objective == pytest.approx(best, abs=1e-5)  # the table has six digits
    assert load_model(run / "best").info.class_names == ("background", "hip", "femur")
    overrides = yaml.safe_load((run / "best" / "best.yaml").read_text())
    assert all(overrides[key] == value for key, value in result.values.items() if key in overrides)
    assert all(name in (run / "report.html").read_text() for name in ("method.weight_ua", *result.finished))
    again = Trains()
    assert sweep(config(cohort_path, run), again) == result
    assert again.trained == []


def test_a_killed_sweep_goes_on(cohort_path: str, tmp_path: Path) -> None:
    """What had ended is kept, what was running is done, with the values of an undisturbed sweep."""
    undisturbed = sweep(config(cohort_path, tmp_path / "a" / "sweep"), Trains())
    second = undisturbed.finished[1]
    run = tmp_path / "b" / "sweep"
    with pytest.raises(KeyboardInterrupt):
        sweep(config(cohort_path, run), Trains(**{second: KeyboardInterrupt()}))
    train = Trains()
    resumed = sweep(config(cohort_path, run), train)
    assert train.trained == list(undisturbed.finished[1:])
    assert (resumed.best, resumed.values, resumed.objective) == (
        undisturbed.best, undisturbed.values, undisturbed.objective,
    )  # fmt: skip


def test_optuna_searches_and_goes_on(cohort_path: str, tmp_path: Path) -> None:
    run = tmp_path / "sweep"
    result = sweep(config(cohort_path, run, tune__search="optuna"), Trains())
    assert len(result.finished) == 3
    weights = [row["method.weight_ua"] for row in table(run) if row["trial"] != "default"]
    assert len(set(weights)) == 2
    assert all(0.1 <= float(weight) <= 1.0 for weight in weights)
    again = Trains()
    assert sweep(config(cohort_path, run, tune__search="optuna"), again) == result
    assert again.trained == []


def test_without_optuna_its_search_is_one_line(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"tune\.search: Optuna is not installed .*'distseg\[tune\]'"):
        sweep(config(cohort_path, tmp_path / "sweep", tune__search="optuna"), Trains())


def test_a_failing_trial_does_not_take_the_sweep_along(cohort_path: str, tmp_path: Path) -> None:
    """It is shown with its reason, the others finish (exit 3), and the same command tries it again."""
    run = tmp_path / "sweep"
    fault = DataError("a broken scan", where="scan b")
    with pytest.raises(FinishedWithFailures, match="1 failed:\n  default: scan b: a broken scan") as caught:
        sweep(config(cohort_path, run), Trains(default=fault))
    assert caught.value.exit_code == 3
    rows = {row["trial"]: row for row in table(run)}
    assert len(rows) == 3
    assert "a broken scan" in str(rows["default"].values())
    train = Trains()
    assert len(sweep(config(cohort_path, run), train).finished) == 3
    assert train.trained == ["default"]


def test_another_sweep_in_the_directory_is_refused(cohort_path: str, tmp_path: Path) -> None:
    sweep(config(cohort_path, tmp_path / "sweep", tune__trials=1), Trains())
    with pytest.raises(RunMismatchError, match=r"method\.weight_en"):
        sweep(config(cohort_path, tmp_path / "sweep", tune__trials=1, method__weight_en=0.5), Trains())


def space_of(**parameters: Any) -> dict[str, Any]:
    return {"description": "d", "parameters": {key.replace("__", "."): value for key, value in parameters.items()}}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (space_of(), "parameters"),
        (space_of(method__treshold={"choice": ["paper"]}), r"did you mean method\.threshold"),
        (space_of(method__weight_ua={"unifrom": [0, 1]}), "uniform"),
        (space_of(method__weight_ua={"uniform": [1, 0]}), r"method\.weight_ua"),
        (space_of(method__name={"choice": ["uamt"]}), "benchmark"),
        (space_of(method__temperature={"uniform": [0.0, 1.0]}), r"method\.temperature"),
        (space_of(method__threshold={"choice": ["paper", "magic"]}), "magic"),
    ],
)
def test_a_bad_space_is_one_line_before_anything_runs(
    cohort_path: str, tmp_path: Path, space: dict[str, Any], message: str
) -> None:
    train = Trains()
    with pytest.raises(ConfigError, match=message) as caught:
        sweep(config(cohort_path, tmp_path / "sweep", space=space), train)
    assert "\n" not in str(caught.value)
    assert train.trained == []
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tune__runner": "train"}, "needs Ray"),
        ({"tune__scheduler": "asha"}, "needs Ray"),
        ({"tune__objective": "val_magic"}, r"tune\.objective"),
        ({"resources__workers": 2}, r"resources\.workers"),
    ],
)
def test_what_cannot_run_is_said_first(cohort_path: str, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(config(cohort_path, tmp_path / "sweep", **more), Trains())


@pytest.mark.parametrize("name", sorted(file.stem for file in space_folder().glob("*.yaml")))
def test_shipped_spaces(cohort_path: str, tmp_path: Path, name: str) -> None:
    """They parse, and every extreme value is one that training takes: a dry run composes them all."""
    assert load_space(name).keys
    keys = {**TINY, "tune.trials": 6}
    settings = tune_config(
        cohort=cohort_path, run=str(tmp_path / "sweep"), space=name, overrides={**keys, "dry_run": True}
    )
    assert sweep(settings, Trains()).finished == ()
    assert not (tmp_path / "sweep").exists()


def test_draws_cover_their_range() -> None:
    space = parse_space("s", space_of(references__k={"loguniform": [1, 64]}, method__weight_nn={"uniform": [0, 2]}))
    whole, number = space.parameters
    drawn = [whole.at(u / 1000) for u in range(1000)]
    assert {type(v) for v in drawn} == {int}
    assert (min(drawn), max(drawn)) == (1, 64)
    assert sum(v < 8 for v in drawn) == pytest.approx(500, abs=40)  # half of the octaves
    assert (number.at(0.0), number.at(0.5)) == (0.0, 1.0)
