"""OUT/.distseg.json: what made each mask of a folder, so that a call keeps its own and never replaces another's.

Of each mask: digest of the model, network, overlap, label's rule, SHA-256 of the input.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.errors import InputError
from distseg.work.predict_inputs import Input

RECORD = ".distseg.json"
RECORDED = ("model", "network", "overlap", "components", "label", "input_sha256")


def refuse_others_masks(existing: Mapping[Path, Input], made_by: Mapping[str, Any], record: Path | None) -> None:
    """Raises InputError where a mask to write exists and is not on record as what this call writes."""
    if not existing:
        return
    fix = "choose another output= or remove it"
    if record is None:
        raise InputError("the output exists already", where="output", value=next(iter(existing)), fix=fix)
    masks = read_record(record)
    for mask, one in existing.items():
        entry = masks.get(mask.name)
        if entry is None:
            rule = f"{RECORD} does not say what made it"
        else:
            wanted = {**made_by, "input_sha256": one.image.sha256()}
            other = [name for name in RECORDED if entry.get(name) != wanted[name]]
            if not other:
                continue
            rule = f"{RECORD} says that it differs in {', '.join(other)}"
        what = "a mask exists already and is not what this call would write"
        raise InputError(what, where="output", value=mask, rule=rule, fix=fix)


def read_record(record: Path) -> dict[str, dict[str, Any]]:
    """Mask's name -> its entry; {} without a record. Raises InputError for one that cannot be read or understood."""
    fix = "choose another output="
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError("not readable", where=record, value=error.strerror, fix=fix) from error
    except ValueError as error:
        raise InputError("not readable as JSON", where=record, value=error, fix=fix) from error
    masks = content.get("masks", {}) if isinstance(content, dict) else None
    if not isinstance(masks, dict) or not all(isinstance(entry, dict) for entry in masks.values()):
        raise InputError("not a record of masks", where=record, fix=fix)
    return masks


def add_to_record(record: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Atomic, and read again each time: other calls may write other masks into the same folder."""
    temporary = record.with_name(f"{record.name}.{uuid.uuid4().hex[:8]}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"masks": {**read_record(record), **entries}}, indent=1)
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, record)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write there: {error.strerror}", where="output", value=record.parent) from error
