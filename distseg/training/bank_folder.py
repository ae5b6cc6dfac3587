"""RUN/bank, and the reference service of a run without Ray.

RUN/bank/v_0003/   matching/bank.py; written under a temporary name, then renamed

Of a run behind a URL each version is there before it has its name here, and others fetch it from there.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from distseg.config.schema import TrainRunConfig
from distseg.data.carry import alone, files_below, get_folder, marked, put_folder, read_file, take_out
from distseg.data.keys import Purpose, torch_seed
from distseg.errors import DataError
from distseg.matching.bank import Bank, build_bank_index, load_bank, open_bank, save_bank
from distseg.matching.references import ReferenceTable, join
from distseg.training.bank_builder import Piece
from distseg.training.reduce import Communicator

_MARKER = "bank.json"
_NAME = re.compile(r"v_\d{4,9}")


class BankFolder:
    """Versions on disk, each whole or not there. `behind`: the same folder behind a URL, if any."""

    def __init__(self, root: Path, config: TrainRunConfig, *, num_classes: int, behind: Path | None = None) -> None:
        self._root, self._config, self._num_classes, self._behind = root, config, num_classes, behind

    def has(self, version: int) -> bool:
        return (self._folder(version) / _MARKER).is_file()

    def fetch(self) -> None:
        """Where there is a URL: the versions that it has, and no others."""
        if self._behind is None:
            return
        with alone(self._root):
            there = [name for name in marked(files_below(self._behind), _MARKER) if _NAME.fullmatch(name)]
            for folder in self._root.glob("v_*"):
                same = folder.name in there and (folder / _MARKER).is_file()
                if not same or (folder / _MARKER).read_bytes() != read_file(self._behind / folder.name / _MARKER):
                    shutil.rmtree(folder)
            for name in there:
                if not (self._root / name).exists():
                    get_folder(self._behind / name, self._root / name)

    def write(self, table: ReferenceTable) -> Bank:
        """Build the index of a version and write both. One process a run at a time."""
        matching = self._config.matching
        seed = torch_seed(self._config.seed, Purpose.BANK_INDEX, table.version) % 2**31
        index = build_bank_index(
            table, matching, num_classes=self._num_classes, seed=seed, threads=torch.get_num_threads()
        )
        final = self._folder(table.version)
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_bank(partial, table, matching, index)
        if self._behind is not None:
            put_folder(partial, self._behind / final.name, marker=_MARKER)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        return open_bank(table, matching, num_classes=self._num_classes, finder=index)

    def read(self, version: int, device: torch.device) -> Bank:
        """Raises DataError where the version is not there or damaged."""
        if not self.has(version):
            self.fetch()
        if not self.has(version):
            raise DataError(
                f"bank version {version} is not there",
                where=self._folder(version) if self._behind is None else self._behind,
                rule="the step to go on from uses it",
                fix="restore it, or take another run= directory and start again",
            )
        return load_bank(
            self._folder(version), num_classes=self._num_classes, device=device, threads=torch.get_num_threads()
        )

    def discard(self, *, before: int | None = None, after: int | None = None) -> None:
        def goes(name: str) -> bool:
            version = int(name.removeprefix("v_"))
            return (before is not None and version < before) or (after is not None and version > after)

        if self._behind is not None:
            for name in {name.split("/")[0] for name in files_below(self._behind)}:
                if _NAME.fullmatch(name) and goes(name):
                    take_out(self._behind / name, marker=_MARKER)
        for folder in self._root.glob("v_*"):
            if goes(folder.name):
                shutil.rmtree(folder)

    def _folder(self, version: int) -> Path:
        return self._root / f"v_{version:04d}"


@dataclass(frozen=True)
class ServiceSettings:
    """What a reference service of one rank is made with, whoever runs it."""

    folder: BankFolder
    config: TrainRunConfig
    scan_ids: tuple[str, ...]
    num_classes: int
    width: int  # of an embedding
    communicator: Communicator
    device: torch.device


class LocalReferences:
    """The service without Ray: ranks exchange their shares in one all-reduce, and rank 0 writes what all then read."""

    def __init__(self, asked: ServiceSettings) -> None:
        self._folder, self._communicator, self._device = asked.folder, asked.communicator, asked.device
        self._scan_ids = asked.scan_ids
        references = asked.config.references
        self._buffer_shape = (references.patches, references.per_patch, asked.width + 2)
        if self._communicator.rank == 0:
            self._folder.fetch()

    def has(self, version: int) -> bool:
        """Rank 0's answer, as machines may have folders of their own."""
        answer = torch.tensor(float(self._communicator.rank == 0 and self._folder.has(version)), device=self._device)
        self._communicator.all_reduce_sum(answer)
        return bool(answer)

    def offer(self, version: int, step: int, pieces: list[Piece]) -> None:
        """A barrier."""
        table = join(version, step, self._exchange(pieces), self._scan_ids)
        if self._communicator.rank == 0:
            self._folder.write(table)
        self._communicator.barrier()

    def take(self, version: int) -> Bank:
        return self._folder.read(version, self._device)

    def settle(self, version: int) -> None:
        """`offer` has waited already."""

    def discard(self, *, before: int | None = None, after: int | None = None) -> None:
        self._folder.discard(before=before, after=after)

    def _exchange(self, pieces: list[Piece]) -> list[Piece]:
        """All ranks' pieces: each writes its own rows of a buffer of zeros, whose sum over ranks is exact."""
        if self._communicator.world_size == 1:
            return pieces
        buffer = torch.zeros(self._buffer_shape, device=self._device)
        for number, scan, embeddings, classes in pieces:
            rows = buffer[number, : len(classes)]
            rows[:, 0], rows[:, 1] = scan, (classes + 1).to(rows)
            rows[:, 2:] = embeddings.to(rows)
        self._communicator.all_reduce_sum(buffer)
        buffer = buffer.cpu()
        gathered: list[Piece] = []
        for number, rows in enumerate(buffer):
            rows = rows[rows[:, 1] > 0]
            if len(rows):
                gathered.append((number, int(rows[0, 0]), rows[:, 2:].clone(), rows[:, 1].long() - 1))
        return gathered
