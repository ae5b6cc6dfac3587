"""The reference service on Ray: one actor a run owns the bank, all workers share it.

Each worker embeds its share of a version and offers it; the owner joins the shares, builds the index and writes both
into RUN/bank. A worker then searches (`matching.placement`): `replica`, its own copy, which travels once through the
object store; `per_node`, an actor on its node, which holds the copy; `shared`, the owner. Same ids from all three.

The owner holds nothing that is not on disk or can be offered again: when it dies Ray starts it anew, it reads RUN/bank,
and workers that wait for a version whose shares it has lost offer theirs again.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from distseg.config.compose import from_plain, to_plain
from distseg.config.schema import TrainRunConfig
from distseg.errors import RunMismatchError, WorkersLostError
from distseg.matching.bank import Bank, BankParts, bank_from_parts, bank_parts, open_bank
from distseg.matching.references import join
from distseg.training.bank_builder import Piece
from distseg.training.bank_folder import BankFolder, ServiceSettings
from distseg.training.remote_run import run_directory

NAMESPACE = "distseg"
KEPT_VERSIONS = 3  # in the memory of an actor: the one in use, the next, and the one that is being built
_POLL_S = 0.02
_CONCURRENT_CALLS = 16
Share = list[tuple[int, int, npt.NDArray[np.float32], npt.NDArray[np.int64]]]


class _Versions:
    """Banks in an actor's memory, the newest few; `load` brings one that is not there."""

    def __init__(self) -> None:
        self._banks: dict[int, Bank] = {}
        self._lock = threading.Lock()

    def get(self, version: int, load: Callable[[int], Bank]) -> Bank:
        with self._lock:
            if version not in self._banks:
                self._banks[version] = load(version)
                for old in sorted(self._banks)[:-KEPT_VERSIONS]:
                    del self._banks[old]
            return self._banks[version]

    def clear(self) -> None:
        with self._lock:
            self._banks.clear()


