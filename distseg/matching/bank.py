"""A bank: one version of the reference table with an index over it, and what queries find there.

    FOLDER/bank.json    format and how it matches
    FOLDER/table.*      matching/references.py
    FOLDER/index.*      matching/index.py; absent where prototypes stand for the references

Shapes: N queries, K classes, k references found per class, E embedding width.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from distseg.config.schema import MatchingConfig
from distseg.config.untrusted import read_json
from distseg.errors import DataError
from distseg.matching.index import ReferenceIndex, build_index, deserialize, load_index, serialize
from distseg.matching.prototypes import NO_REFERENCES
from distseg.matching.references import ReferenceTable, load_table, save_table
from distseg.matching.similarity import class_scores, found_similarity, majority, pairwise_similarity

FORMAT = 1


class Finder(Protocol):
    """What searches: an index in this process, or a call to one that others share."""

    def find(self, queries: Tensor, k: int) -> Tensor:
        """[N, E] -> int64 [N, K, k] rows of the table, the most similar first."""


@dataclass(frozen=True, eq=False)
class Bank:
    """One version, ready for queries. `present`: bool [K] on the CPU; the index numbers the present classes alone, in
    order."""

    table: ReferenceTable
    finder: Finder
    present: Tensor
    k: int  # at most the references of the class that has fewest
    config: MatchingConfig
    chosen: str = ""  # how many references, and which index serves them and why

    @property
    def version(self) -> int:
        return self.table.version

    @property
    def step(self) -> int:
        return self.table.step

    def find(self, queries: Tensor) -> Tensor:
        """Rows of the k references of each present class most similar to each query: int64 [N, K present, k]."""
        return self.finder.find(queries.detach(), self.k)

    def similarities(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Of queries [N, E] to the rows found for them: [N, K present, k], with gradient to the queries."""
        references = self.table.embeddings[rows].to(queries.dtype)
        return found_similarity(queries, references, similarity=self.config.similarity)

    def scores(self, similarities: Tensor) -> Tensor:
        """[N, K present, k] -> [N, K], `NO_REFERENCES` for a class that has none."""
        present = class_scores(similarities, reduction=self.config.reduction, temperature=self.config.temperature)
        return _spread(present, self.present, NO_REFERENCES)

    def classes(self, similarities: Tensor) -> Tensor:
        """The class each query is matched to, int64 [N]: the highest score, or the majority of the k nearest of all."""
        if self.config.vote == "majority":
            winners = majority(similarities.detach())
            return torch.nonzero(self.present).flatten().to(winners.device)[winners]
        return self.scores(similarities.detach()).argmax(1)


