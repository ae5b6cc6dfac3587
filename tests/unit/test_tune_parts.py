"""A sweep's parts by themselves: search, journal, what a run directory tells, taking over, importance, best.yaml."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from distseg.cli import main
from distseg.config.compose import identity, train_config
from distseg.config.schema import NetworkConfig
from distseg.config.spaces import Space, parse_space
from distseg.doors import Verb
from distseg.errors import ConfigError, DataError, FinishedWithFailures
from distseg.evaluation.tune_importance import importance
from distseg.inference.model import build_network
from distseg.training.checkpoint import checkpoint_dir, load_checkpoint
from distseg.training.local import train_local
from distseg.training.run import RunDirectory
from distseg.work import tune_checks
from distseg.work.tune_best import command, overrides_of
from distseg.work.tune_checks import prepare
from distseg.work.tune_estimate import estimate, run_nbytes
from distseg.work.tune_report import found_importance, write_report
from distseg.work.tune_search import Ended, GridSearch, OptunaSearch, RandomSearch, make_search, perturbed
from distseg.work.tune_sweep import Sweep
from distseg.work.tune_trial import fork_run, looks_of
from distseg.work.tune_trials import Trials
from tests.unit.test_tune import SPACE, Trains, config, space_of, sweep, table

MIXED = parse_space(
    "mixed",
    space_of(
        method__threshold={"choice": ["paper", "fixed"]},
        method__threshold_value={"uniform": [0.5, 1.0], "when": {"method.threshold": "fixed"}},
        augment__flip={"grid": ["none", "left_right", "all"]},
        references__k={"loguniform": [1, 64]},
        references__patches={"uniform": [4, 32], "step": 4},
    ),
)


def holds(space: Space, values: dict[str, Any]) -> bool:
    """Whether every active key has a value of its own, and no other key any."""
    return space.active(values) == values and all(
        (p.key in values) == p.is_active(values) and (p.key not in values or p.holds(values[p.key]))
        for p in space.parameters
    )


def made(cohort: str, run: Path, **more: Any) -> tuple[Sweep, Trials]:
    run.mkdir(parents=True, exist_ok=True)
    prepared = prepare(config(cohort, run, **more))
    return prepared.sweep, Trials(prepared.sweep, prepared.search)


def finish(trials: Trials, name: str, looks: dict[int, float]) -> None:
    for step, value in looks.items():
        trials._append({"trial": name, "event": "look", "step": step, "value": value})
    trials._append({"trial": name, "event": "ended", "state": "finished", "reason": "", "seconds": 1.0})


# --- search --------------------------------------------------------------------------------------------------------


def test_a_random_trial_depends_on_seed_and_number_alone() -> None:
    drawn = [RandomSearch(MIXED, seed=3).ask(number) for number in range(200)]
    assert drawn[117] == RandomSearch(MIXED, seed=3).ask(117) != RandomSearch(MIXED, seed=4).ask(117)
    assert all(values is not None and holds(MIXED, values) for values in drawn)
    assert {values["augment.flip"] for values in drawn[3:6] if values} == {"none", "left_right", "all"}
    assert {values["references.patches"] for values in drawn if values} == set(range(4, 33, 4))
    assert 60 < sum("method.threshold_value" in values for values in drawn if values) < 140


def test_a_grid_is_the_product_without_what_is_moot() -> None:
    space = parse_space(
        "g",
        space_of(
            method__threshold={"choice": ["paper", "fixed"]},
            method__threshold_value={"grid": [0.5, 0.75, 1.0], "when": {"method.threshold": "fixed"}},
            method__weight_nn={"choice": [0.0, 0.125]},
        ),
    )
    search = GridSearch(space)
    by_hand = [("paper", None, 0.0), ("paper", None, 0.125)]
    by_hand += [("fixed", value, weight) for value in (0.5, 0.75, 1.0) for weight in (0.0, 0.125)]
    asked = [search.ask(number) for number in range(len(by_hand))]
    keys = ("method.threshold", "method.threshold_value", "method.weight_nn")
    assert [tuple(values.get(key) for key in keys) for values in asked if values] == by_hand
    assert search.ask(len(by_hand)) is None
    with pytest.raises(ConfigError, match=r"space mixed: method\.threshold_value: a grid needs lists \(got uniform\)"):
        make_search("grid", MIXED, seed=0)


def test_optuna_learns_and_takes_earlier_trials_back() -> None:
    space = parse_space("o", space_of(method__weight_ua={"loguniform": [0.01, 10.0]}))
    search = OptunaSearch(space, seed=0, maximise=True)
    ended = [
        Ended({"method.weight_ua": 0.25}, {1: -1.1}, -1.1),  # another session's
        Ended({"method.weight_ua": 99.0}, {1: 0.1}, 0.1),  # a default outside the space: left out
        Ended({"method.weight_ua": 0.5}, {}, None),
    ]
    distances = []
    for number in range(30):
        values = search.ask(number, ended)
        assert values is not None
        assert holds(space, values)
        distance = abs(np.log10(values["method.weight_ua"]) - 0.5)
        distances.append(distance)
        value = None if number % 7 == 6 else -float(distance)
        ended.append(Ended(values, {1: 0.0, 2: -float(distance)}, value))
    assert np.median(distances[-10:]) < 0.5 * np.median(distances[:6])
    mixed = OptunaSearch(MIXED, seed=0, maximise=True)
    assert all(holds(MIXED, mixed.ask(number) or {}) for number in range(8))


def test_optuna_goes_on_as_if_there_had_been_one_session(cohort_path: str, tmp_path: Path) -> None:
    """Two trials end, a fresh process goes on: what it proposes is new, and what one session would have proposed."""
    space = space_of(method__weight_ua={"loguniform": [0.1, 1.0]}, method__weight_nn={"uniform": [0, 1], "step": 0.3})
    keys = {"space": space, "tune__search": "optuna", "tune__trials": 12}

    _, whole = made(cohort_path, tmp_path / "whole", **keys)
    for trial in iter(whole.next, None):
        finish(whole, trial.name, {2: sum(map(ord, trial.name)) % 7 / 10})
    cut, proposed = tmp_path / "cut", []
    for _ in range(6):  # sessions of two trials each: startup's random draws, and the model's
        _, trials = made(cohort_path, cut, **keys)
        for _ in range(2):
            trial = trials.next()
            assert trial is not None
            proposed.append(trial.values)
            finish(trials, trial.name, {2: sum(map(ord, trial.name)) % 7 / 10})
    assert proposed == [trial.values for trial in whole.by_name.values()]
    assert len({json.dumps(values) for values in proposed}) == 12


def test_a_range_with_steps_has_no_value_off_its_grid() -> None:
    """Of bounds that the steps do not meet the last step is the end; a default off the grid is left out of Optuna."""
    numbers, whole = parse_space(
        "s", space_of(method__weight_ua={"uniform": [0, 1], "step": 0.3}, references__k={"uniform": [1, 8], "step": 4})
    ).parameters
    assert numbers.ends() == (0.0, 0.9)
    assert whole.ends() == (1, 5)
    assert [numbers.nearest(value) for value in (0.1, 0.16, 0.95, 1.0, 7.0)] == [0.0, 0.3, 0.9, 0.9, 0.9]
    assert {numbers.at(u / 100) for u in range(100)} == {0.0, 0.3, 0.6, 0.9}
    assert [numbers.holds(value) for value in (0.3, 0.1 * 3, 0.25, 1.0, None, True)] == [True, True, *[False] * 4]
    assert [whole.holds(value) for value in (1, 5, 4, 9)] == [True, True, False, False]
    search = OptunaSearch(parse_space("s", space_of(method__weight_ua={"uniform": [0, 1], "step": 0.3})), seed=0,
                          maximise=True)  # fmt: skip
    ended = [Ended({"method.weight_ua": 0.25}, {1: 0.5}, 0.5), Ended({"method.weight_ua": 0.9}, {1: 0.5}, 0.5)]
    assert all((search.ask(n, ended * 4) or {})["method.weight_ua"] in (0.0, 0.3, 0.6, 0.9) for n in range(8))


def test_optuna_hears_of_the_model_and_not_of_the_last_look(cohort_path: str, tmp_path: Path) -> None:
    _, trials = made(cohort_path, tmp_path / "s", train__select="val")
    default = trials.next()
    assert default is not None
    finish(trials, "default", {1: 0.8, 2: 0.3})
    heard: list[Ended] = []
    trials._search = SimpleNamespace(ask=lambda _, ended: heard.extend(ended))  # type: ignore[assignment]  # listens
    assert trials.next() is None
    assert [(one.looks, one.value) for one in heard] == [({1: 0.8, 2: 0.3}, 0.8)]


def test_optuna_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"tune\.search: Optuna is not installed .*pip install 'distseg\[tune\]'"):
        make_search("optuna", MIXED, seed=0)


def test_pbt_moves_to_a_neighbour_or_anywhere_within_the_space() -> None:
    before = {"method.threshold": "fixed", "method.threshold_value": 0.98, "augment.flip": "none", "references.k": 63}
    moved = [perturbed(MIXED, before, seed=0, name="t001", step=step) for step in range(100)]
    assert moved[5] == perturbed(MIXED, before, seed=0, name="t001", step=5)
    assert all(holds(MIXED, values) for values in moved)
    kept = [values["references.k"] for values in moved if "references.k" in values]
    assert 30 < sum(k in (50, 64) for k in kept) < 95  # x 0.8 rounded down, x 1.2 at the bound; else drawn anew
    assert {"paper", "fixed"} == {values["method.threshold"] for values in moved}


# --- the journal ---------------------------------------------------------------------------------------------------


def test_the_journal_survives_a_kill_in_the_middle_of_a_line(cohort_path: str, tmp_path: Path) -> None:
    sweep_, trials = made(cohort_path, tmp_path / "s")
    first, second = trials.next(), trials.next()
    assert first is not None
    assert second is not None
    file = sweep_.run / "trials.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"trial": "default", "event": "en')
    _, again = made(cohort_path, tmp_path / "s")
    assert file.read_bytes() == whole
    assert [again.next(), again.next()] == [first, second]  # both go on, with the values they had
    file.write_bytes(whole + b"nonsense\n")
    with pytest.raises(DataError, match=r"trials\.jsonl: line 3 is no event"):
        made(cohort_path, tmp_path / "s")


def test_more_trials_go_on_where_the_sweep_ended(cohort_path: str, tmp_path: Path) -> None:
    _, trials = made(cohort_path, tmp_path / "s", tune__trials=2)
    names = [trial.name for trial in iter(trials.next, None)]
    _, more = made(cohort_path, tmp_path / "s", tune__trials=4)
    assert [trial.name for trial in iter(more.next, None)] == [*names, "t002", "t003"]


def test_who_takes_over_has_the_donors_looks_and_its_own_steps(cohort_path: str, tmp_path: Path) -> None:
    _, trials = made(cohort_path, tmp_path / "s")
    names = [trial.name for trial in iter(trials.next, None)]
    for name, looks in ((names[0], {10: 0.5, 20: 0.6, 30: 0.7}), (names[1], {10: 0.1})):
        for step, value in looks.items():
            trials._append({"trial": name, "event": "look", "step": step, "value": value})
    trials.took_over(names[1], run="t001.s0000020", values={"method.weight_ua": 0.3}, donor=names[0], step=20)
    trials._append({"trial": names[1], "event": "look", "step": 30, "value": 0.65})
    taker = trials.by_name[names[1]]
    assert (taker.looks, taker.spent, taker.run) == ({10: 0.5, 20: 0.6, 30: 0.65}, 10 + 10, "t001.s0000020")
    _, again = made(cohort_path, tmp_path / "s")
    assert again.by_name[names[1]] == taker
    assert again.history == trials.history


def test_a_run_tells_what_a_kill_cannot_take_back(cohort_path: str, tmp_path: Path) -> None:
    """Looks up to the newest checkpoint; the last one once the model is there; a line being written is none."""
    sweep_, _ = made(cohort_path, tmp_path / "s", train__steps=4)
    run = RunDirectory(sweep_.folder("t"))
    assert looks_of(sweep_, "t") == {}
    run.checkpoints.mkdir(parents=True)
    run.metrics_file.write_text(
        "".join(json.dumps({"step": s, "val_dice": s / 10 if s % 2 == 0 else None}) + "\n" for s in (1, 2, 3, 4))
        + '{"step": 5, "val_dice": 0.'
    )
    assert looks_of(sweep_, "t") == {}
    for step, told in ((2, {2: 0.2}), (4, {2: 0.2})):
        checkpoint_dir(run.checkpoints, step).mkdir()
        assert looks_of(sweep_, "t") == told
    run.model.mkdir()
    (run.model / "model.json").write_text("{}")
    assert looks_of(sweep_, "t") == {2: 0.2, 4: 0.4}


def test_a_run_that_takes_over_goes_on_as_its_donor_did(cohort_path: str, tmp_path: Path) -> None:
    """With the donor's own values its end is the donor's, bit by bit: student, teacher, Adam's moments, metrics."""
    keys = {"train__steps": 4, "tune__looks": 4, "checkpoint__keep": 9, "tune__warmup_steps": 0}
    sweep_, _ = made(cohort_path, tmp_path / "s", **keys, references__every_steps=2)
    donor, taker = sweep_.config_of("donor", {}), sweep_.config_of("taker", {})
    train_local(donor)
    fork_run(sweep_, "donor", 2, taker)
    assert [row["step"] for row in RunDirectory(taker.run).metrics()] == [1, 2]
    assert train_local(taker).resumed_from == 2
    ends = [load_checkpoint(checkpoint_dir(RunDirectory(c.run).checkpoints, 4)) for c in (donor, taker)]
    for part in ("student", "teacher"):
        assert all((a == b).all() for a, b in zip(*(getattr(end, part).values() for end in ends), strict=True))
    losses = [[row["loss"] for row in RunDirectory(c.run).metrics()] for c in (donor, taker)]
    assert losses[0] == losses[1]


