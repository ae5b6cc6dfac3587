"""Every error crosses process borders whole, and is one line that says where, what, which rule and which fix."""

from __future__ import annotations

import pickle

import pytest

import distseg.config.checks
import distseg.errors
from distseg.errors import (
    ConfigError,
    DistsegError,
    FinishedWithFailures,
    InputError,
    NonFiniteLossError,
    WorkersLostError,
)


def _all_kinds(kind: type[DistsegError] = DistsegError) -> list[type[DistsegError]]:
    return [kind, *(below for child in kind.__subclasses__() if child.__module__ == "distseg.errors"
                    for below in _all_kinds(child))]  # fmt: skip


# Arguments for the kinds whose constructor differs from InputError's and the base's.
SPECIAL = {
    FinishedWithFailures: (("two done", [("a", "bad"), ("b", "worse")]),),
    NonFiniteLossError: ((7, 5, "loss_nn not finite on scan_1, scan_2"),),
    WorkersLostError: (([1], "it hangs"), ([0, 3], "they hang")),
}


def _examples() -> list[DistsegError]:
    examples: list[DistsegError] = []
    for kind in _all_kinds():
        examples += [kind(*arguments) for arguments in SPECIAL.get(kind, (("what",),))]
        if issubclass(kind, InputError):
            examples.append(kind("what", where=("a", 1), value=[1, 2], rule="rule", fix="fix"))
    return examples


@pytest.mark.parametrize("error", _examples(), ids=lambda error: type(error).__name__)
def test_pickle_round_trip(error: DistsegError) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.exit_code == error.exit_code
        assert {key: str(value) for key, value in vars(again).items()} == {
            key: str(value) for key, value in vars(error).items()
        }


def test_every_kind_is_covered_and_has_a_documented_exit_code() -> None:
    codes = {kind.__name__: kind.exit_code for kind in _all_kinds()}
    assert codes.pop("DistsegError") == codes.pop("NonFiniteLossError") == codes.pop("WorkersLostError") == 1
    assert codes.pop("FinishedWithFailures") == 3
    assert codes
    assert set(codes.values()) == {2}
    assert all(kind.__doc__ for kind in _all_kinds())


def test_kinds_are_the_builtins_a_caller_would_catch() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(FinishedWithFailures, RuntimeError)


def test_message_has_where_what_value_rule_and_fix_in_one_line() -> None:
    error = InputError("too small", where="train.steps", value=0, rule="at\nleast 1", fix="set  train.steps=1")
    assert str(error) == "train.steps: too small (got 0); at least 1; set train.steps=1"


def test_failures_are_listed_a_line_each() -> None:
    assert str(FinishedWithFailures("1 done", [("a", "bad")])) == "1 done; 1 failed:\n  a: bad"


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: distseg.config.checks.one_of("method", "uatm", ("uamt", "supervised")),
            "method: unknown value (got uatm); one of uamt, supervised; did you mean method=uamt?",
        ),
        (
            lambda: distseg.config.checks.one_of("method", "zzz", ("uamt", "supervised")),
            "method: unknown value (got zzz); one of uamt, supervised; set method=uamt",
        ),
        (
            lambda: distseg.config.checks.at_least("train.steps", 0, 1),
            "train.steps: value not allowed (got 0); must be at least 1; set train.steps=1",
        ),
        (
            lambda: distseg.config.checks.between("overlap", 2, 0, 0.9),
            "overlap: value not allowed (got 2); must be from 0 to 0.9; set overlap within the range",
        ),
        (
            lambda: distseg.config.checks.at_least_one_of("labelled", 5, 4),
            "labelled: value not allowed (got 5); must be from 1 to 4; set labelled within the range",
        ),
    ],
)
def test_rules_of_the_schema_speak_in_full(call, line) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == line
