"""The reference index: one contract for every backend, kind and device, with brute force in float64 as the oracle."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from distseg.errors import ConfigError, DataError
from distseg.matching import index as index_module
from distseg.matching import index_bytes
from distseg.matching.index import ReferenceIndex, build_index, deserialize, load_index, serialize
from distseg.matching.index_torch import GROUP

F64 = torch.float64


@dataclass(frozen=True)
class Built:
    """One row of the contract: how an index is asked for."""

    backend: str
    kind: str
    device: str

    def __call__(self, embeddings: Tensor, classes: Tensor, num_classes: int = 2, **more: Any) -> ReferenceIndex:
        asked = {"backend": self.backend, "kind": self.kind, "device": self.device, **more}
        return build_index(embeddings, classes, num_classes=num_classes, **asked)


def _gpus_of_faiss() -> int:
    """FAISS's GPU package is the exclusive extra `gpu`: nothing here asks for it."""
    try:
        import faiss
    except ImportError:
        return 0
    return int(faiss.get_num_gpus())


def _params(*backends: tuple[str, str]) -> list[Any]:
    """On the CPU, and again on a GPU where there is one that the backend can use."""
    pytest_params = [pytest.param(Built(backend, kind, "cpu"), id=f"{backend}-{kind}") for backend, kind in backends]
    for backend, kind in backends:
        if torch.cuda.is_available() and (backend == "torch" or _gpus_of_faiss()):
            name = f"{backend}-{kind}-cuda"
            pytest_params.append(pytest.param(Built(backend, kind, "cuda"), marks=pytest.mark.gpu, id=name))
    return pytest_params


EXACT = _params(("torch", "flat"), ("faiss", "flat"))
APPROXIMATE = _params(("faiss", "ivf"))
ALL = EXACT + APPROXIMATE


@dataclass(frozen=True)
class Bank:
    """References and queries in clusters that classes share unevenly, so that a voxel's class is a matter of degree."""

    num_classes: int = 3
    count: int = 6000
    width: int = 16
    seed: int = 0
    tables: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        centres = torch.randn(40, self.width, generator=random)
        share = torch.rand(40, self.num_classes, generator=random) ** 3  # of each cluster's rows a class has
        cluster = torch.randint(40, (self.count + 500,), generator=random)
        points = centres[cluster] + 0.5 * torch.randn(len(cluster), self.width, generator=random)
        points *= 0.5 + torch.rand(len(cluster), 1, generator=random)  # lengths differ, as embeddings' do
        classes = torch.multinomial(share[cluster], 1, generator=random)[:, 0]
        tables = (points[: self.count], classes[: self.count], points[self.count :])
        object.__setattr__(self, "tables", tables)


def similarities(queries: Tensor, embeddings: Tensor, similarity: str) -> Tensor:
    """[N, R] in float64: the oracle. Cosine, or minus the distance."""
    q, r = queries.to("cpu", F64), embeddings.to("cpu", F64)
    if similarity == "cosine":
        return functional.normalize(q, dim=1) @ functional.normalize(r, dim=1).T
    return -torch.cdist(q, r, compute_mode="donot_use_mm_for_euclid_dist")


def found_similarities(index: ReferenceIndex, queries: Tensor, embeddings: Tensor, k: int, similarity: str) -> Tensor:
    """The oracle's similarity of what the index found: [N, K, k]."""
    ids = index.find(queries, k)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(queries), index.num_classes, k)
    assert ids.device == queries.device
    return similarities(queries, embeddings, similarity).gather(1, ids.flatten(1).cpu()).view(ids.shape)


def best_similarities(
    queries: Tensor, embeddings: Tensor, classes: Tensor, k: int, num_classes: int, kind: str
) -> Tensor:
    """The k largest of every class, [N, K, k]: whoever finds these has found the nearest, whatever the ties."""
    everything = similarities(queries, embeddings, kind)
    return torch.stack([everything[:, classes == c].topk(k, dim=1).values for c in range(num_classes)], dim=1)


# What every index promises


