"""Readers of the store's arrays: one contract, every reader, against numpy; what is damaged is one clear line."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.data import arrays
from distseg.data.arrays import READERS, open_array, reader_name
from distseg.data.layout import write_array
from distseg.errors import ConfigError, DataError

SHAPES = {np.int16: (150, 70, 300), np.float32: (65, 64, 63), np.uint8: (3, 200, 129)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[type, tuple[Path, np.ndarray]]:
    root, rng = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    found = {}
    for kind, shape in SHAPES.items():
        data = (rng.normal(0, 60, shape) if kind is not np.uint8 else rng.integers(0, 3, shape)).astype(kind)
        data[:, : shape[1] // 2] = 0  # chunks of nothing but the fill value
        group = zarr.create_group(root / f"{np.dtype(kind)}", zarr_format=3)
        write_array(group, "0", data)
        found[kind] = (root / f"{np.dtype(kind)}/0", data)
    return found


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "tensorstore":
        pytest.importorskip("tensorstore", reason="the extra io is not installed")
    monkeypatch.setenv("DISTSEG_READER", request.param)
    reader_name.cache_clear()
    yield request.param
    reader_name.cache_clear()


@pytest.mark.parametrize("kind", SHAPES)
@settings(max_examples=15)
@given(data=st.data())
def test_every_reader_gives_numpys_boxes(
    stored: dict[type, tuple[Path, np.ndarray]], kind: type, data: st.DataObject
) -> None:
    path, truth = stored[kind]
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in truth.shape]
    box = tuple(slice(*pair) for pair in bounds)
    for name in READERS:
        if name == "tensorstore":
            pytest.importorskip("tensorstore", reason="the extra io is not installed")
        opened = open_array(str(path), reader=name)
        assert (opened.shape, opened.dtype) == (truth.shape, truth.dtype)
        assert type(opened[box]) is np.ndarray
        assert np.array_equal(opened[box], truth[box])


def test_other_selections(stored: dict[type, tuple[Path, np.ndarray]], reader: str) -> None:
    path, truth = stored[np.int16]
    opened = open_array(str(path))
    for selection in (..., (slice(None), 5, slice(0, 300, 7)), (slice(10, 20),), (slice(0, 150, 2), ...)):
        assert np.array_equal(opened[selection], truth[selection])


def test_what_is_missing_or_damaged_is_one_line(
    stored: dict[type, tuple[Path, np.ndarray]], reader: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"patient/scan/0: array of the store cannot be read"):
        open_array(str(tmp_path / "patient/scan/0"))
    shutil.copytree(stored[np.int16][0], tmp_path / "patient/scan/0")
    shard = tmp_path / "patient/scan/0/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-100])  # the index at the shard's end is gone
    with pytest.raises(DataError, match="array of the store cannot be read") as caught:
        _ = open_array(str(tmp_path / "patient/scan/0"))[:64, 36:64, :64]
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_storage_that_does_not_answer_is_no_damage(
    stored: dict[type, tuple[Path, np.ndarray]], reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is want of memory: neither may be answered by removing the scan. TensorStore tells errno in words."""
    path = str(stored[np.int16][0])
    opened = open_array(path)
    words = ValueError("UNKNOWN: Error reading x [OS error 5: EIO Input/output error]")
    system = OSError(errno.EIO, os.strerror(errno.EIO), path)

    class Away:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def __getitem__(self, selection: Any) -> Any:
            raise self.error

    for error in (words, system):
        monkeypatch.setattr(opened, "_opened", Away(error))
        with pytest.raises(OSError, match="Input/output error") as caught:
            _ = opened[:1]
        assert caught.value.errno == errno.EIO
        assert str(Path(path).parents[2]) not in str(caught.value)
    monkeypatch.setattr(opened, "_opened", Away(MemoryError()))
    with pytest.raises(MemoryError):
        _ = opened[:1]


def change(node: Any, path: str, value: object) -> None:
    *way, last = path.split("/")
    for key in way:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(last) if isinstance(node, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("shape", [10**4] * 3, r"shape \[10000, 10000, 10000\]: at most 8589934592 values"),
        ("shape", [-1, 5, 5], "shape"),
        ("chunk_grid/configuration/chunk_shape", [10**4] * 3, r"chunk_shape \[10000, 10000, 10000\]"),
        ("codecs/0/configuration/chunk_shape", [2**10] * 3, "chunk_shape of a shard"),
        ("codecs/0/configuration/codecs/1", {"name": "gzip", "configuration": {"level": 9}}, "codec gzip: one of"),
        ("storage_transformers", [{"name": "x"}], "codec transformers"),
        ("codecs", None, "not iterable"),
        ("data_type", "a thousand floats", "not understood"),
    ],
)
def test_metadata_that_asks_for_too_much_is_refused_unread(
    stored: dict[type, tuple[Path, np.ndarray]], reader: str, tmp_path: Path, path: str, value: object, message: str
) -> None:
    shutil.copytree(stored[np.int16][0], tmp_path / "scan/0")
    metadata = tmp_path / "scan/0/zarr.json"
    node = json.loads(metadata.read_text())
    change(node, path, value)
    metadata.write_text(json.dumps(node))
    with pytest.raises(DataError, match=rf"scan/0: array of the store cannot be read \(got .*{message}"):
        open_array(str(tmp_path / "scan/0"))


def test_reader_is_chosen_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays.importlib.util, "find_spec", lambda _: None)
    monkeypatch.delenv("DISTSEG_READER", raising=False)
    reader_name.cache_clear()
    assert reader_name() == "zarr"
    for wanted in ("tensorstore", "h5py"):
        monkeypatch.setenv("DISTSEG_READER", wanted)
        reader_name.cache_clear()
        with pytest.raises(ConfigError, match=rf"DISTSEG_READER: no such reader \(got {wanted}\)"):
            reader_name()
    reader_name.cache_clear()
