"""`distseg doctor launcher=local`: this machine, without Ray. Findings come as they are made, so that a check which
hangs is the one after the last line shown."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from distseg.config.verbs import DoctorConfig
from distseg.work.doctor_checks import (
    Finding,
    check_devices,
    check_disk,
    check_faiss,
    check_reader,
    check_round_trip,
    check_shared_memory,
    check_storage,
    check_versions,
)
from distseg.work.node_facts import Disk, gather_facts
from distseg.work.node_probes import local_round_trip, read_probe, write_probe


def examine_machine(config: DoctorConfig) -> Iterator[Finding]:
    """One finding a check. `config.storage` is absolute."""
    facts = gather_facts()
    nodes = [facts]
    yield check_versions(nodes)
    yield check_devices(nodes, gpus_per_worker=config.resources.gpus_per_worker)
    yield check_faiss(nodes)
    yield check_reader(nodes)
    yield check_shared_memory(nodes, object_store_gib={})
    yield _check_storage(config)
    yield check_disk({facts.node: [disk_of(config.storage), facts.temporary]})
    try:
        yield check_round_trip("two processes", local_round_trip())
    except RuntimeError as error:
        yield check_round_trip("two processes", str(error))
    yield Finding("clocks", "ok", "one machine")
    yield Finding("authentication", "ok", "launcher=local starts no Ray and opens no port")


def disk_of(storage: str) -> Disk:
    """Of the storage, or of what is above it where it does not exist (which the storage check tells)."""
    folder = Path(storage)
    while not folder.exists():
        folder = folder.parent
    return Disk.under(folder)


def _check_storage(config: DoctorConfig) -> Finding:
    folder = probe_folder(config.storage)
    nbytes = config.storage_mib * 2**20
    try:
        written = write_probe(f"{folder}/0", nbytes, 0)
        read = written if written.error else read_probe(f"{folder}/0", nbytes, 0)
        return check_storage(config.storage, {"this machine": written}, {"this machine": read})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe_folder(storage: str) -> str:
    """Where this call's files lie; all its nodes use the same, another call another."""
    return str(Path(storage) / f".distseg-doctor-{uuid.uuid4().hex[:8]}")
