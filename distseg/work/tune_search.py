"""Which values the next trial takes. A search keeps nothing: random and grid know all values beforehand, from the seed
and the trial's number alone, and Optuna's model is built anew from the trials that have ended, for each it is asked
for. So a sweep that was interrupted proposes what it would have proposed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from distseg.config.spaces import Parameter, Space
from distseg.data.keys import Purpose, generator, torch_seed
from distseg.errors import ConfigError

RESAMPLED = 0.25  # share of PBT's perturbations that draw anew (Jaderberg 2017, and Ray's default)
FACTORS = (0.8, 1.2)
STARTUP = 5  # Optuna's random trials before its model speaks; its own default of 10 is most of a sweep here

Values = dict[str, Any]  # dotted key -> value, of the active parameters alone


class Ended(NamedTuple):
    """A trial that finished or was stopped. `value`: the objective of its model, None of one that was stopped."""

    values: Mapping[str, Any]
    looks: Mapping[int, float]  # step -> objective
    value: float | None


class Search(Protocol):
    def ask(self, number: int, ended: Sequence[Ended] = ()) -> Values | None:
        """The values of sampled trial `number`, from 0 (the default configuration has none); None where there is no
        further one. `ended`: what came of trials so far, the default's among them, in the order of their proposal."""


class RandomSearch:
    """Independent draws; the keys of `grid` go through all their combinations in turn."""

    def __init__(self, space: Space, *, seed: int) -> None:
        self._space, self._seed = space, seed
        listed = [p for p in space.parameters if p.kind == "grid"]
        self._grid = [dict(zip([p.key for p in listed], point, strict=True)) for point in _product(listed)]

    def ask(self, number: int, ended: Sequence[Ended] = ()) -> Values | None:
        units = generator(self._seed, Purpose.TRIAL, number).random(len(self._space.parameters))
        drawn = {p.key: p.at(float(unit)) for p, unit in zip(self._space.parameters, units, strict=True)}
        return self._space.active({**drawn, **self._grid[number % len(self._grid)]})


class GridSearch:
    """Every combination once, the last key of the space fastest."""

    def __init__(self, space: Space) -> None:
        unlisted = [parameter for parameter in space.parameters if not parameter.is_listed]
        if unlisted:
            raise ConfigError(
                "a grid needs lists",
                where=f"space {space.name}: {unlisted[0].key}",
                value=unlisted[0].kind,
                rule="tune.search=grid goes through choice and grid",
                fix="list its values, or set tune.search=random",
            )
        self.points: list[Values] = []
        for point in _product(space.parameters):
            values = space.active(dict(zip(space.keys, point, strict=True)))
            if values not in self.points:  # what is moot is no difference
                self.points.append(values)

    def ask(self, number: int, ended: Sequence[Ended] = ()) -> Values | None:
        return self.points[number] if number < len(self.points) else None


class OptunaSearch:
    """Optuna's TPE over the same parameters; a trial that was stopped counts by its looks (pruned)."""

    def __init__(self, space: Space, *, seed: int, maximise: bool) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "Optuna is not installed", where="tune.search", value="optuna", fix="pip install 'distseg[tune]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space, self._seed = optuna, space, seed
        directions = optuna.study.StudyDirection
        self._direction = directions.MAXIMIZE if maximise else directions.MINIMIZE

    def ask(self, number: int, ended: Sequence[Ended] = ()) -> Values | None:
        # Seeded by the number: a sampler with one seed a session would begin its draws again after an interruption.
        seed = torch_seed(self._seed, Purpose.TRIAL, number) % 2**32
        sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        study = self._optuna.create_study(sampler=sampler, direction=self._direction)
        for one in ended:
            self._add(study, one)
        trial = study.ask()
        chosen: Values = {}
        for parameter in self._space.parameters:
            if parameter.is_active(chosen):
                chosen[parameter.key] = self._suggest(trial, parameter)
        return chosen

    def _add(self, study: Any, ended: Ended) -> None:
        """As far as the space has its values, which a default may lack."""
        values, looks, value = ended
        parameters = [p for p in self._space.parameters if p.key in values and p.holds(values[p.key])]
        if not parameters or (value is None and not looks):
            return
        states = self._optuna.trial.TrialState
        study.add_trial(
            self._optuna.trial.create_trial(
                params={p.key: _to_optuna(p, values[p.key]) for p in parameters},
                distributions={p.key: self._distribution(p) for p in parameters},
                value=value,
                intermediate_values=dict(looks),
                state=states.PRUNED if value is None else states.COMPLETE,
            )
        )

    def _distribution(self, p: Parameter) -> Any:
        """Lists by their index, as Optuna's categories are plain values; numbers as they are."""
        kinds = self._optuna.distributions
        if p.is_listed:
            return kinds.CategoricalDistribution(tuple(range(len(p.values))))
        log, high = p.kind == "loguniform", _highest(p)
        if p.whole:
            return kinds.IntDistribution(int(p.low), int(high), log=log, step=int(p.step or 1))
        return kinds.FloatDistribution(p.low, high, log=log, step=p.step)

    def _suggest(self, trial: Any, p: Parameter) -> Any:
        if p.is_listed:
            return p.values[trial.suggest_categorical(p.key, tuple(range(len(p.values))))]
        log, high = p.kind == "loguniform", _highest(p)
        if p.whole:
            return trial.suggest_int(p.key, int(p.low), int(high), log=log, step=int(p.step or 1))
        drawn = trial.suggest_float(p.key, p.low, high, log=log, step=p.step)
        return drawn if p.step is None else p.nearest(drawn)


def _highest(p: Parameter) -> float:
    """The last step on the grid: of a bound off it Optuna warns."""
    return p.high if p.step is None else p.nearest(p.high)


def _to_optuna(p: Parameter, value: Any) -> Any:
    if p.is_listed:
        return p.values.index(value)
    return value if p.step is None else p.nearest(value)


def make_search(kind: str, space: Space, *, seed: int, maximise: bool = True) -> Search:
    """Raises ConfigError where the space or this installation does not allow it."""
    if kind == "grid":
        return GridSearch(space)
    return RandomSearch(space, seed=seed) if kind == "random" else OptunaSearch(space, seed=seed, maximise=maximise)


def perturbed(space: Space, values: Mapping[str, Any], *, seed: int, name: str, step: int) -> Values:
    """PBT's exploration of a trial that takes over another's state at `step`: each value drawn anew, or a neighbour.

    A key that becomes active is drawn; `name` is the trial's that takes over.
    """
    rng = generator(seed, Purpose.PERTURB, step, *name.encode())
    chosen: Values = {}
    for parameter in space.parameters:
        fresh, drawn, direction = rng.random() < RESAMPLED, float(rng.random()), int(rng.integers(2))
        if not parameter.is_active(chosen):
            continue
        before = values.get(parameter.key)
        if fresh or before is None or not parameter.holds(before):
            chosen[parameter.key] = parameter.at(drawn)
        else:
            chosen[parameter.key] = _neighbour(parameter, before, direction)
    return chosen


def _neighbour(parameter: Parameter, value: Any, direction: int) -> Any:
    if parameter.is_listed:
        place = parameter.values.index(value) + (1 if direction else -1)
        return parameter.values[min(max(place, 0), len(parameter.values) - 1)]
    moved = value * FACTORS[direction]
    if parameter.whole:
        moved = math.ceil(moved) if direction else math.floor(moved)
    return parameter.nearest(moved)


def _product(parameters: Sequence[Parameter]) -> list[tuple[Any, ...]]:
    """All combinations; one empty one of no parameters."""
    return list(itertools.product(*(parameter.values for parameter in parameters)))
