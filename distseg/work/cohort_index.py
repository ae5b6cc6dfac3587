"""What only the driver writes: the index and the sources beside the store, and the lock that keeps out a second one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distseg.data.cohort import ScanRecord, beside, index_path, read_attrs, read_index, read_lines
from distseg.data.convert import record_of
from distseg.data.limits import needing_room
from distseg.data.place import folders, is_url, write_text
from distseg.data.publish import take_out
from distseg.data.scan_files import lacking
from distseg.errors import DataError
from distseg.work.line_file import write_lines
from distseg.work.owner import Owner, owning
from distseg.work.url_owner import owning_url

SCAN_ATTRS = frozenset(("ome", "sha256", "native", "stored", "foreground"))  # what ingest writes, and no one else


def write_attrs(group: Path, changes: Mapping[str, Any]) -> None:
    """`changes` into the attributes of a Zarr group, made if it is not there; atomically. Raises OSError, with nothing
    changed, where the storage does not say what is there."""
    group.mkdir(parents=True, exist_ok=True)
    write_text(group / "zarr.json", json.dumps(_group_node({**(read_attrs(group) or {}), **changes}), indent=2))


def _group_node(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


@dataclass(frozen=True)
class Reconciled:
    """The records that index and store now agree on, ids of the incomplete scans deleted, and what else lies in the
    store, untouched, as (folder's name, one line why); a scan that lacks files is among the records too."""

    records: dict[str, ScanRecord] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def reconcile(cohort: Path, *, trust_index: bool) -> Reconciled:
    """Make the index say what the store holds. Only a scan that is ours and says of itself that it is not complete is
    deleted: what cannot be read may be a good scan on a bad disk, or not ours.

    `trust_index`: a scan the index knows is not opened again (a resumed ingest); otherwise every scan is read (repair).
    So a replacement or removal that was cut off behind a URL is not noticed here: `convert_scan` looks before it leaves
    a scan as it is, and `Scan` refuses to open it.
    """
    before = read_index(cohort) if trust_index else {}
    found = Reconciled()
    records = found.records
    for folder in folders(cohort):
        # Behind a URL the question would be a request a scan.
        if folder.name in before and (is_url(folder) or (folder / "zarr.json").is_file()):
            records[folder.name] = before[folder.name]
            continue
        try:
            record = _stored_record(folder)
        except DataError as error:
            found.left.append((folder.name, str(error)))
            continue
        if record is not None:
            records[folder.name] = record
            for lacks in lacking(folder, (read_attrs(folder) or {}).get("files", {})).values():
                told = DataError("the scan is not all there", value=lacks, fix="copy the store or ingest it again")
                found.left.append((folder.name, str(told)))
        else:
            take_out(folder)
            found.dropped.append(folder.name)
    if not trust_index or records != before or not index_path(cohort).is_file():
        write_lines(index_path(cohort), (record.to_json() for _, record in sorted(records.items())))
    return found


def _stored_record(folder: Path) -> ScanRecord | None:
    """What a scan's own attributes say; None for a scan of ours that is incomplete. Raises DataError, in one line, for
    anything else."""
    fix = "move it out of the store; if it was a scan, ingest it again"
    try:
        node = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("left alone: no zarr.json in it", fix=fix) from error
    except OSError as error:
        what = "left alone: zarr.json is not readable"
        raise DataError(what, value=error.strerror, fix="see to the disk, then repair again") from error
    except ValueError as error:
        raise DataError("left alone: zarr.json is damaged", value=error, fix=fix) from error
    attrs = node.get("attributes") if isinstance(node, dict) and node.get("node_type") == "group" else None
    if not isinstance(attrs, dict) or not attrs.keys() >= SCAN_ATTRS:
        raise DataError("left alone: not a scan that distseg wrote", fix=fix)
    if attrs.get("complete") is not True:
        if folder.is_symlink():
            raise DataError("left alone: a link to an incomplete scan", fix=fix)
        return None
    try:
        return record_of(folder.name, attrs)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = "left alone: attributes of the scan are damaged"
        raise DataError(what, value=f"{type(error).__name__} {error}", fix=fix) from error


def read_sources(path: Path) -> dict[str, str]:
    """Scan id -> path of the image it came from."""
    return {str(line["id"]): str(line["image"]) for line in read_lines(path)}


@dataclass(frozen=True)
class Writing:
    """The cohort held for writing: `owner` says whether it still is; `staging` is an empty folder beside it, None
    behind a URL."""

    owner: Owner
    staging: Path | None


@contextlib.contextmanager
def writing(cohort: Path) -> Iterator[Writing]:
    """Hold the cohort for writing. Raises InputError while another does.

    COHORT.lock names the owner; see `distseg.work.owner` and `distseg.work.url_owner`.
    """
    if is_url(cohort):
        with owning_url(beside(cohort, "lock"), what="cohort", name=cohort) as theirs:
            yield Writing(theirs, None)
        return
    staging = beside(cohort, "staging")
    with contextlib.ExitStack() as held:
        held.enter_context(needing_room("on its disk", cohort))
        cohort.parent.mkdir(parents=True, exist_ok=True)
        owner = held.enter_context(owning(beside(cohort, "lock"), what="cohort", name=cohort))
        shutil.rmtree(staging, ignore_errors=True)  # what a killed owner left
        staging.mkdir()
        try:
            yield Writing(owner, staging)
        finally:
            if owner.is_mine():  # else it is another process's by now
                shutil.rmtree(staging, ignore_errors=True)
