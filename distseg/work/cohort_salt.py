"""The key that ids of DICOM scans are hashed with: made once, kept beside the cohort as COHORT.salt, not in the store.

Without it nobody can tell from an id which SeriesInstanceUID it stands for; with another one the same series would come
in a second time. So the store keeps a fingerprint of it, and another key, or none, is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from pathlib import Path

from distseg.data.cohort import beside, read_attrs
from distseg.data.place import create_text
from distseg.errors import DataError

SALT_NBYTES = 32
FINGERPRINT = "salt_sha256"


def salt_path(cohort: Path) -> Path:
    return beside(cohort, "salt")


def cohort_salt(cohort: Path) -> bytes:
    """The cohort's key, made where there is none. Raises DataError where it is not the one of the store's ids."""
    path = salt_path(cohort)
    fingerprint = (read_attrs(cohort) or {}).get(FINGERPRINT)
    if fingerprint is None and not path.exists():
        _make(path)
    salt = _read(path)
    if salt is None or (fingerprint is not None and _fingerprint(salt) != fingerprint):
        what = "the cohort's salt is " + ("missing or damaged" if salt is None else "another one")
        rule = "ids of DICOM scans are hashed with it"
        fix = "put back the file that was beside the cohort, or ingest into a new cohort"
        raise DataError(what, where=path, rule=rule, fix=fix)
    return salt


def salt_attrs(cohort: Path) -> dict[str, str]:
    """What the store's attributes say of the key: {} for a cohort without one."""
    salt = _read(salt_path(cohort))
    return {} if salt is None else {FINGERPRINT: _fingerprint(salt)}


def _make(path: Path) -> None:
    """Whole, or not at all, and only where none came in the meantime."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process was first
        create_text(path, secrets.token_hex(SALT_NBYTES) + "\n")


def _read(path: Path) -> bytes | None:
    try:
        salt = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return None
    return salt if len(salt) == SALT_NBYTES else None


def _fingerprint(salt: bytes) -> str:
    return hashlib.sha256(b"distseg salt" + salt).hexdigest()[:16]
