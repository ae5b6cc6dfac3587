"""How many files each array of a scan has. A shard that is missing reads as zeros, and a copy of a store that stopped
half-way leaves scans that lack some: so a scan says how many there are, and who opens it counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from distseg.data.carry import files_below
from distseg.data.place import is_url

METADATA = "zarr.json"


def count_files(scan: Path) -> dict[str, int]:
    """Array's name -> its files beside the metadata, of a scan on this file system."""
    arrays = [file.parent for file in scan.rglob(METADATA) if json.loads(file.read_text())["node_type"] == "array"]
    return {array.relative_to(scan).as_posix(): _files(array) for array in sorted(arrays)}


def lacking(scan: Path, counted: Mapping[str, int], names: Iterable[str] | None = None) -> str | None:
    """One line where an array (of `names`; None: any) has fewer files than `counted`; older scans do not say."""
    for name in counted if names is None else names:
        wanted = counted.get(name)
        found = wanted if wanted is None else _files(scan / name)
        if found is not None and wanted is not None and found < wanted:
            return f"{name}: {found} of {wanted} files"
    return None


def _files(array: Path) -> int:
    if is_url(array):
        return sum(not name.endswith(METADATA) for name in files_below(array))
    return sum(name != METADATA for _, _, names in os.walk(array) for name in names)