@pytest.mark.parametrize("similarity", ["cosine", "euclid"])
@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("build", EXACT)
def test_exact_search_agrees_with_brute_force(build: Built, similarity: str, k: int) -> None:
    """Labels on >= 99.9 % of the queries, similarities to rounding, best first."""
    embeddings, classes, queries = Bank().tables
    index = build(embeddings, classes, 3, similarity=similarity)
    assert (index.backend, index.kind, index.device) == (build.backend, build.kind, build.device)
    assert (index.num_classes, index.width, index.count) == (3, 16, 6000)
    assert index.reason
    found = found_similarities(index, queries, embeddings, k, similarity)
    best = best_similarities(queries, embeddings, classes, k, 3, similarity)
    torch.testing.assert_close(found, best, atol=2e-6, rtol=0)
    assert (found.mean(2).argmax(1) == best.mean(2).argmax(1)).float().mean() >= 0.999


@pytest.mark.parametrize("similarity", ["cosine", "euclid"])
@pytest.mark.parametrize("build", APPROXIMATE)
def test_approximate_search_reports_recall_and_labels(
    build: Built, similarity: str, record_property: Callable[[str, object], None]
) -> None:
    embeddings, classes, queries = Bank(count=30_000).tables
    index = build(embeddings, classes, 3, similarity=similarity)
    found = found_similarities(index, queries, embeddings, 5, similarity)
    best = best_similarities(queries, embeddings, classes, 5, 3, similarity)
    recall = (found >= best[:, :, -1:] - 1e-6).float().mean().item()
    agreement = (found.mean(2).argmax(1) == best.mean(2).argmax(1)).float().mean().item()
    record_property("recall", recall)
    record_property("label_agreement", agreement)
    assert recall >= 0.97
    assert agreement >= 0.99


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("build", ALL)
def test_odd_shapes(build: Built, data: st.DataObject) -> None:
    """No queries, one reference a class, k all of a class, duplicates, ties, zeros, large offsets."""
    num_classes = data.draw(st.integers(1, 4), "classes")
    per_class = data.draw(
        st.lists(st.sampled_from([1, 2, 3, GROUP, 5 * GROUP + 1, 300]), min_size=num_classes, max_size=num_classes)
    )
    width = data.draw(st.sampled_from([1, 2, 16]), "width")
    k = data.draw(st.integers(1, min(per_class)), "k")
    similarity = data.draw(st.sampled_from(["cosine", "euclid"]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "seed"))
    classes = torch.cat([torch.full((n,), c) for c, n in enumerate(per_class)])
    classes = classes[torch.randperm(len(classes), generator=random)]
    draw = data.draw(st.sampled_from(["normal", "grid", "same", "offset"]))
    embeddings = torch.randn(len(classes), width, generator=random)
    queries = torch.randn(data.draw(st.sampled_from([0, 1, 3, 30]), "queries"), width, generator=random)
    if draw == "grid":  # many ties and zeros
        embeddings, queries = embeddings.round(), queries.round()
    if draw == "same":
        embeddings = embeddings[:1].repeat(len(classes), 1)
    if draw == "offset":
        embeddings, queries = embeddings + 100, queries + 100
    index = build(embeddings, classes, num_classes, similarity=similarity)
    ids = index.find(queries, k)
    for c in range(num_classes):
        assert bool((classes[ids[:, c]] == c).all())
        assert all(len(set(row)) == k for row in ids[:, c].tolist())
    found = found_similarities(index, queries, embeddings, k, similarity)
    best = best_similarities(queries, embeddings, classes, k, num_classes, similarity)
    torch.testing.assert_close(found, best, atol=1e-2 if draw == "offset" else 1e-4, rtol=0)


