"""What number format the networks compute in: `train.precision`."""

from __future__ import annotations

import torch


def resolved_precision(asked: str, device: torch.device) -> str:
    """`auto`: bfloat16 on a GPU that has it in hardware, where it is fast; else float32.

    On a CPU auto is float32 even where bfloat16 would be faster: a run may go on on another CPU and gives the numbers
    there that it would have given here. `train.precision=bfloat16` takes it (tests/bench/RESULTS.md: what it gains).
    """
    if asked != "auto":
        return asked
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"
