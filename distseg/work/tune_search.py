"""Which values the next trial takes. Random and grid know them all beforehand, from the seed and the trial's number
alone, so nothing is kept of them; Optuna's model is built anew from the trials that have ended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from distseg.config.spaces import Parameter, Space
from distseg.data.keys import Purpose, generator
from distseg.errors import ConfigError

RESAMPLED = 0.25  # share of PBT's perturbations that draw anew (Jaderberg 2017, and Ray's default)
FACTORS = (0.8, 1.2)
STARTUP = 5  # Optuna's random trials before its model speaks; its own default of 10 is most of a sweep here

Values = dict[str, Any]  # dotted key -> value, of the active parameters alone


class Search(Protocol):
    """`number` counts sampled trials from 0; the default configuration has none."""

    def ask(self, number: int) -> Values | None:
        """The values of trial `number`; None where there is no further one."""

    def tell(self, values: Mapping[str, Any], looks: Mapping[int, float], state: str) -> None:
        """A trial has ended: finished, stopped or failed."""


class RandomSearch:
    """Independent draws; the keys of `grid` go through all their combinations in turn."""

    def __init__(self, space: Space, *, seed: int) -> None:
        self._space, self._seed = space, seed
        listed = [p for p in space.parameters if p.kind == "grid"]
        self._grid = [dict(zip([p.key for p in listed], point, strict=True)) for point in _product(listed)]

    def ask(self, number: int) -> Values | None:
        units = generator(self._seed, Purpose.TRIAL, number).random(len(self._space.parameters))
        drawn = {p.key: p.at(float(unit)) for p, unit in zip(self._space.parameters, units, strict=True)}
        return self._space.active({**drawn, **self._grid[number % len(self._grid)]})

    def tell(self, values: Mapping[str, Any], looks: Mapping[int, float], state: str) -> None:
        pass


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

    def ask(self, number: int) -> Values | None:
        return self.points[number] if number < len(self.points) else None

    def tell(self, values: Mapping[str, Any], looks: Mapping[int, float], state: str) -> None:
        pass


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
        self._optuna, self._space = optuna, space
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        self._study = optuna.create_study(sampler=sampler, direction="maximize" if maximise else "minimize")
        self._asked: list[tuple[Values, Any]] = []

    def ask(self, number: int) -> Values | None:
        trial = self._study.ask()
        chosen: Values = {}
        for parameter in self._space.parameters:
            if parameter.is_active(chosen):
                chosen[parameter.key] = self._suggest(trial, parameter)
        self._asked.append((chosen, trial))
        return chosen

    def tell(self, values: Mapping[str, Any], looks: Mapping[int, float], state: str) -> None:
        ours = next((pair for pair in self._asked if pair[0] == values), None)
        if ours is None:
            self._add(values, looks, state)
            return
        self._asked.remove(ours)
        for step, value in looks.items():
            ours[1].report(value, step)
        final = list(looks.values())[-1] if state == "finished" else None
        self._study.tell(ours[1], final, state=self._states()[state])

    def _add(self, values: Mapping[str, Any], looks: Mapping[int, float], state: str) -> None:
        """A trial from an earlier session, or the default one, as far as the space has its values."""
        parameters = [p for p in self._space.parameters if p.key in values and p.holds(values[p.key])]
        if not parameters or (state == "stopped" and not looks):
            return
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params={p.key: p.values.index(values[p.key]) if p.is_listed else values[p.key] for p in parameters},
                distributions={p.key: self._distribution(p) for p in parameters},
                value=list(looks.values())[-1] if state == "finished" else None,
                intermediate_values=dict(looks),
                state=self._states()[state],
            )
        )

    def _states(self) -> Mapping[str, Any]:
        states = self._optuna.trial.TrialState
        return {"finished": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}

    def _distribution(self, p: Parameter) -> Any:
        """Lists by their index, as Optuna's categories are plain values; numbers as they are."""
        kinds = self._optuna.distributions
        if p.is_listed:
            return kinds.CategoricalDistribution(tuple(range(len(p.values))))
        log = p.kind == "loguniform"
        if p.whole:
            return kinds.IntDistribution(int(p.low), int(p.high), log=log, step=int(p.step or 1))
        return kinds.FloatDistribution(p.low, p.high, log=log, step=p.step)

    def _suggest(self, trial: Any, p: Parameter) -> Any:
        if p.is_listed:
            return p.values[trial.suggest_categorical(p.key, tuple(range(len(p.values))))]
        log = p.kind == "loguniform"
        if p.whole:
            return trial.suggest_int(p.key, int(p.low), int(p.high), log=log, step=int(p.step or 1))
        return trial.suggest_float(p.key, p.low, p.high, log=log, step=p.step)


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