@pytest.mark.parametrize("build", APPROXIMATE)
def test_lists_that_hold_too_few_are_widened(build: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """One list looked into, and k every reference of the class: all of them come, each once, the best first."""
    monkeypatch.setattr(index_module, "PROBES", 1)
    monkeypatch.setattr(index_module, "IVF_ROWS", 100)
    embeddings, classes, queries = Bank(num_classes=2, count=600).tables
    k = int(classes.bincount().min())
    index = build(embeddings, classes)
    found = found_similarities(index, queries, embeddings, k, "cosine")
    best = best_similarities(queries, embeddings, classes, k, 2, "cosine")
    torch.testing.assert_close(found, best, atol=2e-6, rtol=0)


@pytest.mark.parametrize("build", ALL)
def test_what_a_step_hands_over(build: Built) -> None:
    """Gradient, autocast, inference mode, other dtypes and strides: the same ids, none of them with gradient."""
    embeddings, classes, queries = Bank(num_classes=2).tables
    index = build(embeddings.requires_grad_(), classes)
    expected = index.find(queries, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(index.find(queries.requires_grad_(), 5), expected)
    assert torch.equal(index.find(queries.double(), 5), expected)
    assert torch.equal(index.find(queries.detach().T.contiguous().T, 5), expected)
    with torch.inference_mode():
        assert torch.equal(build(embeddings * 1, classes).find(queries * 1, 5), expected)
    assert index.find(queries.bfloat16(), 5).shape == expected.shape


@pytest.mark.parametrize("build", ALL)
def test_threads_may_search_at_once(build: Built) -> None:
    embeddings, classes, queries = Bank(num_classes=2).tables
    index = build(embeddings, classes)
    expected = index.find(queries, 5)
    found: list[Tensor] = []
    searchers = [threading.Thread(target=lambda: found.append(index.find(queries, 5))) for _ in range(4)]
    for searcher in searchers:
        searcher.start()
    for searcher in searchers:
        searcher.join()
    assert len(found) == 4
    assert all(torch.equal(ids, expected) for ids in found)


def test_faiss_threads_are_put_back() -> None:
    faiss = pytest.importorskip("faiss")
    embeddings, classes, queries = Bank(num_classes=2).tables
    before = faiss.omp_get_max_threads()
    index = build_index(embeddings, classes, num_classes=2, backend="faiss", kind="ivf", threads=before + 1)
    index.find(queries, 5)
    assert faiss.omp_get_max_threads() == before
    with pytest.raises(ConfigError):
        index.find(queries, 10_000)
    assert faiss.omp_get_max_threads() == before


# The same index again


@pytest.mark.parametrize("build", ALL)
def test_saved_loaded_and_replicated_it_finds_the_same(build: Built, tmp_path: Path) -> None:
    embeddings, classes, queries = Bank(num_classes=2).tables
    index = build(embeddings, classes, similarity="euclid")
    expected = index.find(queries, 5)
    index.save(tmp_path)
    loaded = load_index(tmp_path, embeddings, classes, device=build.device)
    replica = deserialize(serialize(index), embeddings, classes, device=build.device)
    for again in (loaded, replica):
        assert (again.backend, again.kind, again.device) == (index.backend, index.kind, index.device)
        assert (again.num_classes, again.width, again.count) == (2, 16, 6000)
        assert torch.equal(again.find(queries, 5), expected)
        assert serialize(again) == serialize(index) == (tmp_path / "index.bin").read_bytes()


def test_building_depends_on_the_seed_and_not_on_threads() -> None:
    embeddings, classes, _ = Bank(num_classes=2).tables

    def build(seed: int, threads: int) -> bytes:
        return serialize(
            build_index(embeddings, classes, num_classes=2, backend="faiss", kind="ivf", seed=seed, threads=threads)
        )

    assert build(0, 1) == build(0, 2)
    assert build(0, 1) != build(1, 1)


def _saved(folder: Path) -> tuple[Path, Tensor, Tensor]:
    embeddings, classes, _ = Bank(num_classes=2).tables
    build_index(embeddings, classes, num_classes=2, backend="faiss", kind="ivf").save(folder)
    return folder / "index.bin", embeddings, classes


def _version(data: bytes) -> bytes:
    return data[:14] + struct.pack("<H", 2) + data[16:]


def _reseal(data: bytes, change: Callable[[dict[str, Tensor]], None]) -> bytes:
    """The index with other tensors and a right checksum: damage that only a check of contents finds."""
    header, tensors = index_bytes.unpack(data, where="")
    change(tensors)
    return index_bytes.pack(header, tensors)


def _replace(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[bytes], bytes]:
    return lambda data: _reseal(data, lambda tensors: tensors.update({name: value(tensors[name])}))


def _no_header(data: bytes) -> bytes:
    payload = safetensors.torch.save({"a": torch.zeros(1)})
    body = b"{}" + payload
    return data[:16] + struct.pack("<IQ32s", 2, len(payload), hashlib.sha256(body).digest()) + body


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda data: data[:0],
            "not a reference index, or cut short (got 0 bytes); build it again from its",
        ),
        (lambda data: data[:30], "not a reference index, or cut short (got 30 bytes)"),
        (lambda data: b"PK" + data, "not a reference index"),
        (_version, "reference index of another version (got 2); must be 1; build it again"),
        (lambda data: data[:-1], "reference index cut short (got "),
        (lambda data: data[: len(data) // 2], "reference index cut short (got "),
        (lambda data: data + b"\0", "must be "),
        (lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:], "does not match its checksum"),
        (lambda data: data[:80] + b"X" + data[81:], "does not match its checksum"),
        (_no_header, "unreadable reference index: KeyError: 'backend'"),
        (_replace("lists.0", lambda lists: lists + 10_000), "does not fit its table (got class 0)"),
        (_replace("lists.0", lambda lists: lists - 1), "does not fit its table (got class 0)"),
        (_replace("lists.1", lambda lists: lists[:-1]), "does not fit its table (got class 1)"),
        (_replace("lists.1", lambda lists: lists.float()), "does not fit its table (got class 1)"),
        (_replace("centroids.0", lambda centroids: centroids[:, :3]), "does not fit its table (got class 0)"),
        (_replace("centroids.0", lambda centroids: centroids / 0), "does not fit its table (got class 0)"),
        (lambda data: _reseal(data, lambda tensors: tensors.clear()), "does not fit its table (got class 0)"),
    ],
)
def test_a_file_that_is_not_sound_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    pytest.importorskip("faiss")
    file, embeddings, classes = _saved(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError) as error:
        load_index(tmp_path, embeddings, classes)
    assert says in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_another_table_or_none_is_refused(tmp_path: Path) -> None:
    _, embeddings, classes = _saved(tmp_path)
    for other in ((embeddings + 1e-6, classes), (embeddings, 1 - classes), (embeddings[:-1], classes[:-1])):
        with pytest.raises(DataError, match="reference index of another table; must be its own; build it again"):
            load_index(tmp_path, *other)
    with pytest.raises(DataError, match="cannot read the reference index: No such file or directory"):
        load_index(tmp_path / "nothing", embeddings, classes)