# --- what it found -------------------------------------------------------------------------------------------------


def test_importance_finds_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    line, bump, noise = rng.random((3, 40))
    kind = rng.choice(["a", "b", "c"], 40).tolist()
    objective = 3 * line - 8 * (bump - 0.5) ** 2 + np.asarray([{"a": 1.0, "b": 0.0, "c": 0.3}[k] for k in kind])
    found = {
        name: importance(name, list(values), list(objective))
        for name, values in {"line": line, "bump": bump, "kind": kind, "noise": noise}.items()
    }
    assert all(one is not None for one in found.values())
    assert [name for name, one in found.items() if one is not None and one.shown] == ["line", "bump", "kind"]
    exact = importance("x", list(range(12)), [-((x - 5) ** 2) for x in range(12)])
    assert exact is not None
    assert exact.share > 0.9  # a best value inside the range, which no correlation sees
    two = importance("b", [True, False] * 4, [1.0, 2.0] * 4)
    assert two is not None
    assert two.share == pytest.approx(1.0)
    assert importance("few", [1, 2, 3], [1.0, 2.0, 3.0]) is None
    assert importance("one", [1] * 9, list(range(9))) is None


def test_a_default_without_a_place_and_values_that_are_lists(cohort_path: str, tmp_path: Path) -> None:
    """A range over a key that is null by default, and a choice of lists: to the report, whatever searches."""
    space = space_of(
        data__spacing_mm={"choice": [[3.0, 4.0, 4.0], [4, 4, 4], [3.0, 4.0, 5.0]]},
        references__band_outside_mm={"loguniform": [2.0, 16.0], "when": {"data.spacing_mm": [3.0, 4.0, 4.0]}},
        matching__min_similarity={"uniform": [0.1, 0.9]},
    )
    keys = {"space": space, "tune__search": "optuna", "tune__trials": 14, "tune__warmup_steps": None}
    keys["references__draw"] = "surface"  # what a band is read for
    _, trials = made(cohort_path, tmp_path / "s", **keys)
    for number, trial in enumerate(iter(trials.next, None)):
        finish(trials, trial.name, {2: trial.values.get("matching.min_similarity", 0.95 + number)})
    best = trials.best()
    assert best is trials.by_name["default"]
    write_report(trials, best)
    rows = table(tmp_path / "s")
    assert (rows[0]["data.spacing_mm"], rows[0]["matching.min_similarity"]) == ("", "")
    assert {row["data.spacing_mm"] for row in rows[1:]} <= {"[3.0, 4.0, 4.0]", "[4.0, 4.0, 4.0]", "[3.0, 4.0, 5.0]"}
    assert all((row["data.spacing_mm"] == "[3.0, 4.0, 4.0]") == bool(row["references.band_outside_mm"]) for row in rows)
    _, found = found_importance(trials)
    shares = {one.key: one for one in found}
    assert shares["matching.min_similarity"].trials == 13  # numbers, the default's null left out: it explains all
    assert shares["matching.min_similarity"].share == pytest.approx(1.0, abs=0.01)
    assert shares["data.spacing_mm"].share < 1.0


