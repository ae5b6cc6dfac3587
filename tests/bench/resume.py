"""What not losing anything costs: a checkpoint beside the steps between two, and a start after a kill. Keys:

checkpoint.share             wall time of a checkpoint / CPU time of checkpoint.every_steps steps of embedding_matching,
                             preset `small`: at most the share of a run on an idle core
checkpoint_ms, step_ms       medians of both
skip.share                   CPU time of looking whether a step is finite / of the step
again_s                      from Enter to the first new line of metrics.jsonl after a kill, median of three: the
                             command line with launcher=local on a tiny cohort
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distseg.config.schema import CheckpointConfig
from distseg.training.checkpoint import Checkpoint, save_checkpoint
from tests.bench.step import bench_device
from tests.bench.step_parts import StepBench
from tests.bench.timing import interleaved
from tests.faults.killing import TINY, checkpoint_step, command, started, steps_done, until
from tests.unit.tiny_cohort import make_cohort

RESTARTS = 3


def run(rounds: int = 5) -> dict[str, float]:
    device = bench_device()
    bench = StepBench("small", device)
    learner = bench.learner
    bench.step("embedding_matching")()  # so that Adam has moments
    with tempfile.TemporaryDirectory(dir=".") as folder:

        def save() -> None:
            student, teacher = learner.student.state_dict(), learner.teacher.state_dict()
            save_checkpoint(Path(folder), Checkpoint(1, 1, student, teacher, learner.optimizer.state_dict()))

        saved = interleaved({"save": save}, rounds=rounds, device=device, now=time.perf_counter)["save"].median
    functions = {"look": learner.gradients.finite, "step": bench.step("embedding_matching")}
    timings = interleaved(functions, rounds=rounds, device=device)
    step = timings["step"].median
    keys = {
        "checkpoint.share": saved / (CheckpointConfig().every_steps * step),
        "checkpoint_ms": 1e3 * saved,
        "step_ms": 1e3 * step,
        "skip.share": timings["look"].median / step,
        "again_s": again_s(),
    }
    for name, value in keys.items():
        print(f"{name:20} {value:.4g}")
    return keys


def again_s() -> float:
    seconds = []
    with _cohort() as root:
        words = command("train", cohort=root / "tiny.zarr", run=root / "run", more=TINY, train__steps=500)
        for number in range(RESTARTS + 1):
            before, kept, begun = steps_done(root / "run"), checkpoint_step(root / "run"), time.monotonic()
            with started(words, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1")) as process:
                if number:
                    # The file is cut back to the checkpoint, then grows: a kill fell between two checkpoints.
                    assert until(lambda kept=kept: steps_done(root / "run") == kept, process)
                    assert until(lambda kept=kept: steps_done(root / "run") > kept, process)
                    seconds.append(time.monotonic() - begun)
                assert until(lambda due=before + 22: steps_done(root / "run") >= due, process)
                until(lambda: steps_done(root / "run") % 5 in (2, 3), process)
                process.send_signal(signal.SIGKILL)
    return statistics.median(seconds)


@contextmanager
def _cohort() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        make_cohort(Path(folder))
        yield Path(folder)
