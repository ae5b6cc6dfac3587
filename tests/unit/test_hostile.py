"""Files from strangers: cohorts, runs, models, banks, checkpoints with hostile values. Each is used, or refused in one
line; nothing crashes, hangs, fills memory, runs code, or is read or written outside its folder."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from safetensors.torch import load_file, save_file

from distseg.config.compose import train_config
from distseg.config.untrusted import MAX_CHARACTERS, check_name, read_json, read_yaml
from distseg.data.cohort import Cohort, index_path
from distseg.errors import DataError, DistsegError
from distseg.inference.model import load_model
from distseg.training.checkpoint import list_checkpoints, load_checkpoint
from distseg.training.local import train_local
from distseg.training.run import RunDirectory
from distseg.work.executor import LocalExecutor
from distseg.work.label_cohort import label_cohort
from tests.unit.test_label_cohort import SETTINGS
from tests.unit.tiny_run import make_run

DEEP = json.loads("[" * 200 + "]" * 200)
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 10**12, 10**30, 1e308, float("nan"), float("inf"), "", "../../x", "/etc/passwd", "a\x00b",
    "$import os", "@x", "9" * 5000, [], {}, [None], [10**12] * 3, [-1, 0, 1], {"_target_": "os.system"}, DEEP,
)  # fmt: skip


def mutated(content: Any, rng: random.Random) -> Any:
    """One to three values of a JSON tree replaced, removed, or moved."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        places = list(spots(content))
        if not places:
            break
        holder, key = rng.choice(places)
        if rng.random() < 0.2:
            del holder[key]
        elif rng.random() < 0.2:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return content


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from spots(tree[key])


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, or the end gone, or something put in."""
    kind, at = rng.randrange(3), rng.randrange(max(1, len(data)))
    if kind == 0:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    return data[:at] if kind == 1 else data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def used_or_refused(use: Callable[[], object]) -> bool:
    """Whether it was refused, in one line."""
    message = ""
    try:
        use()
    except DistsegError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000
    return bool(message)


def fuzzed(file: Path, use: Callable[[], object], *, times: int, rng: random.Random) -> int:
    """How many of `times` versions of a file were refused."""
    whole, refused = file.read_bytes(), 0
    lines = file.suffix == ".jsonl"
    is_json = file.suffix in (".json", ".jsonl", ".yaml")
    parse = yaml.safe_load if file.suffix == ".yaml" else json.loads
    try:
        for _ in range(times):
            if is_json and rng.random() < 0.8:
                if lines:
                    rows = [json.loads(line) for line in whole.decode().splitlines()]
                    text = "".join(json.dumps(row) + "\n" for row in mutated(rows, rng))
                elif file.suffix == ".yaml":
                    text = yaml.safe_dump(mutated(parse(whole.decode()), rng))
                else:
                    text = json.dumps(mutated(parse(whole.decode()), rng))
                file.write_bytes(text.encode())
            else:
                file.write_bytes(flipped(whole, rng))
            refused += used_or_refused(use)
    finally:
        file.write_bytes(whole)
    return refused


@pytest.fixture(scope="module")
def stranger(cohort_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cohort, a trained run with a bank, and a model with references."""
    root = tmp_path_factory.mktemp("stranger")
    shutil.copytree(cohort_path, root / "c.zarr")
    shutil.copy(index_path(Path(cohort_path)), root / "c.index.jsonl")
    keys = {
        "launcher": "local", "network.base_filters": 2, "network.levels": 2, "sampling.patch_zyx": [8, 8, 8],
        "train.steps": 2, "train.threads": 1, "method.passes": 2, "references.patches": 3, "references.per_patch": 20,
        "matching.k": 3, "logging.progress": False, "logging.tensorboard": False, "train.validation_patches": 2,
    }  # fmt: skip
    train_local(train_config(cohort=str(root / "c.zarr"), run=str(root / "run"), matching="index", overrides=keys))
    return root


def read_cohort(root: Path) -> None:
    cohort = Cohort.open(root / "c.zarr")
    for record in cohort.records[:2]:
        scan = cohort.scan(record.scan_id)
        for seen in (scan.geometry, scan.native, scan.body_box, scan.body_samples, scan.foreground, scan.minimum):
            assert seen is not None
        scan.image[:4, :4, :4]
        if scan.annotation is not None:
            scan.annotation[:4, :4, :4]


