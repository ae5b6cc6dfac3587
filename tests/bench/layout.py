"""Which chunk, shard, codec, level, reader and threads the store should have: random boxes of a CT-like volume of 256^3
int16, bitshuffled by blosc. Medians; the same boxes for every layout and reader, in turn.

CPU time of all the process' threads, but for threads, where it is wall time, on idle cores. `zarrs` is a codec pipeline
of zarr-python in Rust, and no dependency: it is measured where it is installed (pip install zarrs).

Keys, for CHUNK in 32, 64, 128, CODEC in lz4_5, zstd_3, zstd_9, READER in tensorstore, zarr, zarrs, SIDE in 64, 96:
  layout.CHUNK.CODEC.over_raw                    bytes on disk / raw, in one shard
  layout.CHUNK.CODEC.READER.ms_SIDE              a patch of SIDE^3
  layout.shard_SHARD.READER.ms_SIDE              of chunks 64 with lz4_5; 64: each chunk a file of its own
  layout.shard_SHARD.files, .write_s             files on disk; seconds of CPU to write the volume
  layout.threads_N.READER.wall_ms_SIDE           the same in shards of 256, for N in 1, 2
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import zarr
from rich.console import Console
from zarr.codecs import BloscCname, BloscCodec, BloscShuffle

from distseg.data import arrays
from distseg.data.arrays import READERS, StoredArray, open_array
from tests.bench.volumes import ct_volume

SIZE, SIDES, ROUNDS = 256, (64, 96), 12
CHUNKS, SHARDS = (32, 64, 128), (64, 128, 256)
CODECS = {"lz4_5": (BloscCname.lz4, 5), "zstd_3": (BloscCname.zstd, 3), "zstd_9": (BloscCname.zstd, 9)}
CHOSEN = 64, "lz4_5"
THREADS, SMALL_CACHE_NBYTES = (1, 2), 2**20
ZARRS = ("zarrs",) if importlib.util.find_spec("zarrs") else ()


def run() -> dict[str, float]:
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        volume, _ = ct_volume((SIZE,) * 3, 0)
        opened: dict[str, StoredArray] = {}
        for chunk in CHUNKS:
            for codec in CODECS:
                path = Path(folder) / f"{chunk}.{codec}"
                _write(path, volume, chunk, codec, shard=SIZE)
                nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                results[f"layout.{chunk}.{codec}.over_raw"] = nbytes / volume.nbytes
                opened |= {f"{chunk}.{codec}.{reader}": _open(path, reader) for reader in (*READERS, *ZARRS)}
        for shard in SHARDS:
            path = Path(folder) / f"shard_{shard}"
            begun = time.process_time()
            _write(path, volume, *CHOSEN, shard=shard)
            results[f"layout.shard_{shard}.write_s"] = time.process_time() - begun
            results[f"layout.shard_{shard}.files"] = sum(file.is_file() for file in path.rglob("*"))
            opened |= {f"shard_{shard}.{reader}": _open(path, reader) for reader in (*READERS, *ZARRS)}
        by_threads = {
            f"threads_{threads}.{reader}": _open(Path(folder) / f"shard_{SIZE}", reader, threads)
            for threads in THREADS
            for reader in (*READERS, *ZARRS)
        }
        for side in SIDES:
            cpu, wall = _read(opened, side, time.process_time), _read(by_threads, side, time.perf_counter)
            results |= {f"layout.{name}.ms_{side}": taken for name, taken in cpu.items()}
            results |= {f"layout.{name}.wall_ms_{side}": taken for name, taken in wall.items()}
    Console().print({name: round(value, 3) for name, value in results.items()})
    return results


def _write(path: Path, volume: np.ndarray, chunk: int, codec: str, *, shard: int) -> None:
    name, level = CODECS[codec]
    array = zarr.create_group(path, zarr_format=3).create_array(
        "0",
        shape=volume.shape,
        dtype=volume.dtype,
        chunks=(chunk,) * 3,
        shards=(shard,) * 3 if shard > chunk else None,
        compressors=BloscCodec(cname=name, clevel=level, shuffle=BloscShuffle.bitshuffle, typesize=2),
        fill_value=0,
    )
    array[...] = volume


def _open(path: Path, reader: str, threads: int | None = None) -> StoredArray:
    """With `threads` also with a cache of its own that no patch fits in."""
    if reader == "zarrs":
        pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": threads}
        with zarr.config.set(pipeline):  # an array keeps the pipeline it was opened with
            return StoredArray(str(path), zarr.open_array(path / "0", mode="r", zarr_format=3))
    if threads is None:
        return open_array(str(path / "0"), reader=reader)
    arrays._context.cache_clear()
    with (
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": str(threads)}),
        mock.patch.object(arrays, "CACHE_NBYTES", SMALL_CACHE_NBYTES),
    ):
        return open_array(str(path / "0"), reader=reader)


def _read(opened: dict[str, StoredArray], side: int, clock: Callable[[], float]) -> dict[str, float]:
    starts = np.random.default_rng(side).integers(0, SIZE - side, (ROUNDS, 3))
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    for z, y, x in starts.tolist():
        for name, array in opened.items():
            begun = clock()
            _ = array[z : z + side, y : y + side, x : x + side]
            seconds[name].append(clock() - begun)
    return {name: 1e3 * float(np.median(taken)) for name, taken in seconds.items()}
