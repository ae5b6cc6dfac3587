"""`train.profile=true`: a few steps of rank 0 under torch's profiler.

RUN/profile/trace.json   for chrome://tracing or Perfetto
RUN/profile/table.txt    the parts of a step, then operators by their own time
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARMING, RECORDED = 2, 1, 3  # steps
# What training/step.py names to the profiler (`record_function`), and the names that torch gives.
PARTS = {
    "teacher": "teacher",
    "student, forward": "student, forward",
    "matching and its losses": "matching and its losses",
    "backward": "backward",
    "sum over ranks": "sum over ranks",
    "Optimizer.step#Adam.step": "optimizer",
    "moving average": "moving average",
}
_WHOLE = "ProfilerStep*"


class StepProfiler:
    """Call `step` after each training step; files appear once `RECORDED` steps are in. A context manager."""

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._folder = folder
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = (
            profile(
                activities=activities,
                schedule=schedule(wait=SKIPPED, warmup=WARMING, active=RECORDED, repeat=1),
                on_trace_ready=self._write,
            )
            if enabled
            else None
        )

    def __enter__(self) -> StepProfiler:
        if self._profile:
            self._profile.start()
        return self

    def step(self) -> None:
        if self._profile:
            self._profile.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile:
            self._profile.stop()

    def _write(self, recorded: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60)
        (self._folder / "table.txt").write_text(f"{_parts(recorded)}\n{table}\n")


def _parts(recorded: profile) -> str:
    """A line a part: milliseconds a step and its share; the rest is losses, data, looks and the log.

    On a GPU, of its kernels; a CPU that only launches them is not waited for.
    """
    on_gpu = torch.cuda.is_available()
    by_name = {e.key: (e.device_time_total if on_gpu else e.cpu_time_total) / 1e3 for e in recorded.key_averages()}
    found = {label: by_name[name] / RECORDED for name, label in PARTS.items() if name in by_name}
    whole = by_name.get(_WHOLE, 0.0) / RECORDED
    found |= {"the rest": whole - sum(found.values()), "whole": whole}
    head = f"{RECORDED} steps{', kernels' if on_gpu else ''}"
    lines = [f"{head:<26}{'ms a step':>10}{'share':>8}"]
    lines += [f"{label:<26}{ms:>10.2f}{ms / whole if whole else 0.0:>8.1%}" for label, ms in found.items()]
    return "\n".join(lines) + "\n"
