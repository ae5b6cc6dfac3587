"""The ledger at scale, by a labeller that does nothing but leave two empty files.

Keys (a cohort of 100 000 stubs; a ledger of ten times as many lines; one process each, so that memory is its own; with
--scans another number of stubs, to see that it works):
  label_ledger.start_s           from the call to the first scan, 100 000 to do
  label_ledger.scans_per_s       committed
  label_ledger.resume_s          from the call to the first scan, half of them done
  label_ledger.review_s          scans.csv, next_to_label.csv and review.html of 100 000, no pictures
  label_ledger.peak_mib          of that process, above what it holds after its imports
  label_ledger.million.open_s    opening a ledger of a million lines, and knowing what is done
  label_ledger.million.peak_mib  above what was there before
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

SCANS, LINES_A_SCAN = 100_000, 10
_FACTS = {
    "voxels": 1, "windows": 1, "windows_embedded": 0, "threshold_nats": 0.5, "doubtful": 3, "matched": 2,
    "disagreeing": 1, "surface_voxels": 5, "surface_entropy": 0.25, "class_voxels": [9], "expected_dice": [0.75],
    "components": [1], "largest_share": [1.0], "descriptor": [0.25] * 16, "native_voxels": 1, "native_voxel_ml": 0.05,
    "mask_voxels": [9], "removed_voxels": 0, "network_s": 0.0, "seconds": 0.0,
}  # fmt: skip


def run(scans: int | None = None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as scratch:
        keys = {}
        for work in (_stubs, _million):
            receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(target=work, args=(scratch, sender, scans or SCANS))
            process.start()
            keys |= receiver.recv()
            process.join()
    Console().print({key: round(value, 2) for key, value in keys.items()})
    return keys


def _stubs(scratch: str, sender: Any, scans: int) -> None:
    import torch

    from distseg.config.verbs import LabelSectionConfig
    from distseg.work import label_cohort as driver
    from distseg.work.executor import LocalExecutor
    from tests.bench.memory import peak_mib
    from tests.unit.tiny_run import make_run

    folder = Path(scratch)
    made_run = make_run(folder, class_names=("background", "bone"))
    cohort = _stub_cohort(folder, scans)
    keys: dict[str, float] = {}
    settings = LabelSectionConfig(review_scans=0)
    write_review = driver.write_review

    def timed_review(*args: Any, **keywords: Any) -> None:
        begun = time.perf_counter()
        write_review(*args, **keywords)
        keys["label_ledger.review_s"] = time.perf_counter() - begun

    driver.write_review = timed_review

    def label(stop_at: int) -> tuple[float, float]:
        """Seconds to the first scan, and from it to the end or to `stop_at`."""
        labeller, begun = _Nothing(stop_at), time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            driver.label_cohort(
                run=made_run, cohort=cohort, output=str(folder / "out"), settings=settings,
                executor=LocalExecutor(1), progress=False, labeller=labeller,
            )  # fmt: skip
        return labeller.first - begun, time.perf_counter() - labeller.first

    def work() -> None:
        keys["label_ledger.start_s"], seconds = label(scans // 2)
        keys["label_ledger.scans_per_s"] = scans // 2 / seconds
        keys["label_ledger.resume_s"], _ = label(scans)

    peak = peak_mib(work, torch.device("cpu"))
    sender.send({**keys, "label_ledger.peak_mib": peak or 0.0})


class _Nothing:
    def __init__(self, stop_at: int) -> None:
        self.left, self.first = stop_at, 0.0

    def __call__(self, task: Any) -> Any:
        from distseg.data.label_output import KINDS
        from distseg.work.label_task import Labelled
        from distseg.work.ledger import staged_path

        self.first = self.first or time.perf_counter()
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        for kind in KINDS:
            file = staged_path(Path(task.staging), kind, task.scan_id)
            file.parent.mkdir(exist_ok=True)
            file.touch()
        return Labelled(task.scan_id, task.source.version, _FACTS)


def _stub_cohort(folder: Path, scans: int) -> str:
    import zarr

    cohort = folder / "stubs.zarr"
    attributes = {"format_version": 1, "classes": {"background": 0, "bone": 1}, "channel_names": {"0": "CT"}}
    zarr.create_group(cohort, zarr_format=3, attributes={**attributes, "spacing_mm": None})
    record = {
        "shape": [100, 200, 200], "spacing_mm": [3.0, 1.0, 1.0], "labelled": False, "split": None,
        "label_sha256": None, "modality": "CT", "voxels": {},
    }  # fmt: skip
    with open(folder / "stubs.index.jsonl", "w") as file:
        for number in range(scans):
            file.write(json.dumps({"id": f"scan_{number:06d}", "sha256": f"{number:064x}", **record}) + "\n")
    return str(cohort)


def _million(scratch: str, sender: Any, scans: int) -> None:
    import torch

    from distseg.work.ledger import Ledger
    from tests.bench.memory import peak_mib

    output = Path(scratch) / "million"
    output.mkdir()
    identity = {"model": "m"}
    with open(output / "ledger.jsonl", "w") as file:
        file.write(json.dumps({"format": 1, "identity": identity}) + "\n")
        for number in range(LINES_A_SCAN * scans):
            line = {"done": f"scan_{number:07d}", "version": f"{number:016x}", "staged": "0" * 12, **_FACTS}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
    seconds = []

    def work() -> None:
        begun = time.perf_counter()
        ledger = Ledger(output, identity, "stubs")
        seconds.append(time.perf_counter() - begun)
        ledger.close()

    peak = peak_mib(work, torch.device("cpu"))
    sender.send({"label_ledger.million.open_s": seconds[0], "label_ledger.million.peak_mib": peak or 0.0})
