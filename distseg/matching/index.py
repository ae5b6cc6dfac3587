"""The reference index: which rows of the bank a query is most similar to, class by class. The only user of FAISS.

An index is one version of the bank, ready to be searched; it holds no gradient and never changes. It gives row ids of
the reference table; similarities with gradient to the queries are computed from those rows elsewhere.

| backend | kind | what it is |
|---|---|---|
| torch | flat | exact, CPU or GPU (index_torch.py) |
| faiss | flat | exact |
| faiss | ivf | the rows of the k-means lists nearest to the query; a class of few rows exactly |

FAISS loads on first use: forked processes with OpenMP in parent and child hang, so no data loader may fork after it.
FAISS on a GPU was never run by its authors: no GPU was at hand. `auto` does not choose it.

Shapes: N queries, E embedding width, R rows of the table, R_c those of class c, L lists, K classes, k found a class.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distseg.errors import ConfigError, DataError
from distseg.matching.index_bytes import REBUILD, Header, Lists, pack, read_index, unpack, write_index
from distseg.matching.index_choice import BACKEND_KEY, Choice, broken_faiss, check_faiss_packages, choose
from distseg.matching.index_contract import ReferenceIndex
from distseg.matching.index_rows import ClassRows, class_rows, table_digest
from distseg.matching.index_torch import TorchIndex

__all__ = ["FaissIndex", "ReferenceIndex", "build_index", "deserialize", "load_index", "serialize"]

PROBES = 16  # lists a search looks into: 99 % of the neighbours of real embeddings (tests/bench/RESULTS.md)
IVF_ROWS = 2048  # a class of fewer is searched exactly within an IVF index
_LISTS_PER_ROOT = 2  # L = 2 sqrt(R_c)
_ROWS_PER_LIST = 64  # that k-means trains on; FAISS's 256 take longer and find no more
_GPU_SCRATCH_NBYTES = 256 << 20  # FAISS takes 1.5 GB unless told
_GPU_MOST_FOUND = 2048  # FAISS's own limit on k there


@torch.no_grad()
def build_index(
    embeddings: Tensor,
    classes: Tensor,
    *,
    num_classes: int,
    similarity: str = "cosine",
    backend: str = "auto",
    kind: str = "auto",
    device: str = "auto",
    seed: int = 0,
    threads: int | None = None,
) -> ReferenceIndex:
    """Index a table: embeddings [R, E], classes int64 [R], rows in any order. The same table gives the same index.

    Args:
        similarity: "cosine" (rows and queries are brought to unit length here) or "euclid".
        device: "auto" is where `embeddings` are.
        seed: of IVF's k-means, which runs on one thread.
        threads: of a search in FAISS; None takes torch's number at each search, as the torch backend does.

    Raises ConfigError for a combination that is not there, DataError for a table that cannot be searched.
    """
    choice = _choose(embeddings, backend, kind, device)
    rows = class_rows(embeddings.to(choice.device), classes, num_classes=num_classes, similarity=similarity)
    digest = table_digest(embeddings, classes)
    header = Header(choice.backend, choice.kind, similarity, num_classes, PROBES, digest)
    if choice.backend == "torch":
        return TorchIndex(rows, header, reason=choice.reason)
    lists = {c: _train(rows.values[c], similarity, seed) for c in _classes_with_lists(rows, header)}
    return FaissIndex(rows, header, lists, reason=choice.reason, threads=threads)


def serialize(index: ReferenceIndex) -> bytes:
    """All of an index that its table does not hold, for replicas."""
    return index.to_bytes()


@torch.no_grad()
def deserialize(
    data: bytes,
    embeddings: Tensor,
    classes: Tensor,
    *,
    device: str = "auto",
    threads: int | None = None,
    where: object = "index",
) -> ReferenceIndex:
    """The index again, from `serialize`'s bytes and the table it was built from; it finds the same ids.

    Raises DataError where the bytes are of another version, cut short, damaged, or of another table; ConfigError where
    FAISS made them and is not installed here. `where` names the bytes in messages.
    """
    header, tensors = unpack(data, where=where)
    if header.table_sha256 != table_digest(embeddings, classes):
        raise DataError("reference index of another table", where=where, rule="must be its own", fix=REBUILD)
    choice = _choose(embeddings, header.backend, header.kind, device)
    values, similarity = embeddings.to(choice.device), header.similarity
    rows = class_rows(values, classes, num_classes=header.num_classes, similarity=similarity)
    reason = f"as saved; {choice.reason}"
    if choice.backend == "torch":
        return TorchIndex(rows, header, reason=reason)
    lists = {c: Lists.read(tensors, c, rows.values[c], where) for c in _classes_with_lists(rows, header)}
    return FaissIndex(rows, header, lists, reason=reason, threads=threads)


def load_index(
    folder: Path, embeddings: Tensor, classes: Tensor, *, device: str = "auto", threads: int | None = None
) -> ReferenceIndex:
    """The index that `ReferenceIndex.save` wrote, given its table. Raises as `deserialize` does."""
    return deserialize(read_index(folder), embeddings, classes, device=device, threads=threads, where=folder)


class FaissIndex:
    """One FAISS index a class; on a GPU under a lock, in bounded scratch memory. See `ReferenceIndex`."""

    backend = "faiss"

    def __init__(
        self, rows: ClassRows, header: Header, lists: dict[int, Lists], *, reason: str, threads: int | None
    ) -> None:
        self.num_classes, self.width, self.count = len(rows.ids), rows.width, rows.count
        self.kind, self.device, self.reason = header.kind, rows.device.type, reason
        self._header, self._lists, self._threads = header, lists, threads
        self._rows = rows.without_values()  # FAISS holds its own copy of them
        self._gpu = _Gpu(rows.device) if self.device == "cuda" else None
        on_cpu = [_faiss_index(values, rows.similarity, lists.get(c)) for c, values in enumerate(rows.values)]
        self._classes = on_cpu if self._gpu is None else [self._gpu.take(index) for index in on_cpu]

    @torch.no_grad()
    def find(self, queries: Tensor, k: int) -> Tensor:
        prepared = self._rows.prepare(queries, k).contiguous()
        found = prepared.new_empty((len(prepared), self.num_classes, k), dtype=torch.int64)
        for c, ids in enumerate(self._rows.ids):
            found[:, c] = ids[self._local(c, prepared, k)]
        return found.to(queries.device)

    def to_bytes(self) -> bytes:
        centroids = {f"centroids.{c}": lists.centroids for c, lists in self._lists.items()}
        return pack(self._header, centroids | {f"lists.{c}": lists.of_row for c, lists in self._lists.items()})

    def save(self, folder: Path) -> None:
        write_index(folder, self.to_bytes())

    def _local(self, c: int, queries: Tensor, k: int) -> Tensor:
        """Rows [N, k] within class c. Where the lists looked into hold fewer than k rows, more are looked into."""
        if c not in self._lists:
            return self._search(c, queries, k, None)
        probes = self._header.probes
        found = self._search(c, queries, k, probes)
        while probes < len(self._lists[c].centroids) and bool((short := (found < 0).any(1)).any()):
            probes *= 4
            found[short] = self._search(c, queries[short], k, probes)
        return found

    def _search(self, c: int, queries: Tensor, k: int, probes: int | None) -> Tensor:
        index, how = self._classes[c], None
        if probes is not None:
            how = _faiss().SearchParametersIVF(nprobe=min(probes, len(self._lists[c].centroids)))
        if self._gpu is not None:
            return self._gpu.search(index, queries, k, how)
        with _threads(self._threads or torch.get_num_threads()):
            return _search(index, queries, k, how)


class _Gpu:
    """FAISS on one GPU. Its resources and indexes are not thread-safe, even for reads: hence the lock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device.index if device.index is not None else torch.cuda.current_device()
        self._resources = _faiss().StandardGpuResources()
        self._resources.setTempMemory(_GPU_SCRATCH_NBYTES)
        self._lock = threading.Lock()

    def take(self, index: Any) -> Any:
        """A copy of a CPU index on the GPU."""
        return _faiss().index_cpu_to_gpu(self._resources, self._device, index)

    def search(self, index: Any, queries: Tensor, k: int, how: Any) -> Tensor:
        if k > _GPU_MOST_FOUND:
            rule, fix = f"FAISS finds at most {_GPU_MOST_FOUND} on a GPU", f"lower k, or set {BACKEND_KEY}=torch"
            raise ConfigError("cannot find that many references a class", value=f"k = {k}", rule=rule, fix=fix)
        # On torch's own stream: queries are there before the search, and ids before they are used.
        stream = _faiss().cast_integer_to_cudastream_t(torch.cuda.current_stream(self._device).cuda_stream)
        with self._lock:
            self._resources.setDefaultStream(self._device, stream)
            return _search(index, queries, k, how)


