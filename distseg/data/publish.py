"""A scan that was written beside the store becomes visible in it: whole, or not at all.

On a file system it is renamed into place. An object store cannot rename: the scan's zarr.json first says that it is not
complete, then come its arrays, then a zarr.json that says it is. Who stops in between leaves a scan that is not there.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

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
    for older in folders(final):
        remove_folder(older)
    (staged / METADATA).unlink()
    upload(staged, final)
    write_text(final / METADATA, complete)
