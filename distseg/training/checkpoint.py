"""Checkpoints: written whole or not at all, checksummed, and the only truth a run resumes from.

checkpoints/step_0000400/
  student.safetensors  teacher.safetensors
  heads.safetensors    of a method whose student has heads that only training uses
  optimizer.pt         tensors and numbers only: loaded with weights_only=True
  state.json           format, step, schedule_step, and the SHA-256 of each file above
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from distseg.config.untrusted import read_json
from distseg.errors import DataError

FORMAT = 1
_FILES = ("student.safetensors", "teacher.safetensors", "optimizer.pt")
_HEADS = "heads.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """`schedule_step` counts on from the run this one branched from; `step` is this run's own."""

    step: int
    schedule_step: int
    student: dict[str, torch.Tensor]
    teacher: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    heads: dict[str, torch.Tensor] = field(default_factory=dict)


def checkpoint_dir(root: Path, step: int) -> Path:
    return root / f"step_{step:07d}"


def save_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """Write under a temporary name, then rename. Rank 0 only."""
    final = checkpoint_dir(root, checkpoint.step)
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    optimizer = io.BytesIO()
    torch.save(checkpoint.optimizer, optimizer)
    contents = {
        _FILES[0]: save(_plain(checkpoint.student)),
        _FILES[1]: save(_plain(checkpoint.teacher)),
        _FILES[2]: optimizer.getvalue(),
        **({_HEADS: save(_plain(checkpoint.heads))} if checkpoint.heads else {}),
    }
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "schedule_step": checkpoint.schedule_step,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    for name, content in {**contents, "state.json": json.dumps(state, indent=1).encode()}.items():
        _write(partial / name, content)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(root)
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint. Raises DataError if it is damaged or of another format."""
    try:
        state = read_json(folder / "state.json", "checkpoint")
        if state["format"] != FORMAT:
            raise DataError(
                "checkpoint of another format", where=folder, value=state["format"], rule=f"must be {FORMAT}"
            )
        has_heads = _HEADS in state["sha256"]
        for name in _files(has_heads):
            if _sha256(folder / name) != state["sha256"][name]:
                raise DataError("checkpoint file does not match its checksum", where=folder / name)
        return Checkpoint(
            step=int(state["step"]),
            schedule_step=int(state["schedule_step"]),
            student=load_file(folder / _FILES[0]),
            teacher=load_file(folder / _FILES[1]),
            optimizer=torch.load(folder / _FILES[2], map_location="cpu", weights_only=True),
            heads=load_file(folder / _HEADS) if has_heads else {},
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"unreadable checkpoint: {str(error)[:200]}", where=folder) from error


def _files(heads: object) -> tuple[str, ...]:
    return (*_FILES, _HEADS) if heads else _FILES


def list_checkpoints(root: Path) -> list[Path]:
    """Oldest first."""
    return sorted(p for p in root.glob("step_*") if p.is_dir())


def newest_step(root: Path) -> int:
    """Of the newest checkpoint, whole or not; 0 if there is none."""
    folders = list_checkpoints(root)
    return int(folders[-1].name.removeprefix("step_")) if folders else 0


def oldest_step(root: Path) -> int:
    """Of the oldest checkpoint; 0 if there is none."""
    folders = list_checkpoints(root)
    return int(folders[0].name.removeprefix("step_")) if folders else 0


def load_newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning. None if there is none."""
    for folder in reversed(list_checkpoints(root)):
        try:
            return load_checkpoint(folder)
        except DataError as error:
            warnings.warn(f"passing over a damaged checkpoint, going on from the one before: {error}", stacklevel=2)
    return None


def prune_checkpoints(root: Path, *, keep: int, spare: set[int]) -> None:
    """Remove all but the newest `keep` and the steps in `spare`. Rank 0 only."""
    for folder in list_checkpoints(root)[:-keep]:
        if int(folder.name.removeprefix("step_")) not in spare:
            shutil.rmtree(folder)


def _plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Through Python, which says what the disk says: that it is full, for one."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
