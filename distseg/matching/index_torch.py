"""Exact search in torch, on a CPU or a GPU: the index without FAISS, and the faster exact one on a CPU.

Selecting the k best of a row of R similarities costs more than computing it. So rows are taken in groups of `GROUP`
consecutive ones: the k groups of largest maximum contain k rows as similar as any (a row outside them is no better
than k group maxima), and only their k x GROUP rows are looked at one by one. Exact, and the [N, R] matrix is never
held. Measured against the plain product and top-k and against FAISS's exact search: tests/bench/RESULTS.md.

Never run on a GPU by its authors yet.

Shapes: N queries, R_c rows of a class, E embedding width, K classes, k found a class, G rows a group.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distseg.matching.index_bytes import Header, pack, write_index
from distseg.matching.index_rows import ClassRows

GROUP = 16  # rows; 8 to 32 are within 10 % of each other
# Similarities held at once, [rows, queries]: fits a core's second-level cache, or fills a GPU.
_BLOCK = {"cpu": (2048, 256), "cuda": (65536, 1024)}
_REFINE = {"cpu": 1 << 20, "cuda": 1 << 26}  # floats of candidate embeddings held at once


class TorchIndex:
    """A table searched exactly where it lies. See `ReferenceIndex`."""

    backend, kind = "torch", "flat"

    def __init__(self, rows: ClassRows, header: Header, *, reason: str) -> None:
        self.num_classes, self.width, self.count = len(rows.ids), rows.width, rows.count
        self.device, self.reason = rows.device.type, reason
        self._header = header
        self._classes = [
            _Class(values, ids, rows.similarity) for values, ids in zip(rows.values, rows.ids, strict=True)
        ]
        self._rows = rows.without_values()

    @torch.no_grad()
    def find(self, queries: Tensor, k: int) -> Tensor:
        # A caller's autocast would turn the products into bfloat16, whose eight bits do not tell neighbours apart.
        with torch.autocast(self.device, enabled=False):
            prepared = self._rows.prepare(queries, k)
            found = torch.stack([references.find(prepared, k) for references in self._classes], dim=1)
        return found.to(queries.device)

    def to_bytes(self) -> bytes:
        return pack(self._header, {})  # the table is all there is

    def save(self, folder: Path) -> None:
        write_index(folder, self.to_bytes())


class _Class:
    """The references of one class."""

    def __init__(self, values: Tensor, ids: Tensor, similarity: str) -> None:
        self._euclid = similarity == "euclid"
        if self._euclid:  # q.x - |x|^2 / 2 orders rows as -|q - x|^2 does; the second term is one more column
            values = torch.cat([values, -values.square().sum(1, keepdim=True) / 2], dim=1)
        padding = values[-1:].expand(-len(values) % GROUP, -1)  # in the last group, whose maximum it leaves as it is
        self._values = torch.cat([values, padding]).contiguous()
        self._count, self._ids = len(ids), ids

    def find(self, queries: Tensor, k: int) -> Tensor:
        """Row ids [N, k] of the table, for queries [N, E]."""
        if self._euclid:
            queries = torch.cat([queries, torch.ones_like(queries[:, :1])], dim=1)
        by_group = self._count >= 4 * k * GROUP
        rows_a_block, queries_a_block = _BLOCK[queries.device.type]
        size = max(1, _REFINE[queries.device.type] // (k * GROUP * queries.shape[1])) if by_group else queries_a_block
        found = queries.new_empty((len(queries), k), dtype=torch.int64)
        for first in range(0, len(queries), queries_a_block):
            some = queries[first : first + queries_a_block]
            if by_group:
                groups = self._best_groups(some, k, rows_a_block)
                parts = zip(torch.split(some, size), torch.split(groups, size), strict=True)
                local = torch.cat([self._best_of(q, g, k) for q, g in parts])
            else:
                local = (some @ self._values[: self._count].T).topk(k, dim=1).indices
            found[first : first + len(some)] = self._ids[local]
        return found

    def _best_groups(self, queries: Tensor, k: int, rows_a_block: int) -> Tensor:
        """The k groups [N, k] of largest maximum."""
        maxima = []
        scratch = queries.new_empty((rows_a_block, len(queries)))
        for rows in torch.split(self._values, rows_a_block):
            similarity = torch.mm(rows, queries.T, out=scratch[: len(rows)])  # [rows, N]: groups are then contiguous
            maxima.append(similarity.view(-1, GROUP, len(queries)).amax(1))
        return torch.cat(maxima).T.contiguous().topk(k, dim=1, sorted=False).indices

    def _best_of(self, queries: Tensor, groups: Tensor, k: int) -> Tensor:
        """The k best rows [N, k] of the class among those of each query's groups [N, k]."""
        local = (groups[:, :, None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)  # [N, k G]
        candidates = self._values.view(-1, GROUP, self._values.shape[1])[groups].flatten(1, 2)  # [N, k G, E]
        similarity = torch.bmm(candidates, queries[:, :, None])[:, :, 0]
        similarity.masked_fill_(local >= self._count, -torch.inf)
        return local.gather(1, similarity.topk(k, dim=1).indices)