def _search(index: Any, queries: Tensor, k: int, how: Any) -> Tensor:
    """Rows [N, k], -1 where there is none, for contiguous float32 queries [N, E] on the index's device.

    By pointer, CPU and GPU alike: faiss.contrib.torch_utils would take tensors too, but it changes FAISS's classes for
    the whole process, and its search has no parameters.
    """
    faiss, shape = _faiss(), (len(queries), k)
    found = torch.empty(shape, dtype=torch.int64, device=queries.device)
    similarity = torch.empty(shape, dtype=torch.float32, device=queries.device)
    floats = [faiss.cast_integer_to_float_ptr(tensor.data_ptr()) for tensor in (queries, similarity)]
    index.search_c(len(queries), floats[0], k, floats[1], faiss.cast_integer_to_idx_t_ptr(found.data_ptr()), how)
    return found


def _choose(embeddings: Tensor, backend: str, kind: str, device: str) -> Choice:
    return choose(
        len(embeddings),
        backend=backend,
        kind=kind,
        device=device,
        table_device=embeddings.device.type,
        faiss_gpus=_faiss_gpus,
    )


def _classes_with_lists(rows: ClassRows, header: Header) -> list[int]:
    return [c for c, ids in enumerate(rows.ids) if header.kind == "ivf" and len(ids) >= IVF_ROWS]