class IndexOwner:
    """The actor that owns the bank of one run. Methods run in threads, side by side."""

    def __init__(self, plain: dict[str, Any], num_classes: int, scan_ids: tuple[str, ...]) -> None:
        config = from_plain(plain, TrainRunConfig)
        run = run_directory(config.run)  # this machine's, of a run behind a URL
        self._folder = BankFolder(run.path / "bank", config, num_classes=num_classes, behind=run.behind("bank"))
        self._folder.fetch()
        self._scan_ids = scan_ids
        self._life = uuid.uuid4().hex
        self._shares: dict[int, dict[int, Share]] = {}
        self._world_size = 0
        self._published: dict[int, Any] = {}
        self._versions = _Versions()
        self._lock = threading.Lock()

    def offer(self, version: int, step: int, share: Share, rank: int, world_size: int) -> None:
        """Take a rank's share; with the last one the version is built and written."""
        with self._lock:
            if self._folder.has(version):
                return
            if world_size != self._world_size:  # the group was started again with fewer or more workers
                self._shares, self._world_size = {}, world_size
            shares = self._shares.setdefault(version, {})
            shares[rank] = share
            if len(shares) < world_size:
                return
            pieces: list[Piece] = [
                (number, scan, torch.from_numpy(embeddings.copy()), torch.from_numpy(classes.copy()))
                for of_rank in shares.values()
                for number, scan, embeddings, classes in of_rank
            ]
            self._folder.write(join(version, step, pieces, self._scan_ids))
            del self._shares[version]

    def ready(self, version: int) -> tuple[bool, str]:
        """Whether a version is on disk, and which life of this actor says so: another one has lost its shares."""
        return self._folder.has(version), self._life

    def missing(self, version: int) -> list[int]:
        """Ranks whose shares a version waits for."""
        with self._lock:
            there = self._shares.get(version, {})
            return [] if self._folder.has(version) else [r for r in range(self._world_size) if r not in there]

    def fetch(self, version: int) -> list[Any]:
        """A reference to the parts of a bank, put into the object store once. In a list, lest Ray resolve it."""
        with self._lock:
            if version not in self._published:
                self._published[version] = ray.put(bank_parts(self._bank(version)))
                for old in sorted(self._published)[:-KEPT_VERSIONS]:
                    del self._published[old]
            return [self._published[version]]

    def find(self, version: int, queries: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
        return self._bank(version).finder.find(torch.from_numpy(queries.copy()), k).numpy()

    def chosen(self, version: int) -> str | None:
        """What this version's index is, and why, for the log; None where the version has gone, as who asks is late."""
        with self._lock:  # lest it goes between the two
            return self._bank(version).chosen if self._folder.has(version) else None

    def discard(self, before: int | None, after: int | None) -> None:
        with self._lock:
            self._shares, self._published = {}, {}
            self._versions.clear()
            self._folder.discard(before=before, after=after)

    def _bank(self, version: int) -> Bank:
        return self._versions.get(version, lambda v: self._folder.read(v, torch.device("cpu")))


class NodeIndex:
    """The actor that searches for the workers of one node, from a copy of the owner's bank."""

    def __init__(self, owner: Any, num_classes: int) -> None:
        self._owner, self._num_classes = owner, num_classes
        self._versions = _Versions()

    def find(self, version: int, queries: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
        bank = self._versions.get(version, lambda v: fetched(self._owner, v, self._num_classes, torch.device("cpu")))
        return bank.finder.find(torch.from_numpy(queries.copy()), k).numpy()


class RemoteFinder:
    """An index elsewhere, searched by call."""

    def __init__(self, actor: Any, version: int) -> None:
        self._actor, self._version = actor, version

    def find(self, queries: Tensor, k: int) -> Tensor:
        asked = queries.detach().float().cpu().numpy()
        ids: npt.NDArray[np.int64] = ray.get(self._actor.find.remote(self._version, asked, k))
        return torch.from_numpy(ids.copy()).to(queries.device)


class RayReferences:
    """A worker's side of the service; `distseg.training.bank.ReferenceService`."""

    def __init__(self, asked: ServiceSettings) -> None:
        self._folder, self._config, self._num_classes = asked.folder, asked.config, asked.num_classes
        self._communicator, self._device = asked.communicator, asked.device
        self._owner: Any = ray.get_actor(owner_name(asked.config.run), namespace=NAMESPACE)
        self._pending: dict[int, tuple[int, Share]] = {}
        self._offered_to: dict[int, str] = {}
        self._calls: dict[int, Any] = {}
        self._node_index: Any = None

    def has(self, version: int) -> bool:
        there: bool = ray.get(self._owner.ready.remote(version))[0]
        return there

    def offer(self, version: int, step: int, pieces: list[Piece]) -> None:
        share = [(number, scan, embeddings.numpy(), classes.numpy()) for number, scan, embeddings, classes in pieces]
        self._pending[version] = (step, share)
        self._send(version)

    def take(self, version: int) -> Bank:
        self._wait(version)
        placement = self._config.matching.placement
        bank = fetched(self._owner, version, self._num_classes, self._device)
        if placement == "replica":
            return bank
        actor = self._owner if placement == "shared" else self._on_this_node()
        return open_bank(bank.table, bank.config, num_classes=self._num_classes, finder=RemoteFinder(actor, version))

    def settle(self, version: int) -> None:
        self._wait(version)
        for done in [v for v in self._pending if v <= version]:
            del self._pending[done]
            self._calls.pop(done, None)

    def discard(self, *, before: int | None = None, after: int | None = None) -> None:
        ray.get(self._owner.discard.remote(before, after))

    def _send(self, version: int) -> None:
        step, share = self._pending[version]
        self._offered_to[version] = ray.get(self._owner.ready.remote(version))[1]
        c = self._communicator
        self._calls[version] = self._owner.offer.remote(version, step, share, c.rank, c.world_size)

    def _wait(self, version: int) -> None:
        """Until a version is on disk. A call to an owner that has died waits until Ray has started it again.

        Raises WorkersLostError where other workers do not offer their shares.
        """
        timeout_s = self._config.train.worker_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            there, life = ray.get(self._owner.ready.remote(version))
            if there:
                return
            if version not in self._pending:
                self._folder.read(version, self._device)  # says what is missing
            if life != self._offered_to.get(version):
                self._send(version)
            if ray.wait([self._calls[version]], timeout=0)[0]:
                ray.get(self._calls[version])  # raises what went wrong in the owner, such as a full disk
            if time.monotonic() > deadline:  # an owner that is still building misses nobody
                lost = ray.get(self._owner.missing.remote(version))
                if lost:
                    raise WorkersLostError(lost, f"bank version {version} has waited {timeout_s} s for its share")
                deadline = time.monotonic() + timeout_s
            time.sleep(_POLL_S)

    def _on_this_node(self) -> Any:
        """The node's actor, made by the first who asks; held, for it ends with the last handle of its maker."""
        if self._node_index is None:
            self._node_index = self._make_node_index()
        return self._node_index

    def _make_node_index(self) -> Any:
        node = ray.get_runtime_context().get_node_id()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        actor: Any = ray.remote(NodeIndex)
        return actor.options(
            name=f"{owner_name(self._config.run)}-{node}",
            namespace=NAMESPACE,
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=_CONCURRENT_CALLS,
            scheduling_strategy=here,
        ).remote(self._owner, self._num_classes)


def start_owner(config: TrainRunConfig, *, num_classes: int, scan_ids: tuple[str, ...]) -> Any:
    """Start the actor that owns the bank of `config.run`; it lives as long as its driver. Driver only.

    It takes no CPU of its own: it works while workers wait for it, or for a moment beside them.
    """
    actor: Any = ray.remote(IndexOwner)
    try:
        owner = actor.options(
            name=owner_name(config.run),
            namespace=NAMESPACE,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=_CONCURRENT_CALLS,
        ).remote(to_plain(config), num_classes, scan_ids)
    except ValueError as error:  # Ray's, for a name that is taken
        raise RunMismatchError(
            "another driver trains this run on the same cluster", where=config.run, fix="wait for it, or stop it"
        ) from error
    ray.get(owner.ready.remote(0))
    return owner


def owner_name(run: str) -> str:
    return f"index-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def fetched(owner: Any, version: int, num_classes: int, device: torch.device) -> Bank:
    """A copy of the owner's bank, on `device`."""
    (reference,) = ray.get(owner.fetch.remote(version))
    parts: BankParts = ray.get(reference)
    return bank_from_parts(parts, num_classes=num_classes, device=device)
