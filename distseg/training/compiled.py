"""`train.compile`: the networks through torch.compile."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from distseg.config.schema import TrainRunConfig
from distseg.errors import ConfigError
from distseg.networks.dropout import KeyedDropout
from distseg.networks.unet import PASSES, UNet3D


def compile_network(network: UNet3D) -> None:
    """Compile what `network` computes, in place; its parameters and their names stay.

    Dropout keeps torch's own random numbers (`fallback_random`) and so its masks: losses are those without compiling,
    to rounding. On a CPU, where masks belong to slots, each dropout splits the graph.
    """
    # The cache is one for all networks of a kind; the default of 8 is less than their batches and modes together.
    torch._dynamo.config.recompile_limit = 64
    for layer in network.modules():
        if isinstance(layer, KeyedDropout):
            # Generators are no part of a graph.
            layer.by_key = torch.compiler.disable(layer.by_key)  # type: ignore[method-assign, no-untyped-call]  # torch has no hints
    for name in PASSES:
        compiled = torch.compile(getattr(network, name), dynamic=False, options={"fallback_random": True})
        setattr(network, name, compiled)


def check_compiler(config: TrainRunConfig) -> None:
    """Raises ConfigError where torch.compile lacks what it builds its code with."""
    if not config.train.compile:
        return
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    for thing, there in (
        (f"the C++ compiler {compiler}", shutil.which(compiler) is not None),
        ("Python's headers", header.is_file()),
    ):
        if not there:
            raise ConfigError(
                "torch.compile cannot build its code on this machine",
                where="train.compile",
                value=True,
                rule=f"it needs {thing}",
                fix="install it (apt install g++ python3-dev), or set train.compile=false",
            )