def read_run(root: Path) -> None:
    RunDirectory(root / "run").stored()


def read_model(root: Path) -> None:
    model = load_model(root / "run")
    matcher = model.matcher
    if matcher is not None:
        matcher.match(torch.zeros(3, 4))
    model.networks["teacher"](torch.zeros(1, 1, 8, 8, 8))


def read_checkpoint(root: Path) -> None:
    load_checkpoint(list_checkpoints(root / "run/checkpoints")[-1])


READERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cohort": ("c.zarr/zarr.json", read_cohort),
    "index": ("c.index.jsonl", read_cohort),
    "scan": ("c.zarr/a/zarr.json", read_cohort),
    "image": ("c.zarr/a/0/zarr.json", read_cohort),
    "voxels": ("c.zarr/a/0/c/0/0/0", read_cohort),
    "annotation": ("c.zarr/a/labels/annotation/0/zarr.json", read_cohort),
    "samples": ("c.zarr/a/samples/voxels/zarr.json", read_cohort),
    "run": ("run/config.yaml", read_run),
    "model": ("run/model/model.json", read_model),
    "weights": ("run/model/teacher.safetensors", read_model),
    "bank": ("run/model/references/bank.json", read_model),
    "table": ("run/model/references/table.safetensors", read_model),
    "lists": ("run/model/references/index.bin", read_model),
    "state": ("run/checkpoints/step_0000002/state.json", read_checkpoint),
    "optimizer": ("run/checkpoints/step_0000002/optimizer.pt", read_checkpoint),
}


@pytest.mark.parametrize("name", READERS)
def test_hostile_files(stranger: Path, name: str) -> None:
    file, read = READERS[name]
    read(stranger)
    refused = fuzzed(stranger / file, lambda: read(stranger), times=25, rng=random.Random(name))
    assert refused > 0
    read(stranger)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_three_hundred_hostile_files(stranger: Path, name: str) -> None:
    file, read = READERS[name]
    refused = fuzzed(stranger / file, lambda: read(stranger), times=300, rng=random.Random(f"{name} 2"))
    print(f"{file}: 300 tried, {refused} refused, {300 - refused} used")
    assert refused > 0
    read(stranger)  # the file as it was is back, and serves


def test_weights_under_a_fitting_checksum(stranger: Path, tmp_path: Path) -> None:
    """A checksum finds damage, not malice: another network's weights, and a model.json that asks for terabytes."""
    shutil.copytree(stranger / "run/model", tmp_path / "model")
    file, described = tmp_path / "model/student.safetensors", tmp_path / "model/model.json"
    content = json.loads(described.read_text())
    described.write_text(json.dumps({**content, "network": {**content["network"], "base_filters": 10**6}}))
    with pytest.raises(DataError, match="weights of another network"):
        load_model(tmp_path)
    save_file({**load_file(file), "more": torch.zeros(3)}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    described.write_text(json.dumps({**content, "sha256": {**content["sha256"], "student": digest}}))
    with pytest.raises(DataError, match="weights of another network"):
        load_model(tmp_path)


def test_a_pickle_in_the_place_of_weights(stranger: Path, tmp_path: Path) -> None:
    shutil.copytree(stranger / "run/model", tmp_path / "model")
    file, described, marker = tmp_path / "model/student.safetensors", tmp_path / "model/model.json", tmp_path / "ran"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({"a": Harm()}, file)
    content = json.loads(described.read_text())
    content["sha256"]["student"] = hashlib.sha256(file.read_bytes()).hexdigest()
    described.write_text(json.dumps(content))
    with pytest.raises(DataError, match="unreadable model"):
        load_model(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_names", ["background", "bell\a"]),
        ("whole", ["liver"]),
        ("whole", ["background"]),
        ("passes", 10**9),
        ("patch_zyx", [10**6, 10**6, 10**6]),
        ("spacing_mm", [0.0, 1.0, 1.0]),
        ("spacing_mm", [float("nan"), 1.0, 1.0]),
        ("threshold_nats", float("inf")),
    ],
)
def test_what_a_model_may_not_say(stranger: Path, tmp_path: Path, field: str, value: Any) -> None:
    shutil.copytree(stranger / "run/model", tmp_path / "model")
    described = tmp_path / "model/model.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), field: value}))
    with pytest.raises(DataError, match=r"model\.json: no model that we write"):
        load_model(tmp_path)


