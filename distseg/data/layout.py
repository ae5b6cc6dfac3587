"""How a scan lies in the store: chunks, shards, codec, and the metadata by which others read it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCname, BloscCodec, BloscShuffle

from distseg.data.volume import Geometry, shape3

# Chosen by measurement (tests/bench/RESULTS.md, Data at speed; python -m tests.bench layout). Chunks of 64^3: of 32^3,
# zarr takes twice as long and behind a URL each is a request; of 128^3 too much is decoded. lz4 with bitshuffle decodes
# about twice as fast as zstd-3, for 18 % more bytes.
CHUNK = 64
CHUNKS_PER_SHARD = 4
CODEC, LEVEL = BloscCname.lz4, 5
AXES = ("z", "y", "x")


def write_array(group: zarr.Group, name: str, data: npt.NDArray[Any]) -> None:
    """`data` [Z, Y, X] as array `name` of the group, in the layout that RESULTS.md (Data at speed) chose."""
    chunks = shape3(min(CHUNK, n) for n in data.shape)
    shards = shape3(chunk * min(CHUNKS_PER_SHARD, -(-n // chunk)) for n, chunk in zip(data.shape, chunks, strict=True))
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=chunks,
        shards=shards,
        compressors=BloscCodec(
            cname=CODEC, clevel=LEVEL, shuffle=BloscShuffle.bitshuffle, typesize=data.dtype.itemsize
        ),
        dimension_names=AXES,
        fill_value=0,
    )
    for corner in itertools.product(*(range(0, n, size) for n, size in zip(data.shape, shards, strict=True))):
        shard = tuple(slice(start, start + size) for start, size in zip(corner, shards, strict=True))
        array[shard] = data[shard]  # one at a time: zarr would encode ten at once, each with buffers of its own


def write_labels(
    group: zarr.Group,
    *,
    annotation: npt.NDArray[np.uint8],
    stored: Geometry,
    native: tuple[Any, Geometry] | None,
    classes: dict[str, int],
) -> None:
    images: dict[str, tuple[Any, Geometry]] = {"annotation": (annotation, stored)}
    if native is not None:
        images["annotation_native"] = native
    labels = group.create_group("labels", attributes={"ome": {"version": "0.5", "labels": list(images)}})
    for name, (array, geometry) in images.items():
        attrs = image_attrs(geometry)
        values = [{"label-value": value, "name": class_name} for class_name, value in classes.items() if value > 0]
        attrs["ome"]["image-label"] = {"version": "0.5", "properties": values, "source": {"image": "../../"}}
        write_array(labels.create_group(name, attributes=attrs), "0", array)


def write_samples(group: zarr.Group, voxels: npt.NDArray[np.int32], intensities: npt.NDArray[np.float32]) -> None:
    samples = group.create_group("samples")
    for name, data in (("voxels", voxels), ("intensities", intensities)):
        array = samples.create_array(name, shape=data.shape, dtype=data.dtype, chunks=data.shape)
        array[...] = data


def image_attrs(geometry: Geometry) -> dict[str, Any]:
    """OME-Zarr 0.5. It can say scale and translation only: exact unless the affine is oblique, which our own attributes
    keep; the translation is the first voxel's LPS+ position, in z, y, x."""
    transforms = [
        {"type": "scale", "scale": list(geometry.spacing_mm)},
        {"type": "translation", "translation": geometry.affine[[2, 1, 0], 3].tolist()},
    ]
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in AXES]
    datasets = [{"path": "0", "coordinateTransformations": transforms}]
    return {"ome": {"version": "0.5", "multiscales": [{"name": "0", "axes": axes, "datasets": datasets}]}}