def test_best_yaml_and_its_command_are_the_trial(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_, _ = made(cohort_path, tmp_path / "it's a sweep", data__labeled_ids=["a", "c"], data__spacing_mm=[3, 4, 4])
    trial = sweep_.config_of("t001", {"method.threshold": "fixed", "method.threshold_value": 0.61})
    overrides = yaml.safe_load(yaml.safe_dump(overrides_of(trial)))
    assert {"method.threshold_value", "train.init_from", "data.labeled_ids"} <= overrides.keys()
    again = train_config(cohort=cohort_path, run="r", preset=trial.preset, overrides=overrides)
    assert identity(again) == identity(trial)
    caught: list[Any] = []
    monkeypatch.setattr(Verb, "call", lambda _, composed: caught.append(composed))
    words = shlex.split(command(trial, overrides))
    assert words[:3] == ["distseg", "train", "run=..."]
    assert main(words[1:]) == 0
    assert identity(caught[0]) == identity(trial)


def test_what_a_sweep_would_leave_on_disk(cohort_path: str, tmp_path: Path) -> None:
    """By hand: n weights four-fold a checkpoint, of which two stay and one is written; two networks a model."""
    keys = {"method__name": "supervised", "space": RECIPE, "tune__warmup_steps": None, "network__base_filters": 8}
    n = 4 * sum(p.numel() for p in build_network(NetworkConfig(base_filters=8, levels=2), num_classes=2).parameters())
    plain = prepare(config(cohort_path, tmp_path / "a", **keys, tune__trials=3)).sweep
    assert run_nbytes(plain.base) == n * (4 * 3 + 2)
    assert f"about {n * 14 * (3 + 1) / 2**20:.0f} MiB ({n * 14 / 2**20:.1f} MiB a trial" in estimate(plain)[1]
    assert "0 of warm-up" in estimate(plain)[0]
    bank = {"references__patches": 4, "references__per_patch": 10, "references__every_steps": 1}
    matching = prepare(config(cohort_path, tmp_path / "b", **bank, train__select="val")).sweep
    small = 4 * sum(p.numel() for p in build_network(matching.base.network, num_classes=2).parameters())
    assert run_nbytes(matching.base) == small * (4 * 4 + 2) + 2 * (2 + 2) * 4 * 10 * 4 * 4  # four versions of 40 x 4
    assert "MiB of warm-up" in estimate(matching)[1]
    pbt = {"launcher": "ray", "tune__scheduler": "pbt", "tune__trials": 8, "train__steps": 6, "tune__looks": 3}
    population = prepare(config(cohort_path, tmp_path / "c", **pbt)).sweep
    assert "up to 4 take-overs of PBT" in estimate(population)[1]  # two of eight at the first look and the second
    assert "dry_run=true tells what a worker takes" in estimate(population)[3]


# --- what is refused, before anything runs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tune__warmup_steps": 3, "train__init_from": "/r"}, "trials cannot branch from two runs"),
        ({"tune__validation_share": 0.01, "train__validation_patches": 8}, "trials too short to look at"),
        ({"tune__search": "grid"}, "a grid needs lists"),
        ({"train__init_from": "/gone", "tune__warmup_steps": None}, "no run to branch from"),
        ({"data__labeled_scans": 60}, "more labelled scans asked for"),
        ({"launcher": "ray", "tune__scheduler": "pbt", "tune__trials": 3}, "too small a population"),
    ],
)
def test_what_cannot_run_is_said_first(cohort_path: str, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(config(cohort_path, tmp_path / "s", **more))
    assert "\n" not in str(caught.value)


RECIPE = space_of(optimizer__lr={"loguniform": [1.0e-4, 1.0e-2]})
LISTED = space_of(method__weight_nn={"choice": [0.0, 0.1]}, method__weight_en={"choice": [0.0, 0.1]})
BANK = space_of(matching__k={"uniform": [1, 8]})


@pytest.mark.parametrize(
    ("space", "more", "message"),
    [
        (RECIPE, {}, r"a shared warm-up, and the space changes.*optimizer\.lr is part of the recipe"),
        (LISTED, {"tune__search": "grid", "tune__trials": 4}, "fewer trials than the grid has points .*takes 5"),
        (BANK, {"launcher": "ray", "tune__scheduler": "pbt"}, "cannot change while a trial runs"),
        ({"parameters": {"method.weight_ua": {"uniform": [0, "1e-3"]}}}, {}, "YAML reads 1.0e-3 as one, 1e-3 as text"),
        ({"parameters": {"method.weight_ua": {"uniform": [0, 2], "choice": [1, 2]}}}, {}, "exactly one of"),
        ({"parameters": {"method.weight_ua": {"loguniform": [0, 2]}}}, {}, "a logarithm is taken"),
        ({"parameters": {"references.k": {"uniform": [1, 2.5]}}}, {}, "whole numbers"),
        ({"parameters": {"augment.flip": {"uniform": [0, 1]}}}, {}, "a range needs a number"),
        ({"parameters": {"train.steps": {"uniform": [1, 9]}}}, {}, r"not swept; use train\.steps="),
        (
            space_of(method__threshold_value={"uniform": [0, 1], "when": {"method.threshold": "fixed"}}),
            {},
            "depends on what is not chosen",
        ),
        ({}, {}, "an empty space"),
        (space_of(dry_run={"choice": [True, False]}), {}, "dry_run: not swept; use dry_run="),
        (space_of(postprocess__components={"choice": ["all", "largest"]}), {}, "not swept; .*no look at validation"),
        (
            LISTED,
            {"method__name": "supervised"},
            r"^space space: method\.weight_nn, method\.weight_en: swept, and nothing depends on it; "
            "method=supervised does not read it; take it out",
        ),
        (space_of(method__weight_sdf={"uniform": [0, 1]}), {}, "method=embedding_matching does not read it"),
        (
            space_of(method__threshold_value={"uniform": [0, 1]}),
            {},
            r"method\.threshold=fixed or quantile or per_class",
        ),
        (BANK, {"matching__kind": "prototypes"}, r"matching\.k: swept.* read with matching\.kind=index alone"),
        (space_of(references__band_inside_mm={"uniform": [1, 9]}), {}, r"read with references\.draw=surface or"),
        (
            space_of(data__pseudo_share={"uniform": [0, 1]}),
            {"tune__warmup_steps": 0},
            r"read with data\.pseudo_labels alone",
        ),
    ],
)
def test_a_space_that_cannot_be_swept_so(
    cohort_path: str, tmp_path: Path, space: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    keys = {"tune__trials": 9, **more}
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(config(cohort_path, tmp_path / "s", space=space, **keys))
    assert "\n" not in str(caught.value)


def test_a_cohort_without_validation_scans(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_checks.Cohort, "open", lambda _: SimpleNamespace(records=[]))
    with pytest.raises(ConfigError, match="no validation split, so nothing to choose by"):
        prepare(config(cohort_path, tmp_path / "s"))


def test_the_space_decides_whether_trials_share_a_warmup(cohort_path: str, tmp_path: Path) -> None:
    shared = prepare(config(cohort_path, tmp_path / "a", tune__warmup_steps=None))
    assert shared.sweep.warmup is not None
    assert (shared.sweep.warmup.train.steps, shared.sweep.warmup.method.name) == (2, "supervised")
    assert shared.sweep.base.optimizer.schedule_steps == shared.sweep.warmup.optimizer.schedule_steps == 4
    assert shared.sweep.base.train.init_from == str(tmp_path / "a" / "warmup")
    apart = prepare(config(cohort_path, tmp_path / "b", tune__warmup_steps=None, space=RECIPE))
    assert apart.sweep.warmup is None
    assert apart.sweep.base.train.init_from is None
    assert any("no shared warm-up: optimizer.lr" in note for note in apart.notes)


def test_looks_fall_on_checkpoints_and_cost_their_share(cohort_path: str, tmp_path: Path) -> None:
    keys = {"train__steps": 100, "tune__looks": 4, "tune__validation_share": 0.05, "train__validation_patches": 64}
    base = prepare(config(cohort_path, tmp_path / "s", **keys, checkpoint__every_steps=10)).sweep.base
    assert (base.train.validate_every_steps, base.checkpoint.every_steps) == (20, 10)
    passes, looks = 100 * 2 * (6 + 2), 5  # two slots of a supervised and an unlabelled pass and backward, two of M
    cost = base.train.validation_patches * looks
    assert cost / (cost + passes) <= 0.05 < (cost + looks) / (cost + looks + passes)


def test_an_objective_that_never_came_is_a_failure(cohort_path: str, tmp_path: Path) -> None:
    class Blind(Trains):
        """Leaves a model and no look."""

        def __call__(self, run: Any) -> Any:
            if Path(run.run).name == "warmup":
                return super().__call__(run)
            (Path(run.run) / "model").mkdir(parents=True)
            (Path(run.run) / "model" / "model.json").write_text("{}")
            return None

    with pytest.raises(FinishedWithFailures, match="default: never reported val_dice"):
        sweep(config(cohort_path, tmp_path / "s", space=SPACE, tune__trials=1), Blind())
    assert [row["state"] for row in table(tmp_path / "s")] == ["failed"]
