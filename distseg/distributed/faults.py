"""What went wrong with Ray Train's workers: written down where it is noticed, told by the driver.

Ray starts a group anew without a word to the driver, so the controller leaves a line for each worker that failed in
RUN/ray/LAUNCH.faults.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import ray
import ray.train

from distseg.errors import DistsegError, InputError

_SHOWN = 300  # characters of a message


class FaultLog(ray.train.UserCallback):
    """Runs in Ray Train's controller."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        with contextlib.suppress(OSError), self._file.open("a") as lines:  # a full disk is no fault of the controller
            for rank, error in sorted(worker_exceptions.items()):
                lines.write(f"worker {rank}: {in_words(error)}\n")


def in_words(error: BaseException) -> str:
    """One line: ours as it is; that it does not answer, or lacked memory; else the name and first line."""
    ours = own_error(error)
    if ours is not None:
        return str(ours)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "killed by Ray, for its node ran out of memory"
    if type(error).__name__.startswith("WorkerHealthCheck"):  # of a module of Ray's that is not public
        return "does not answer Ray: it hangs or has died"
    text = " ".join(str(error).split())[:_SHOWN]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def own_error(error: BaseException | None) -> DistsegError | None:
    """The DistsegError among an error's causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, DistsegError):
            return error
        seen.add(id(error))
        error = error.__cause__ or getattr(error, "cause", None)
    return None


def why_training_failed(error: ray.train.TrainingFailedError, max_failures: int) -> Exception:
    """In place of Ray's wrapping: a worker's own DistsegError, or which workers failed once too often, and why."""
    failures = dict(getattr(error, "worker_failures", {}))
    for failure in failures.values():
        ours = own_error(failure)
        if ours is not None:
            return ours
    if not failures:  # Ray's controller: no resources for the workers, a node that is to go
        behind = getattr(error, "controller_failure", None) or error
        ours = own_error(behind)
        if ours is not None:
            return ours
        return DistsegError(f"Ray could not run the workers: {in_words(behind)}; the same command resumes")
    told = "; ".join(f"worker {rank}: {in_words(failure)}" for rank, failure in sorted(failures.items()))
    if any(isinstance(failure, ray.exceptions.OutOfMemoryError) for failure in failures.values()):
        fix = "lower train.slots_per_pass, data.memory_gib or resources.workers, or take nodes with more memory"
        return InputError(f"workers ran out of memory {max_failures + 1} times: {told}", where="train", fix=fix)
    return DistsegError(f"workers failed {max_failures + 1} times, so the run stops; {told}; the same command resumes")


def controller_lost(error: ray.exceptions.RayActorError) -> DistsegError:
    """Ray Train's controller went with its node, or was killed: nobody is left to start the workers again."""
    return DistsegError(
        f"Ray lost the run's controller: {in_words(error)}; its node has died or had no time to answer Ray; "
        "the same command resumes"
    )