# Bad input: one line, with the fix


def _nan(rows: Tensor) -> Tensor:
    bad = rows.clone()
    bad[3, 1], bad[7, 0] = torch.nan, torch.inf
    return bad


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize(
    ("attempt", "kind", "says"),
    [
        (lambda i, q: i.find(q[:, :8], 1), DataError, "reference index (got shape [500, 8]); must be [N, 16]"),
        (lambda i, q: i.find(q[0], 1), DataError, "(got shape [16])"),
        (
            lambda i, q: i.find(q, 5),
            ConfigError,
            "(got k = 5); must be from 1 to 4, the references of class 1; lower k",
        ),
        (lambda i, q: i.find(q, 0), ConfigError, "cannot find that many references a class (got k = 0)"),
        (lambda i, q: i.find(_nan(q), 1), DataError, "row 3: query embeddings are not finite (got 2 of 500 rows with"),
        (lambda i, q: i.find(q * 1e19, 1), DataError, "NaN, infinity or a length over 1e+18); look at the loss"),
    ],
)
def test_bad_queries(
    build: Built, attempt: Callable[[ReferenceIndex, Tensor], object], kind: type[Exception], says: str
) -> None:
    embeddings, _, queries = Bank(count=100).tables
    index = build(embeddings, (torch.arange(100) < 4).long())
    with pytest.raises(kind) as error:
        attempt(index, queries)
    assert says in str(error.value)


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize(
    ("name", "change", "kind", "says"),
    [
        ("embeddings", _nan, DataError, "row 3: reference embeddings are not finite (got 2 of 100 rows"),
        ("classes", torch.zeros_like, DataError, "class without references (got class 1 of 2); every class needs"),
        ("classes", lambda c: c + 1, DataError, "of a class that is not there (got 2); must be from 0 to 1"),
        ("classes", lambda c: c[:9], DataError, "(got embeddings [100, 16], classes [9]); must be [R, E] and [R]"),
        ("embeddings", lambda e: e[:, :0], DataError, "reference table of the wrong shape"),
        ("similarity", lambda _: "dot", ConfigError, "no such similarity (got dot); must be one of cosine, euclid"),
    ],
)
def test_bad_tables(build: Built, name: str, change: Callable[[Any], Any], kind: type[Exception], says: str) -> None:
    table = {"embeddings": Bank(count=100).tables[0], "classes": (torch.arange(100) < 4).long()}
    with pytest.raises(kind) as error:
        build(**(table | {name: change(table.get(name))}))
    assert says in str(error.value)
