"""Random patches from a cohort of 8 CT-like scans of 512^3 int16 (2.1 GB raw): our store against what others read from.
Two scans are made, the other six are copies of their files: content decides a codec's speed, files what is cached.

Every reader gets the same boxes of the same scans, as numbers in the file's own units (no normalisation), in turn, one
thread each. Warm: everything was read before and fits the page cache; CPU time of all the process' threads, which other
work on the machine does not change as it does the clock on the wall. Cold: before each patch the scan's pages are
dropped from this page cache (posix_fadvise DONTNEED) and the array opened anew, wall time; the disk of a virtual
machine may still have them. Ratios are medians of the other / medians of ours: above 1 we are faster.

Keys, for SIDE in 64, 96, 128; ours is TensorStore where it is installed:
  patch_SIDE.ms, patch_SIDE.ms_zarr   our store, by TensorStore and by zarr-python
  patch_SIDE.over_nii_gz        nibabel's dataobj of the .nii.gz, sliced
  patch_SIDE.over_blosc2        float32 .b2nd in blocks and chunks as nnU-Net lays them out for a 96^3 patch, zstd-8
  patch_SIDE.over_blosc2_int16  the same of our int16: the format alone
  patch_SIDE.over_memmap        uncompressed int16 by numpy.memmap, copied
  patch_SIDE.over_persistent    MONAI's PersistentDataset over LoadImaged, RandSpatialCropd; its boxes are its own
  patch_SIDE.cold.over_*        cold
  patches.store_over_raw, patches.nii_gz_over_raw, patches.blosc2_over_raw    bytes on disk
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
import zarr
from monai.data import PersistentDataset
from monai.transforms import Compose, LoadImaged, RandSpatialCropd
from rich.console import Console
from rich.table import Table

from distseg.data.arrays import open_array, reader_name
from distseg.data.layout import write_array
from tests.bench.volumes import LPS_FROM_VOXELS, ct_volume

SCANS, DISTINCT, SHAPE = 8, 2, (512, 512, 512)
SIDES = (96, 64, 128)
ROUNDS, SLOW_ROUNDS, COLD_ROUNDS, SLOW_COLD_ROUNDS = 24, 2, 8, 1
SLOW = ("nii_gz", "persistent")  # seconds a patch
L1_NBYTES, L3_NBYTES, SAFE = 32 * 1024, 1408 * 1024, 0.8  # what nnU-Net assumes of a core's caches

Box = tuple[slice, slice, slice]
Opener = Callable[[int], Callable[[Box], np.ndarray]]  # scan's number -> reader of its boxes


def run(data: str | None = None) -> dict[str, float]:
    """`data`: a folder that keeps what is made here (10 GB) for the next time."""
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        root = Path(data or folder)
        _make(root)
        results = _sizes(root)
        for side in SIDES:
            results |= _measure(root, side)
    return results


def _make(root: Path) -> None:
    blosc2.set_nthreads(1)
    root.mkdir(parents=True, exist_ok=True)
    for number in range(SCANS):
        if (root / f"{number}.done").exists():
            continue
        if number >= DISTINCT:
            _copy(root, number % DISTINCT, number)
            continue
        image, _ = ct_volume(SHAPE, number)
        np.save(root / f"{number}.npy", image)
        group = zarr.create_group(root / f"{number}.zarr", zarr_format=3, overwrite=True)
        write_array(group, "0", image)
        nib.openers.Opener.default_compresslevel = 1
        nib.save(nib.Nifti1Image(image.T, LPS_FROM_VOXELS), root / f"{number}.nii.gz")
        for name, array in (("blosc2", image.astype(np.float32)), ("blosc2_int16", image)):
            path = root / f"{number}.{name}.b2nd"
            path.unlink(missing_ok=True)
            chunk, block = _nnunet_layout(array.itemsize)
            codec = {"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1}
            blosc2.asarray(array, urlpath=str(path), chunks=chunk, blocks=block, cparams=codec)
        (root / f"{number}.done").touch()


def _copy(root: Path, made: int, number: int) -> None:
    for source in root.glob(f"{made}.*"):
        target = root / source.name.replace(str(made), str(number), 1)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.suffix != ".done":
            shutil.copyfile(source, target)
    (root / f"{number}.done").touch()


def _nnunet_layout(itemsize: int, patch: int = 96) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(chunk, block): a cube of a power of two that fits L1, and as many of them as fit L3, up to 1.5 patches."""
    block = 1 << (patch - 1).bit_length()
    while block**3 * itemsize > SAFE * L1_NBYTES:
        block //= 2
    chunk = block
    while (chunk + block) ** 3 * itemsize <= SAFE * L3_NBYTES and chunk + block <= 1.5 * patch:
        chunk += block
    return (chunk,) * 3, (block,) * 3


