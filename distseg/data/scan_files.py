"""How many files each array of a scan has. A shard that is missing reads as zeros, and a copy of a store that stopped
half-way leaves scans that lack some: so a scan says how many there are, and who opens it counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from distseg.data.carry import files_below
from distseg.data.place import is_url

METADATA = "zarr.json"


def count_files(scan: Path) -> dict[str, int]:
    """Array's name -> its files beside the metadata, of a scan on this file system."""
    arrays = [file.parent for file in scan.rglob(METADATA) if json.loads(file.read_text())["node_type"] == "array"]
    return {array.relative_to(scan).as_posix(): _files(array) for array in sorted(arrays)}


def lacking(scan: Path, counted: Mapping[str, int]) -> dict[str, str]:
    """Array's name -> one line, of those that have fewer files than `counted`; {} for scans of before it was kept. One
    listing, where the scan is behind a URL."""
    listed = files_below(scan) if is_url(scan) and counted else []
    found = {
        name: sum(file.startswith(f"{name}/") and not file.endswith(METADATA) for file in listed)
        if is_url(scan)
        else _files(scan / name)
        for name in counted
    }
    return {name: f"{name}: {found[name]} of {n} files" for name, n in counted.items() if found[name] < n}


def _files(array: Path) -> int:
    return sum(name != METADATA for _, _, names in os.walk(array) for name in names)
