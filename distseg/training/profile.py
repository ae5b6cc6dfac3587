"""`train.profile=true`: a few steps of rank 0 under torch's profiler.

RUN/profile/trace.json   for chrome://tracing or Perfetto
RUN/profile/table.txt    operators by their own time
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARMING, RECORDED = 2, 1, 3  # steps


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
        (self._folder / "table.txt").write_text(f"{RECORDED} steps\n{table}\n")