def test_size_bombs_in_a_cohort(stranger: Path, tmp_path: Path) -> None:
    """An array of 10^12 voxels, a chunk of 10^12, a codec that unfolds without bound: refused before a byte is read."""
    shutil.copytree(stranger / "c.zarr", tmp_path / "c.zarr")
    shutil.copy(stranger / "c.index.jsonl", tmp_path)
    described = tmp_path / "c.zarr/a/0/zarr.json"
    content = json.loads(described.read_text())

    def refused(message: str, scan: dict[str, Any] | None = None, **changes: Any) -> None:
        described.write_text(json.dumps({**content, **changes}))
        with pytest.raises(DataError, match=message):
            read_cohort(tmp_path)

    huge = [10_000, 10_000, 10_000]
    refused("array and attributes differ in shape", shape=[10, 10, 10])
    refused("array of the store cannot be read.*shape", shape=huge)
    whole = {"name": "regular", "configuration": {"chunk_shape": huge}}
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    refused("array of the store cannot be read.*chunk_shape", chunk_grid=whole, codecs=plain)
    refused(
        "array of the store cannot be read.*codec gzip",
        codecs=[*plain, {"name": "gzip", "configuration": {"level": 5}}],
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": content["shape"]}},
    )


@pytest.mark.parametrize(
    "name", ["../../escaped", "/etc/cron.d/x", "a/b", "..", ".", "", "a\nb", "a\x00b", "x" * 300, "a\\b"]
)
def test_no_scan_leaves_its_folder(stranger: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(stranger / "c.zarr", tmp_path / "c.zarr")
    rows = [json.loads(line) for line in (stranger / "c.index.jsonl").read_text().splitlines()]
    rows[0]["id"] = name
    (tmp_path / "c.index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="not a scan id we write"):
        Cohort.open(tmp_path / "c.zarr")
    run = make_run(tmp_path)
    with pytest.raises(DataError, match="not a scan id we write"):
        label_cohort(
            run=run, cohort=str(tmp_path / "c.zarr"), output=str(tmp_path / "o/p"), settings=SETTINGS,
            executor=LocalExecutor(1),
        )  # fmt: skip
    assert not (tmp_path / "escaped.nii.gz").exists()


def test_bounds_of_small_files(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="nests too deeply"):
        read_json(file)
    with pytest.raises(DataError, match="nests too deeply"):
        read_yaml(file)
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    file.write_text(laughs)
    with pytest.raises(DataError, match="unfolds to too much"):
        read_yaml(file)
    file.write_text("&a [*a]")
    with pytest.raises(DataError, match="nests too deeply"):
        read_yaml(file)
    file.write_text("!!python/object/apply:os.system ['touch /tmp/x']")
    with pytest.raises(DataError, match="not YAML"):
        read_yaml(file)
    file.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_json(file)
    with file.open("wb") as handle:
        handle.truncate(MAX_CHARACTERS + 1)
    for read in (read_json, read_yaml):
        with pytest.raises(DataError, match="too long"):
            read(file)
    assert check_name("CASE 1 (left)", where="x") == "CASE 1 (left)"


def test_no_class_is_made_by_name_from_a_config(stranger: Path, tmp_path: Path) -> None:
    """`_target_` is an unknown key like any other."""
    shutil.copytree(stranger / "run", tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    content = yaml.safe_load(file.read_text())
    content["config"]["method"] = {"_target_": "os.system", "_args_": ["touch x"]}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(DistsegError, match=r"_target_|_args_"):
        RunDirectory(tmp_path / "run").stored()
    assert np.array_equal(zarr.open_array(stranger / "c.zarr/a/0", mode="r")[:1, :1, :1].shape, (1, 1, 1))
