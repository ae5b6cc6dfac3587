"""Every error a user can meet derives from `DistsegError`; each also inherits the builtin a caller would catch.

A message is one line: what went wrong, where, the value got, the rule it breaks, the fix. All of them survive
pickling, because they cross Ray's process borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHOWN = 600  # characters of each part of a message


class DistsegError(Exception):
    """Base of all distseg errors. `exit_code` is what the command line returns (DESIGN section 2)."""

    exit_code = 1


class InputError(DistsegError, ValueError):
    """Bad input or configuration: the user can mend it. Exit code 2."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        value: object | None = None,
        rule: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.value, self.rule, self.fix = what, where, value, rule, fix
        head = f"{where}: {what}" if where is not None else what
        if value is not None:
            head += f" (got {value})"
        parts = [head] + [part for part in (rule, fix) if part]
        super().__init__("; ".join(_shown(part) for part in parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), (self.what,), self._keywords())

    def _keywords(self) -> dict[str, Any]:
        # `where` and `value` may be arbitrary objects; their text is all the message needs elsewhere.
        text = {"where": self.where, "value": self.value}
        return {
            **{k: None if v is None else str(v) for k, v in text.items()},
            "rule": self.rule,
            "fix": self.fix,
        }


class ConfigError(InputError):
    """A key, value or combination of values that the configuration does not allow."""


class DataError(InputError):
    """A file or store that cannot be used as it is."""


class RunMismatchError(InputError):
    """A run directory that holds something other than what was asked for."""


class FinishedWithFailures(DistsegError, RuntimeError):
    """The work is done but for the listed items. Exit code 3."""

    exit_code = 3

    def __init__(self, done: str, failures: Sequence[tuple[str, str]]) -> None:
        self.done, self.failures = done, tuple((str(item), str(why)) for item, why in failures)
        lines = "".join(f"\n  {item}: {why}" for item, why in self.failures)
        super().__init__(f"{done}; {len(self.failures)} failed:{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), (self.done, self.failures), {})


class NonFiniteLossError(DistsegError, ArithmeticError):
    """Losses or gradients were NaN or infinite, step after step; none of those steps changed the student."""

    def __init__(self, step: int, skipped: int, trouble: str) -> None:
        self.step, self.skipped, self.trouble = step, skipped, trouble
        super().__init__(
            f"step {step}: {trouble}; {skipped} steps in a row were skipped, the checkpoints hold what was before; "
            "look at those scans, or start again with a lower optimizer.lr"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), (self.step, self.skipped, self.trouble), {})


class WorkersLostError(DistsegError, RuntimeError):
    """Workers of a group that the others wait for in vain: they hang, or have died."""

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        self.ranks, self.why = tuple(ranks), why
        named = f"rank {ranks[0]} does" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} do"
        super().__init__(f"{named} not answer: {why}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), (self.ranks, self.why), {})


def _shown(part: object) -> str:
    """On one line, and not all of what a stranger's file may hold."""
    text = " ".join(str(part).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _rebuild(kind: type[DistsegError], args: tuple[Any, ...], keywords: dict[str, Any]) -> DistsegError:
    return kind(*args, **keywords)


# In a RuntimeError: torch's allocator on a CPU; oneDNN, which has no word of its own for it.
_TORCH_SAYS = ("can't allocate memory", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's or Ray's error where there is no memory left. torch is not imported for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _TORCH_SAYS)