def _train(values: Tensor, similarity: str, seed: int) -> Lists:
    """k-means of one class's rows [R_c, E], on one thread: other numbers of threads add up in another order."""
    faiss, rows = _faiss(), values.cpu().contiguous().numpy()
    clustering = faiss.ClusteringParameters()
    clustering.seed, clustering.niter, clustering.spherical = seed, 10, similarity == "cosine"
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, _ROWS_PER_LIST
    kmeans = faiss.Clustering(rows.shape[1], int(_LISTS_PER_ROOT * math.sqrt(len(rows))), clustering)
    quantizer = _flat(rows.shape[1], similarity)
    with _threads(1):
        kmeans.train(rows, quantizer)
        of_row = quantizer.assign(rows, 1)[:, 0]
    centroids = faiss.rev_swig_ptr(quantizer.get_xb(), quantizer.ntotal * quantizer.d).reshape(-1, quantizer.d).copy()
    return Lists(torch.from_numpy(centroids), torch.from_numpy(of_row).to(torch.int32))


def _faiss_index(values: Tensor, similarity: str, lists: Lists | None) -> Any:
    """A CPU index of one class's rows [R_c, E], by lists where given. The same arguments give the same index."""
    faiss, rows = _faiss(), values.cpu().contiguous().numpy()
    flat = _flat(rows.shape[1], similarity)
    if lists is None:
        flat.add(rows)
        return flat
    flat.add(lists.centroids.numpy())
    index = faiss.IndexIVFFlat(flat, rows.shape[1], flat.ntotal, flat.metric_type)
    of_row = lists.of_row.to(torch.int64).numpy()
    with _threads(1):
        index.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(of_row))
    return index


def _flat(width: int, similarity: str) -> Any:
    faiss = _faiss()
    return faiss.IndexFlatIP(width) if similarity == "cosine" else faiss.IndexFlatL2(width)


def faiss_module() -> Any:
    """The module as it is; what Python raises where it is missing or broken is the caller's to explain."""
    import faiss

    return faiss


def _faiss() -> Any:
    """The module, loaded on first use. Raises ConfigError where its installation is broken."""
    try:
        faiss = faiss_module()
    except ImportError as error:
        raise broken_faiss(error) from error
    if not hasattr(faiss, "IndexFlatIP"):  # a folder that another package's removal left behind
        raise broken_faiss("the module faiss is empty")
    return faiss


@cache
def _faiss_gpus() -> int | None:
    """GPUs that FAISS sees; None where it is not installed. Looked up once a process, for it takes 60 ms.

    Raises ConfigError for a broken installation.
    """
    check_faiss_packages()
    if importlib.util.find_spec("faiss") is None:
        return None
    return int(_faiss().get_num_gpus())


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """FAISS's OpenMP threads for this block. The setting belongs to the calling thread alone, and is put back."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
