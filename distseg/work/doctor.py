"""`distseg doctor launcher=local`: this machine, without Ray. Findings come as they are made, so that a check which
hangs is the one after the last line shown."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

from distseg.config.verbs import DoctorConfig
from distseg.data.place import is_url, join
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
from distseg.work.node_probes import local_round_trip, read_probe, remove_probes, write_probe


def examine_machine(config: DoctorConfig) -> Iterator[Finding]:
    """One finding a check. `config.storage` is absolute, or a URL."""
    facts = gather_facts()
    nodes = [facts]
    yield check_versions(nodes)
    yield check_devices(nodes, gpus_per_worker=config.resources.gpus_per_worker)
    yield check_faiss(nodes)
    yield check_reader(nodes)
    yield check_shared_memory(nodes, object_store_gib={})
    yield _check_storage(config)
    yield check_disk({facts.node: [*disks_of(config.storage), facts.temporary]})
    try:
        yield check_round_trip("two processes", local_round_trip())
    except RuntimeError as error:
        yield check_round_trip("two processes", str(error))
    yield Finding("clocks", "ok", "one machine")
    yield Finding("authentication", "ok", "launcher=local starts no Ray and opens no port")


def disks_of(storage: str) -> list[Disk]:
    """The storage's, or that of what is above it where it does not exist or cannot be looked at (which the storage
    check tells); none behind a URL."""
    if is_url(storage):
        return []
    folder = storage
    while not os.path.exists(folder):  # False where a folder above may not be read: pathlib's raises there
        folder = os.path.dirname(folder)
    return [Disk.under(folder)]


def _check_storage(config: DoctorConfig) -> Finding:
    folder = probe_folder(config.storage)
    nbytes = config.storage_mib * 2**20
    try:
        written = write_probe(f"{folder}/0", nbytes, 0)
        read = written if written.error else read_probe(f"{folder}/0", nbytes, 0)
        return check_storage(config.storage, {"this machine": written}, {"this machine": read})
    finally:
        remove_probes(folder)


def probe_folder(storage: str) -> str:
    """Where this call's files lie; all its nodes use the same, another call another."""
    return join(storage, f".distseg-doctor-{uuid.uuid4().hex[:8]}")
