"""Ingest of synthetic CT: memory of one large scan, speed with one and two workers, bytes on disk.

Keys:
  ingest.peak_over_raw_int16    peak resident memory of a fresh process that converts one labelled .nii.gz of
                                512 x 512 x 1200 int16, Python and libraries included / the image's raw int16 bytes
  ingest.scan_s_512x512x1200    seconds of that conversion
  ingest.scans_per_s.workers_N  scans of 256 x 256 x 160, images and labels, LocalExecutor, N = 1 and 2; the second is
                                of no worth on cores that others use
  ingest.store_over_nii_gz, ingest.store_over_raw    bytes on disk of those scans' images
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from distseg.work.executor import LocalExecutor
from distseg.work.ingest import ingest_cohort
from tests.bench.volumes import write_nnunet_source

BIG, SMALL, SMALL_SCANS = (1200, 512, 512), (160, 256, 256), 48  # Z Y X

_CONVERT = """
import json, resource, sys, time
from distseg.data.convert import ScanTask, convert_scan
from distseg.data.formats import discover
source, out = sys.argv[1:]
(case,) = discover(source).cases
begun = time.perf_counter()
convert_scan(ScanTask(
    case=case, cohort=out, staging=out, classes={"background": 0, "organ": 1, "bone": 2}, spacing_mm=None
))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([peak, time.perf_counter() - begun]))
"""


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        results = {**_big(Path(folder)), **_small(Path(folder))}
    Console().print({name: round(value, 3) for name, value in results.items()})
    return results


def _big(root: Path) -> dict[str, float]:
    source = write_nnunet_source(root / "big", scans=1, shape=BIG, labelled=1)
    (root / "out").mkdir()
    command = [sys.executable, "-c", _CONVERT, str(source), str(root / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds = json.loads(done.stdout)
    return {"ingest.peak_over_raw_int16": peak / (2 * math.prod(BIG)), "ingest.scan_s_512x512x1200": seconds}


def _small(root: Path) -> dict[str, float]:
    source = write_nnunet_source(root / "small", scans=SMALL_SCANS, shape=SMALL, labelled=SMALL_SCANS)
    results = {}
    for workers in (1, 2):
        executor = LocalExecutor(workers)
        cohort = root / f"small_{workers}.zarr"
        begun = time.perf_counter()
        ingest_cohort(source=str(source), cohort=str(cohort), executor=executor, progress=False)
        results[f"ingest.scans_per_s.workers_{workers}"] = SMALL_SCANS / (time.perf_counter() - begun)
        executor.close()
    store = sum(file.stat().st_size for file in (root / "small_1.zarr").glob("*/0/**/*") if file.is_file())
    nii_gz = sum(file.stat().st_size for file in (source / "imagesTr").iterdir())
    results["ingest.store_over_nii_gz"] = store / nii_gz
    results["ingest.store_over_raw"] = store / (2 * math.prod(SMALL) * SMALL_SCANS)
    return results
