"""The ledger of a labelling behind a URL, where nothing can be renamed or appended to.

A worker puts both files of a scan under their names, each whole or not at all; the scan is done with its line. Lines
come in pieces, OUT/ledger/0000000.jsonl and on, each put anew with every line until it is full; each start begins a
piece of its own. A scan without a line is labelled again, over what is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.data.carry import write_file
from distseg.data.label_output import FORMAT, PIECES, committed, is_begun, pieces, read_ledger
from distseg.data.place import is_url
from distseg.work.ledger import Ledger, check_output

PIECE_LINES = 100  # some 100 kB: little to put with each line, and 10 000 pieces for a million scans


def open_ledger(output: Path, identity: Mapping[str, Any], cohort: str) -> Ledger:
    """That of OUT, on this file system or behind a URL. Raises as they do."""
    return (UrlLedger if is_url(output) else Ledger)(output, identity, cohort)


class UrlLedger(Ledger):
    """`staging` is OUT itself. All waits for a store that is away, see data/carry.py, and raises InputError where it
    stays away."""

    def __init__(self, output: Path, identity: Mapping[str, Any], cohort: str) -> None:
        self._output, self.staging = output, str(output)
        self._piece: list[bytes] = []
        there, new = pieces(output), not is_begun(output)
        self._number = int(there[-1].removesuffix(".jsonl")) + 1 if there else 0
        check_output(output, identity, new=new)
        whole = committed(output)
        lines = (line for line in read_ledger(output) if line.get("done") in whole)
        self.versions = {line["done"]: line["version"] for line in lines}
        if new:
            self._append({"format": FORMAT, "identity": dict(identity), "cohort": cohort})

    def commit(self, scan_id: str, version: str, facts: Mapping[str, Any]) -> None:
        """Make a scan done whose files are there."""
        self._append({"done": scan_id, "version": version, **facts})

    def close(self) -> None:
        """Every line is there already."""

    def _append(self, line: Mapping[str, Any]) -> None:
        if len(self._piece) == PIECE_LINES:
            self._piece, self._number = [], self._number + 1
        self._piece.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        write_file(self._output / PIECES / f"{self._number:07d}.jsonl", b"".join(self._piece))