class Matcher(Protocol):
    """What labels a query by references, after training: see `load_matcher`."""

    def match(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [N, E] -> class, int64 [N], and similarity to each class [N, K], higher the more alike."""


@dataclass(frozen=True, eq=False)
class BankMatcher:
    bank: Bank

    def match(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        similarities = self.bank.similarities(queries, self.bank.find(queries))
        return self.bank.classes(similarities), self.bank.scores(similarities)


@dataclass(frozen=True, eq=False)
class PrototypeMatcher:
    """All references of a class as one (METHOD trap 1), or each of them where similarity is not the mean cosine."""

    references: tuple[Tensor, ...]  # one [R_c, E] a class; none where a class has no references
    config: MatchingConfig

    def match(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.stack([self._score(queries, of_class) for of_class in self.references], 1)
        return scores.argmax(1), scores

    def _score(self, queries: Tensor, references: Tensor) -> Tensor:
        if not len(references):
            return queries.new_full((len(queries),), NO_REFERENCES)
        references = references.to(queries)
        if (self.config.similarity, self.config.reduction) == ("cosine", "mean"):
            prototype = functional.normalize(references, dim=1).mean(0)
            return functional.normalize(queries, dim=1) @ prototype
        pairs = pairwise_similarity(queries[None], references[None, None], similarity=self.config.similarity)
        return class_scores(pairs[0, :, 0], reduction=self.config.reduction, temperature=self.config.temperature)


def open_bank(
    table: ReferenceTable, config: MatchingConfig, *, num_classes: int, finder: Finder, reason: str = ""
) -> Bank:
    """A bank over `table`, searched by `finder`; `reason`: why by that one."""
    counts = table.counts(num_classes).cpu()
    present = counts > 0
    fewest = int(counts[present].min())
    k = min(config.k, fewest)
    fewer = f"; matching.k={config.k} is taken as {k}, all that the rarest class has" if k < config.k else ""
    chosen = f"{len(table.classes)} references of {len(table.scan_ids)} scans{fewer}; index: {reason}"
    return Bank(table, finder, present, k, config, chosen)


def build_bank_index(
    table: ReferenceTable, config: MatchingConfig, *, num_classes: int, seed: int, threads: int | None = None
) -> ReferenceIndex:
    """The index of a table's present classes."""
    dense = _dense_classes(table, num_classes)
    return build_index(
        table.embeddings,
        dense,
        num_classes=int(dense.max()) + 1,
        similarity=config.similarity,
        backend=config.backend,
        kind=config.index,
        device=_device_of(table, config),
        seed=seed,
        threads=threads,
    )


def save_bank(folder: Path, table: ReferenceTable, config: MatchingConfig, index: ReferenceIndex | None) -> None:
    """Write into a folder that exists; that it appears whole or not at all is the caller's part."""
    save_table(folder, table)
    if index is not None:
        index.save(folder)
    reason = index.reason if index is not None else "none: prototypes"
    content = {"format": FORMAT, "index": reason, "matching": dataclasses.asdict(config)}
    (folder / "bank.json").write_text(json.dumps(content, indent=1))


def load_bank(folder: Path, *, num_classes: int, device: torch.device, threads: int | None = None) -> Bank:
    """Raises DataError where there is none, or it is damaged or of another format."""
    config, table, reason = _read(folder, num_classes)
    table = table.to(device)
    dense = _dense_classes(table, num_classes)
    index = load_index(folder, table.embeddings, dense, device=_device_of(table, config), threads=threads)
    return open_bank(table, config, num_classes=num_classes, finder=index, reason=reason)


class BankParts(NamedTuple):
    """A bank as it travels between our own processes: what its index holds beside its table is small."""

    table: ReferenceTable  # on the CPU
    config: MatchingConfig
    serialized_index: bytes


def bank_parts(bank: Bank) -> BankParts:
    """Of a bank whose index is in this process."""
    index = cast(ReferenceIndex, bank.finder)
    return BankParts(bank.table.to(torch.device("cpu")), bank.config, serialize(index))


def bank_from_parts(parts: BankParts, *, num_classes: int, device: torch.device, threads: int | None = None) -> Bank:
    """The bank again; finds the same ids."""
    table = parts.table.to(device)
    dense, where = _dense_classes(table, num_classes), _device_of(table, parts.config)
    index = deserialize(parts.serialized_index, table.embeddings, dense, device=where, threads=threads)
    return open_bank(table, parts.config, num_classes=num_classes, finder=index)


def load_matcher(folder: Path, *, num_classes: int, device: torch.device, threads: int | None = None) -> Matcher:
    """What a saved bank labels queries with: the bank, or its references' prototypes. Raises DataError."""
    config, table, _ = _read(folder, num_classes)
    if config.kind == "prototypes":
        return PrototypeMatcher(tuple(table.embeddings[table.classes == c] for c in range(num_classes)), config)
    return BankMatcher(load_bank(folder, num_classes=num_classes, device=device, threads=threads))


def _read(folder: Path, num_classes: int) -> tuple[MatchingConfig, ReferenceTable, str]:
    """How it matches, its table, and why its index is the one it is."""
    file = folder / "bank.json"
    try:
        content = read_json(file, "bank")
        if content["format"] != FORMAT:
            raise DataError("bank of another format", where=file, value=content["format"], rule=f"must be {FORMAT}")
        config, reason = MatchingConfig(**content["matching"]), str(content["index"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"unreadable bank: {str(error)[:200]}", where=file) from error
    table = load_table(folder)
    if len(table.classes) and not 0 <= int(table.classes.min()) <= int(table.classes.max()) < num_classes:
        raise DataError("references of classes that there are not", where=folder, rule=f"{num_classes} classes")
    return config, table, reason


def _dense_classes(table: ReferenceTable, num_classes: int) -> Tensor:
    """Classes that have no reference left out, the others numbered without gaps: int64 [R]."""
    present = table.counts(num_classes) > 0
    return (torch.cumsum(present, 0) - 1)[table.classes]


def _device_of(table: ReferenceTable, config: MatchingConfig) -> str:
    """`auto`: the index lives where the table does."""
    return table.embeddings.device.type if config.device == "auto" else config.device


def _spread(values: Tensor, present: Tensor, fill: float) -> Tensor:
    """Columns of the present classes [N, K present] among all classes [N, K]."""
    if bool(present.all()):
        return values
    spread = values.new_full((len(values), len(present)), fill)
    spread[:, torch.nonzero(present).flatten()] = values
    return spread
