"""Small files from strangers: read within bounds, or refused in one line.

A file may be long, nest without end, or say a short thing (a YAML alias of aliases) that unfolds without end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from distseg.errors import DataError

MAX_CHARACTERS = 64 * 2**20  # of a JSON or YAML file: ours are far below one MiB, a plan of 100 000 scans is not
MAX_NODES = 2_000_000  # of a YAML file once its aliases are unfolded
MAX_DEPTH = 50
MAX_NAME_NBYTES = 200  # of a scan's name: with an ending it is a file's, which may have 255


def read_json(file: Path, what: str = "file") -> Any:
    """`what`: for messages. Raises DataError where the file is too long or no JSON, OSError where it cannot be read."""
    try:
        return json.loads(_text(file, what))
    except RecursionError as error:
        raise DataError(f"unreadable {what}: nests too deeply", where=file) from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"unreadable {what}: not JSON: {str(error)[:200]}", where=file) from error


def read_yaml(file: Path, what: str = "file") -> Any:
    """Plain values: no tag makes an object. Raises DataError as `read_json` does, and where aliases unfold too far."""
    try:
        node = yaml.compose(_text(file, what), Loader=yaml.SafeLoader)
        if _unfolded(node, {}, MAX_DEPTH) > MAX_NODES:
            raise DataError(f"unreadable {what}: unfolds to too much", where=file, rule=f"at most {MAX_NODES} values")
        loader = yaml.SafeLoader("")
        return loader.construct_document(node) if node is not None else None
    except RecursionError as error:  # also a value that contains itself
        raise DataError(f"unreadable {what}: nests too deeply", where=file) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"unreadable {what}: not YAML: {' '.join(str(error).split())[:200]}", where=file) from error


def check_name(name: str, *, where: object, what: str = "name") -> str:
    """`name` if it is one of a file in its folder and nowhere else; else DataError."""
    plain = name not in ("", ".", "..") and not set(name) & {"/", "\\"} and name.isprintable()
    if not plain or len(name.encode(errors="replace")) > MAX_NAME_NBYTES:
        rule = f"1 to {MAX_NAME_NBYTES} printable characters without / or \\"
        raise DataError(f"not a {what} we write", where=where, value=repr(name[:80]), rule=rule)
    return name


def _text(file: Path, what: str) -> str:
    with file.open(encoding="utf-8") as content:
        text = content.read(MAX_CHARACTERS + 1)
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"unreadable {what}: too long", where=file, rule=f"at most {MAX_CHARACTERS} characters")
    return text


def _unfolded(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """Values below a node, those of an alias as often as it stands there. Raises RecursionError beyond `depth`."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if not depth:
        raise RecursionError
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        children = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_unfolded(child, known, depth - 1) for child in children)
    return known[id(node)]
