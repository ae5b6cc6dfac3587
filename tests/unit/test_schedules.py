"""Eq 1's ramp, the reliability threshold, the teacher's decay and the learning rate, as functions of the step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distseg.config.compose import train_config
from distseg.losses.schedules import ramp_up, threshold_nats
from distseg.methods import make_method
from distseg.methods.base import At
from distseg.networks.ema import ema_decay
from distseg.training.loop import _set_lr


def test_eq_1_by_hand() -> None:
    # T = 50 of 100, s = 0.25: 0.25 exp(-5 x 0.5^2) = 0.25 exp(-1.25) = 0.25 x 0.286505 = 0.071626.
    assert ramp_up(50, 100, 0.25) == pytest.approx(0.071626, abs=5e-7)
    # T = 1 of 20, s = 1: exp(-5 x 0.95^2) = exp(-4.5125) = 0.010971: T counts from 1, so the first step is not e^-5.
    assert ramp_up(1, 20, 1.0) == pytest.approx(0.010971, abs=5e-7)
    assert ramp_up(100, 100, 0.25) == 0.25


def test_threshold_by_hand() -> None:
    # T = 50 of 100: 0.75 + 0.071626 = 0.821626; times ln 2 = 0.693147: 0.569508; times ln 3 = 1.098612: 0.902649.
    assert threshold_nats(50, 100, 2) == pytest.approx(0.569508, abs=5e-7)
    assert threshold_nats(50, 100, 3) == pytest.approx(0.902649, abs=5e-7)
    # It rises to the largest entropy there is (METHOD trap 2): 0.75 + 0.25 exp(-5 (0.2)^2) = 0.9547 at 80 %.
    assert threshold_nats(100, 100, 2) == math.log(2)
    course = [threshold_nats(t, 100, 2) / math.log(2) for t in (0, 50, 80, 100)]
    assert course == pytest.approx([0.7517, 0.8216, 0.9547, 1.0], abs=5e-5)


@given(total=st.integers(1, 5000), data=st.data())
def test_the_ramp_rises_to_its_scale(total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, total))
    values = [ramp_up(s, total, 0.25) for s in (step, min(step + 1, total), total)]
    assert values == sorted(values)
    assert values[-1] == 0.25
    assert values[0] == pytest.approx(0.25 / math.exp(5 * (1 - step / total) ** 2))


def test_weights_of_eq_5() -> None:
    """w_UA = ramp_up(T, 0.25), w_PS = ramp_up(T, 0.125) for both L_NN and L_EN; MT and UA-MT: ramp_up(T, 0.1)."""
    at = At(50, 100)
    matching = make_method(train_config(cohort="c", run="r", preset="xie2024"), num_classes=2)
    assert matching.weights(at) == pytest.approx({"ua": 0.0716262, "nn": 0.0358131, "en": 0.0358131}, abs=5e-8)
    for name in ("mean_teacher", "uamt"):
        method = make_method(train_config(cohort="c", run="r", method=name), num_classes=2)
        assert method.weights(at) == pytest.approx({"consistency": 0.0286505}, abs=5e-8)
    assert make_method(train_config(cohort="c", run="r", method="supervised"), num_classes=2).weights(at) == {}


def test_ema_decay_by_hand() -> None:
    # min(1 - 1/(T + 1), 0.99): 1/2, 2/3, 3/4, ..., 98/99 = 0.989899 at T = 98, 0.99 from T = 99 on.
    assert [ema_decay(t, 0.99) for t in (1, 2, 3)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert ema_decay(98, 0.99) == pytest.approx(0.989899, abs=5e-7)
    assert [ema_decay(t, 0.99) for t in (99, 100, 10_000)] == pytest.approx([0.99, 0.99, 0.99])


def lr_at(step: int, *, offset: int = 0, **optimizer: object) -> float:
    overrides = {"train.steps": 100, **{f"optimizer.{k}": v for k, v in optimizer.items()}}
    parameter = torch.nn.Parameter(torch.zeros(1))
    session = SimpleNamespace(
        config=train_config(cohort="c", run="r", overrides=overrides),
        schedule_offset=offset,
        learner=SimpleNamespace(optimizer=torch.optim.Adam([parameter], lr=9.0)),
    )
    _set_lr(session, step)
    return session.learner.optimizer.param_groups[0]["lr"]


def test_learning_rate() -> None:
    assert [lr_at(t, lr=0.1, schedule="constant") for t in (1, 50, 100)] == [0.1, 0.1, 0.1]
    # poly: lr (1 - s/S)^0.9 with s steps done before. Step 1: 0.1; step 51 of 100: 0.1 x 0.5^0.9 = 0.1 x 0.535887.
    assert lr_at(1, lr=0.1, schedule="poly") == 0.1
    assert lr_at(51, lr=0.1, schedule="poly") == pytest.approx(0.0535887, abs=5e-8)
    # A branch goes on where its parent stopped: 100 steps of 200 done, its own step 1 is the schedule's half.
    assert lr_at(1, offset=100, lr=0.1, schedule="poly", schedule_steps=200) == pytest.approx(0.0535887, abs=5e-8)
    assert lr_at(1, offset=100, lr=0.1, schedule="poly") == pytest.approx(0.0535887, abs=5e-8)
    # Past its end a schedule stays at zero: never a complex or negative rate.
    assert lr_at(100, offset=200, lr=0.1, schedule="poly", schedule_steps=200) == 0.0
