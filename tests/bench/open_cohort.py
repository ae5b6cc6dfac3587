"""How long a cohort of 100 000 scans takes to open, and a run over it to be planned: an index and four real scans.

No stub scan has a folder, so touching one would fail.

Keys, seconds of CPU:
  open_100k.cohort_s       Cohort.open
  open_100k.plan_s         make_plan after it: 4 labelled scans, 99 996 unlabelled
  open_100k.run_s          the run directory made, then read back as each rank does
  open_100k.select_s       what `label` asks of an opened cohort: the unlabelled records, and each one's Scan
  open_100k.list_s         the text of `distseg cohort`
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from distseg.config.compose import train_config
from distseg.data.cohort import Cohort, index_path
from distseg.training.plan import make_plan
from distseg.training.run import RunDirectory
from distseg.work.cohort_actions import list_cohort
from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort
from tests.bench.volumes import write_nnunet_source

SCANS, LABELLED = 100_000, 4
Value = TypeVar("Value")


def run() -> dict[str, float]:
    results: dict[str, float] = {}

    def timed(key: str, function: Callable[[], Value]) -> Value:
        begun = time.process_time()
        value = function()
        results[f"open_100k.{key}_s"] = time.process_time() - begun
        return value

    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        path = make_stub_cohort(Path(folder), SCANS)
        cohort = timed("cohort", lambda: Cohort.open(path))
        assert len(cohort.records) == SCANS
        config = train_config(cohort=str(path), run=f"{folder}/run", overrides={"train.steps": 1})
        plan = timed("plan", lambda: make_plan(config, cohort))
        assert len(plan.unlabelled) == SCANS - LABELLED

        def through_the_run() -> None:
            directory = RunDirectory(config.run)
            directory.create(config, plan)
            stored = directory.stored()
            assert stored is not None
            assert stored.plan == plan

        timed("run", through_the_run)
        timed("select", lambda: [cohort.scan(record.scan_id) for record in cohort.select(labelled=False)])
        timed("list", lambda: list_cohort(str(path)))
    Console().print({name: round(value, 2) for name, value in results.items()})
    return results


def make_stub_cohort(root: Path, scans: int) -> Path:
    """Four ingested scans, and index lines for the rest."""
    source = write_nnunet_source(root / "source", scans=LABELLED, shape=(32, 48, 48), labelled=LABELLED)
    path = root / "many.zarr"
    ingest_cohort(source=str(source), cohort=str(path), executor=LocalExecutor(1), progress=False)
    record = Cohort.open(path).records[0]
    with index_path(path).open("a") as file:
        for number in range(scans - LABELLED):
            stub = dataclasses.replace(
                record, scan_id=f"stub{number:06d}", labelled=False, label_sha256=None, voxels={}
            )
            file.write(json.dumps(stub.to_json()) + "\n")
    return path