def _openers(root: Path) -> dict[str, Opener]:
    def stored(reader: str) -> Opener:
        return lambda number: open_array(str(root / f"{number}.zarr/0"), reader=reader).__getitem__

    def memmap(number: int) -> Callable[[Box], np.ndarray]:
        array = np.load(root / f"{number}.npy", mmap_mode="r")
        return lambda box: np.array(array[box])

    def nii_gz(number: int) -> Callable[[Box], np.ndarray]:
        image: Any = nib.load(root / f"{number}.nii.gz")
        return lambda box: np.asarray(image.dataobj[box[::-1]]).T

    def blosc(name: str) -> Opener:
        def opened(number: int) -> Callable[[Box], np.ndarray]:
            path = str(root / f"{number}.{name}.b2nd")
            array = blosc2.open(urlpath=path, mode="r", mmap_mode="r", dparams={"nthreads": 1})
            return lambda box: array[box]

        return opened

    def persistent(number: int) -> Callable[[Box], np.ndarray]:
        def read(box: Box) -> np.ndarray:
            side = box[0].stop - box[0].start
            crop = RandSpatialCropd("image", roi_size=(side,) * 3, random_size=False)
            load = LoadImaged("image", reader="NumpyReader", ensure_channel_first=True)
            data = [{"image": str(root / f"{number}.npy")}]
            item: Any = PersistentDataset(data, Compose([load, crop]), cache_dir=root / f"{number}.persistent")[0]
            return np.asarray(item["image"])[0]

        return read

    ours = {name: stored(name) for name in dict.fromkeys((reader_name(), "zarr"))}
    others = {"blosc2": blosc("blosc2"), "blosc2_int16": blosc("blosc2_int16"), "memmap": memmap}
    return {**ours, **others, "nii_gz": nii_gz, "persistent": persistent}


def _measure(root: Path, side: int) -> dict[str, float]:
    openers, rng = _openers(root), np.random.default_rng(side)
    opened = {name: [opener(n) for n in range(SCANS)] for name, opener in openers.items()}
    places = [(int(rng.integers(SCANS)), rng.integers(0, SHAPE[0] - side, 3)) for _ in range(ROUNDS)]
    seconds: dict[str, list[float]] = {name: [] for name in openers}
    cold: dict[str, list[float]] = {name: [] for name in openers}
    for warmed in (False, True):
        for turn, (number, start) in enumerate(places):
            box = _box(start, side)
            for name in openers:
                if name in SLOW and turn >= SLOW_ROUNDS * warmed:
                    continue
                begun = time.process_time()
                patch = opened[name][number](box)
                taken = time.process_time() - begun
                assert patch.shape == (side,) * 3
                if warmed:
                    seconds[name].append(taken)
    for turn, (number, start) in enumerate(places[:COLD_ROUNDS]):
        for name, opener in openers.items():
            if name in SLOW and turn >= SLOW_COLD_ROUNDS:
                continue
            _drop(root, number, name)
            begun = time.perf_counter()
            opener(number)(_box(start, side))
            cold[name].append(time.perf_counter() - begun)
    return _report(side, seconds, cold)


def _box(start: np.ndarray, side: int) -> Box:
    z, y, x = (slice(int(s), int(s) + side) for s in start)
    return z, y, x


def _files(root: Path, number: int, name: str) -> list[Path]:
    ending = {
        "tensorstore": "zarr", "zarr": "zarr", "memmap": "npy", "nii_gz": "nii.gz", "persistent": "persistent",
        "blosc2": "blosc2.b2nd", "blosc2_int16": "blosc2_int16.b2nd",
    }[name]  # fmt: skip
    path = root / f"{number}.{ending}"
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _drop(root: Path, number: int, name: str) -> None:
    for file in _files(root, number, name):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # a page that is still to be written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _sizes(root: Path) -> dict[str, float]:
    raw = SCANS * 2 * float(np.prod(SHAPE))
    names = {"store": "zarr", "nii_gz": "nii_gz", "blosc2": "blosc2", "blosc2_int16": "blosc2_int16"}
    return {
        f"patches.{key}_over_raw": sum(f.stat().st_size for n in range(SCANS) for f in _files(root, n, name)) / raw
        for key, name in names.items()
    }


def _report(side: int, seconds: dict[str, list[float]], cold: dict[str, list[float]]) -> dict[str, float]:
    ours = next(iter(seconds))
    table = Table(title=f"patches of {side}^3, milliseconds; ours is {ours}")
    for column in ("", "warm CPU median", "warm CPU least", "cold wall median"):
        table.add_column(column, justify="right" if column else "left")
    results: dict[str, float] = {}
    for name in seconds:
        warm, first = float(np.median(seconds[name])), float(np.median(cold[name]))
        table.add_row(name, *(f"{1e3 * s:.2f}" for s in (warm, min(seconds[name]), first)))
        if name in (ours, "zarr"):
            results[f"patch_{side}.ms{'' if name == ours else '_zarr'}"] = 1e3 * warm
        else:
            results[f"patch_{side}.over_{name}"] = warm / float(np.median(seconds[ours]))
            results[f"patch_{side}.cold.over_{name}"] = first / float(np.median(cold[ours]))
    Console().print(table)
    return results
