"""Which chunk, codec and level the store should have: random boxes of one CT-like volume of 256^3 int16, both readers.

Shards are of 256^3 throughout, shuffling is bitshuffle. CPU time of all the process' threads, medians; the same boxes
for every layout, in turn.

Keys, for CHUNK in 32, 64, 128 and CODEC in lz4_5, zstd_3, zstd_9:
  layout.CHUNK.CODEC.over_raw                    bytes on disk / raw
  layout.CHUNK.CODEC.READER.ms_SIDE              a patch of SIDE^3, 64 and 96
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import zarr
from rich.console import Console
from zarr.codecs import BloscCname, BloscCodec, BloscShuffle

from distseg.data.arrays import READERS, StoredArray, open_array
from tests.bench.volumes import ct_volume

SIZE, SIDES, ROUNDS = 256, (64, 96), 12
CHUNKS = (32, 64, 128)
CODECS = {"lz4_5": (BloscCname.lz4, 5), "zstd_3": (BloscCname.zstd, 3), "zstd_9": (BloscCname.zstd, 9)}


def run() -> dict[str, float]:
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        volume, _ = ct_volume((SIZE,) * 3, 0)
        opened: dict[str, StoredArray] = {}
        for chunk in CHUNKS:
            for codec in CODECS:
                path = Path(folder) / f"{chunk}.{codec}"
                _write(path, volume, chunk, codec)
                nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                results[f"layout.{chunk}.{codec}.over_raw"] = nbytes / volume.nbytes
                for reader in READERS:
                    opened[f"{chunk}.{codec}.{reader}"] = open_array(str(path / "0"), reader=reader)
        for side in SIDES:
            for name, milliseconds in _read(opened, side).items():
                results[f"layout.{name}.ms_{side}"] = milliseconds
    Console().print({name: round(value, 3) for name, value in results.items()})
    return results


def _write(path: Path, volume: np.ndarray, chunk: int, codec: str) -> None:
    name, level = CODECS[codec]
    array = zarr.create_group(path, zarr_format=3).create_array(
        "0",
        shape=volume.shape,
        dtype=volume.dtype,
        chunks=(chunk,) * 3,
        shards=volume.shape,
        compressors=BloscCodec(cname=name, clevel=level, shuffle=BloscShuffle.bitshuffle, typesize=2),
        fill_value=0,
    )
    array[...] = volume


def _read(opened: dict[str, StoredArray], side: int) -> dict[str, float]:
    starts = np.random.default_rng(side).integers(0, SIZE - side, (ROUNDS, 3))
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    for z, y, x in starts.tolist():
        for name, array in opened.items():
            begun = time.process_time()
            _ = array[z : z + side, y : y + side, x : x + side]
            seconds[name].append(time.process_time() - begun)
    return {name: 1e3 * float(np.median(taken)) for name, taken in seconds.items()}
