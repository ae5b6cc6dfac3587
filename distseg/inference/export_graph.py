"""A run's network as one file that needs no distseg: ONNX or TorchScript, normalised patch in, logits out.

    OUT/model.onnx  or  OUT/model.ts     image [B, 1, Z, Y, X] float32 -> logits [B, K, Z, Y, X]
    OUT/model.json                       classes, spacing, intensity, patch: how to prepare an image

ONNX fixes the patch's size and leaves the batch's free; TorchScript leaves both. What was written is read back and run
against the network before the file gets its name. torch 2.13 calls TorchScript deprecated; it still writes and reads
it, and C++ and MONAI bundles use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distseg.errors import ConfigError, DistsegError, InputError
from distseg.inference.model import Model

SUFFIXES = {"onnx": (".onnx",), "torchscript": (".ts", ".pt"), "monai_bundle": ()}  # the first is the default
TOLERANCE = 1e-3  # of logits, which span several units; other kernels sum in another order
_FREE_BATCH = 64


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """`largest_difference`: of the logits read back from the network's own, on one batch of noise."""

    path: str
    largest_difference: float


class Logits(nn.Module):
    """The network without its embeddings."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image).logits
        return logits


def export_graph(model: Model, *, format: str, network: str, output: str) -> ExportReport:
    """Write `output` if it names a file of one of the format's suffixes, else `output`/model.SUFFIX; model.json beside
    it. Raises InputError for an `output` that cannot or must not be written."""
    check_output(output, format=format)
    suffixes = SUFFIXES[format]
    target = Path(output) if output.endswith(suffixes) else Path(output) / f"model{suffixes[0]}"
    sidecar = target.with_suffix(".json")
    check_no_run(target.parent)
    for file in (target, sidecar):
        if os.path.lexists(file):
            raise InputError("exists already", where="output", value=file, fix="choose another output= or remove it")
    staged = target.with_name(f".{uuid.uuid4().hex[:8]}{suffixes[0]}")
    try:
        with writing(output):
            target.parent.mkdir(parents=True, exist_ok=True)
            difference = write_graph(model, format=format, network=network, file=staged)
            sidecar.write_text(json.dumps(describe(model, network=network), indent=1) + "\n")
            staged.replace(target)
    finally:
        with contextlib.suppress(OSError):  # where the folder is none, what was raised says so
            staged.unlink(missing_ok=True)
    return ExportReport(str(target), difference)


def check_output(output: str, *, format: str) -> None:
    """Raises InputError for a name that says another format."""
    for other, suffixes in SUFFIXES.items():
        if other != format and output.endswith(suffixes):
            fix = f"set format={other}, or choose an output= without that suffix"
            raise InputError(f"not a name for format={format}", where="output", value=output, fix=fix)


def check_no_run(folder: Path) -> None:
    """Raises InputError for a run directory: a model.json of an export beside its own would be taken for the run's."""
    if os.path.lexists(folder / "config.yaml") or os.path.lexists(folder / "model" / "model.json"):
        raise InputError(
            "a run directory", where="output", value=folder, rule="an export has a folder of its own",
            fix=f"set output={folder / 'export'}",
        )  # fmt: skip


@contextmanager
def writing(output: str) -> Iterator[None]:
    """Around what writes: an OSError becomes an InputError that names `output`."""
    try:
        yield
    except OSError as error:
        fix = "choose an output= on a disk that may be written and has space"
        why = error.strerror or str(error)
        raise InputError("cannot be written", where="output", value=output, rule=why, fix=fix) from error


def write_graph(model: Model, *, format: str, network: str, file: Path) -> float:
    """Write the network to `file`; returns the largest difference of its logits. Raises DistsegError beyond
    `TOLERANCE`, ConfigError where a package is missing."""
    logits = Logits(model.networks[network]).eval()
    sample = torch.randn((2, 1, *model.patch_zyx), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = logits(sample)
    about = json.dumps(describe(model, network=network))
    write = {"onnx": _write_onnx, "torchscript": _write_torchscript}[format]
    difference = float((write(logits, sample, file, about) - expected).abs().max())
    if not difference <= TOLERANCE:
        raise DistsegError(f"{file}: the exported logits differ by {difference:.2g}, more than {TOLERANCE}")
    return difference


def describe(model: Model, *, network: str) -> dict[str, Any]:
    """How to prepare an image for the network and read its output; also inside the file, as "metadata.json"."""
    info = model.info
    return {
        "input": "image [B, 1, Z, Y, X] float32; Z to the head, Y to the back, X to the left; spacing_mm apart",
        "output": "logits [B, K, Z, Y, X]; the softmax of overlapping windows is averaged, then argmax",
        "classes": list(info.class_names),
        "spacing_mm": list(info.spacing_mm),
        "patch_zyx": list(info.patch_zyx),
        "intensity": dataclasses.asdict(info.intensity),
        "network": network,
        "method": info.method,
        "step": info.step,
    }


def _write_torchscript(logits: nn.Module, sample: Tensor, file: Path, about: str) -> Tensor:
    with _quiet(), torch.inference_mode():
        traced = torch.jit.trace(logits, sample, check_trace=False)  # type: ignore[no-untyped-call]  # torch's
        try:
            torch.jit.save(traced, str(file), _extra_files={"metadata.json": about})
        except RuntimeError as error:  # its word for a full disk, a folder that may not be written
            raise OSError(str(error).partition("\n")[0]) from error
        again: Tensor = torch.jit.load(str(file))(sample)  # type: ignore[no-untyped-call]  # torch's
    return again


def _write_onnx(logits: nn.Module, sample: Tensor, file: Path, about: str) -> Tensor:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    import onnxruntime

    free = torch.export.Dim("batch", min=1, max=_FREE_BATCH)
    with _quiet():
        program = torch.onnx.export(
            logits, (sample,), dynamo=True, dynamic_shapes={"image": {0: free}}, input_names=["image"],
            output_names=["logits"], verbose=False,
        )  # fmt: skip
    assert program is not None, "torch.onnx.export with dynamo=True returns the program"
    program.model.metadata_props["metadata.json"] = about
    program.save(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": sample.numpy()})
    return torch.from_numpy(found)


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"needs the package {package}",
            where="format=onnx",
            fix="pip install 'distseg[onnx]', or format=torchscript",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's own notes on its own workings: TorchScript's deprecation, what a trace fixes, libraries it lacks."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]  # torch's
            yield
    finally:
        logger.setLevel(before)
