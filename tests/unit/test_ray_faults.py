"""What Ray says of workers that failed, in our words; no Ray runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray
import ray.train

from distseg.distributed.faults import FaultLog, controller_lost, in_words, own_error, why_training_failed
from distseg.errors import DistsegError, InputError, NonFiniteLossError, WorkersLostError

NO_MEMORY = ray.exceptions.OutOfMemoryError("Memory on the node was 31 GiB / 32 GiB")


class WorkerHealthCheckFailedError(Exception):
    """Named as Ray's."""


def caused(cause: Exception) -> Exception:
    error = RuntimeError("Ray's wrapping")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (caused(WorkersLostError([1], "it may hang")), "rank 1 does not answer: it may hang"),
        (NO_MEMORY, "killed by Ray, for its node ran out of memory"),
        (WorkerHealthCheckFailedError("long"), "does not answer Ray: it hangs or has died"),
        (ValueError("one\n  two"), "ValueError: one two"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_failure_in_words(error: Exception, told: str, tmp_path: Path) -> None:
    assert in_words(error) == told
    log = FaultLog(tmp_path / "faults")
    log.after_exception(None, {1: error, 0: error})
    assert (tmp_path / "faults").read_text() == f"worker 0: {told}\nworker 1: {told}\n"


def failed(**workers: Exception) -> ray.train.TrainingFailedError:
    failures = {int(name.removeprefix("w")): error for name, error in workers.items()}
    return ray.train.WorkerGroupError("text", failures)


def test_why_a_training_failed() -> None:
    own = NonFiniteLossError(7, 5, "loss not finite on a")
    assert why_training_failed(failed(w0=ValueError("x"), w1=caused(own)), 3) is own
    memory = why_training_failed(failed(w1=NO_MEMORY), 3)
    assert isinstance(memory, InputError)
    assert str(memory).startswith("train: workers ran out of memory 4 times: worker 1: killed by Ray")
    other = why_training_failed(failed(w1=ValueError("x")), 3)
    assert isinstance(other, DistsegError)
    assert str(other) == ("workers failed 4 times, so the run stops; worker 1: ValueError: x; the same command resumes")
    assert why_training_failed(ray.train.ControllerError(caused(own)), 3) is own
    for error in (ray.train.ControllerError(ValueError("no node")), ray.train.TrainingFailedError("no node")):
        unserved = why_training_failed(error, 3)
        assert isinstance(unserved, DistsegError)
        assert re.fullmatch(
            r"Ray could not run the workers: \w+Error: no node; the same command resumes", str(unserved)
        )
        unserved.__cause__ = unserved  # as `raise ... from` could
        assert own_error(unserved) is unserved


def test_a_cycle_of_causes_ends() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert own_error(one) is None


def test_a_full_disk_is_no_fault_of_the_controller(tmp_path: Path) -> None:
    FaultLog(tmp_path / "gone" / "faults").after_exception(None, {0: ValueError("x")})
    assert list(tmp_path.iterdir()) == []


def test_a_controller_that_went_with_its_node_is_no_fault_of_ours() -> None:
    told = str(controller_lost(ray.exceptions.ActorDiedError()))
    assert told.startswith("Ray lost the run's controller: ActorDiedError: The actor died unexpectedly")
    assert told.endswith("its node has died or had no time to answer Ray; the same command resumes")
