"""The memory a call needs beyond what is there before it.

On a CPU by the high-water mark of the process's resident memory, which the kernel keeps and /proc/self/clear_refs
resets (Linux); what the allocator holds free is given back first. It counts whole pages and everything of the process,
so whatever torch, oneDNN or we allocate is in it. On a GPU by torch's own count.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mib(function: Callable[[], object], device: torch.device) -> float | None:
    """MiB at the peak of one call, above the level before it. None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    library = ctypes.CDLL(None)
    if not _CLEAR.exists() or not hasattr(library, "malloc_trim"):
        return None
    library.malloc_trim(0)
    before = _resident_mib("VmRSS")
    _CLEAR.write_text("5")  # man proc: resets the high-water mark to what is resident now
    function()
    return _resident_mib("VmHWM") - before


def without_reserves() -> None:
    """For the rest of this process every block from 64 KiB on goes back to the system when it is freed. glibc keeps
    blocks in reserve otherwise, by a rule that adapts: some 20 MiB, another number each time."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in ((_M_MMAP_THRESHOLD, 64 * 2**10), (_M_ARENA_MAX, 1)):
            library.mallopt(parameter, value)


def _resident_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None, "Linux writes it so"
    return int(found[1]) / 1024
