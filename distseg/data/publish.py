"""A scan that was written beside the store becomes visible in it: whole, or not at all.

On a file system it is renamed into place. An object store cannot rename: the scan's zarr.json first says that it is not
complete, then come its arrays, then a zarr.json that says it is. Who stops in between leaves a scan that is not there.
It goes in the same order: a chunk that is missing reads as zeros, so no chunk goes before the scan says so.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from distseg.data.cohort import read_attrs
from distseg.data.place import folders, is_url, remove_folder, upload, write_text

METADATA = "zarr.json"


def put_in_place(staged: Path, final: Path) -> None:
    """`staged`, a local folder, becomes `final`; an older version of the scan goes first and is gone after."""
    if is_url(final):
        _put_behind_url(staged, final)
        return
    old = staged.with_name(f"{final.name}-old-{uuid.uuid4().hex[:8]}")
    if final.exists():
        os.rename(final, old)
    os.rename(staged, final)
    shutil.rmtree(old, ignore_errors=True)


def _put_behind_url(staged: Path, final: Path) -> None:
    complete = (staged / METADATA).read_text(encoding="utf-8")
    node = json.loads(complete)
    node["attributes"]["complete"] = False
    write_text(final / METADATA, json.dumps(node))
    _remove_arrays(final)
    (staged / METADATA).unlink()
    upload(staged, final)
    write_text(final / METADATA, complete)


def take_out(scan: Path) -> None:
    """A scan of the store goes, if it is there; on a file system rename it out of the store first. Who stops in between
    leaves one that says it is not complete, and the next call goes on."""
    if is_url(scan):
        attrs = read_attrs(scan)
        if attrs is not None:  # else it is nobody's scan already
            node = {"zarr_format": 3, "node_type": "group", "attributes": {**attrs, "complete": False}}
            write_text(scan / METADATA, json.dumps(node))
            _remove_arrays(scan)
    remove_folder(scan)


def _remove_arrays(scan: Path) -> None:
    """All but the scan's own metadata."""
    for part in folders(scan):
        remove_folder(part)
