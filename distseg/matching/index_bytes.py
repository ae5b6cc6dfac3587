"""An index as bytes: for a file of the bank, and for replicas through an object store.

    prefix      magic, format version, lengths of header and payload, SHA-256 of both
    header      JSON: what the index is, and which reference table it belongs to
    payload     safetensors: what the table does not already hold (IVF: centroids, and the list of each row)

FAISS's own reader is never given a file: its indexes are put together again from checked tensors and the table. A
checksum finds damage, not malice, so whoever takes a tensor out checks its shape and range too.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distseg.errors import DataError

VERSION = 1
FILE_NAME = "index.bin"
REBUILD = "build it again from its reference table"
_MAGIC = b"distseg index\n"
_PREFIX = struct.Struct("<14sHIQ32s")  # little-endian, no padding


@dataclass(frozen=True)
class Header:
    """`table_sha256` is of the table (`index_rows.table_digest`); `probes` are the IVF lists a search looks into."""

    backend: str
    kind: str
    similarity: str
    num_classes: int
    probes: int
    table_sha256: str


class Lists(NamedTuple):
    """IVF of one class: what k-means found. L lists, R_c rows, E embedding width."""

    centroids: Tensor  # float32 [L, E]
    of_row: Tensor  # int32 [R_c]

    @classmethod
    def read(cls, tensors: dict[str, Tensor], c: int, values: Tensor, where: object) -> Lists:
        """Class c's, of `unpack`, for rows `values` [R_c, E]. Checked, for FAISS trusts what it is given."""
        lists = cls(tensors.get(f"centroids.{c}", torch.empty(0)), tensors.get(f"lists.{c}", torch.empty(0)))
        centroids, of_row = lists
        if (
            (centroids.dtype, of_row.dtype) != (torch.float32, torch.int32)
            or centroids.ndim != 2
            or centroids.shape[1] != values.shape[1]
            or of_row.shape != values.shape[:1]
            or not bool(torch.isfinite(centroids).all())
            or not 0 <= int(of_row.min()) <= int(of_row.max()) < len(centroids)
        ):
            raise DataError("reference index does not fit its table", where=where, value=f"class {c}", fix=REBUILD)
        return lists


def pack(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    payload: bytes = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    head = json.dumps(asdict(header)).encode()
    digest = hashlib.sha256(head + payload).digest()
    return _PREFIX.pack(_MAGIC, VERSION, len(head), len(payload), digest) + head + payload


def unpack(data: bytes, *, where: object) -> tuple[Header, dict[str, Tensor]]:
    """The header and tensors again; `where` names the bytes in messages.

    Raises DataError where they are no index, of another version, cut short or damaged.
    """
    if len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise DataError("not a reference index, or cut short", where=where, value=f"{len(data)} bytes", fix=REBUILD)
    _, version, head_nbytes, payload_nbytes, digest = _PREFIX.unpack_from(data)
    if version != VERSION:
        rule = f"must be {VERSION}"
        raise DataError("reference index of another version", where=where, value=version, rule=rule, fix=REBUILD)
    body, expected = data[_PREFIX.size :], head_nbytes + payload_nbytes
    if len(body) != expected:
        got, rule = f"{len(body)} bytes", f"must be {expected}"
        raise DataError("reference index cut short", where=where, value=got, rule=rule, fix=REBUILD)
    if hashlib.sha256(body).digest() != digest:
        raise DataError("reference index does not match its checksum", where=where, fix=REBUILD)
    try:
        return _header(json.loads(body[:head_nbytes])), safetensors.torch.load(body[head_nbytes:])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        what = f"unreadable reference index: {type(error).__name__}: {str(error)[:200]}"
        raise DataError(what, where=where, fix=REBUILD) from error


def _header(content: dict[str, Any]) -> Header:
    types = {"str": str, "int": int}  # annotations are strings in this file
    return Header(**{field.name: types[str(field.type)](content[field.name]) for field in fields(Header)})


def write_index(folder: Path, data: bytes) -> None:
    """`folder`/index.bin; that it appears whole or not at all is the caller's business."""
    (folder / FILE_NAME).write_bytes(data)


def read_index(folder: Path) -> bytes:
    try:
        return (folder / FILE_NAME).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the reference index: {error.strerror}", where=folder, fix=REBUILD) from error
