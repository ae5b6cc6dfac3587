"""Out of memory, told as what it is: whoever allocates says it in words of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distseg.errors import InputError

# In a RuntimeError: torch's allocator on a CPU; oneDNN, which has no word of its own for it.
_TORCH_SAYS = ("can't allocate memory", "could not create a primitive")


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Raises InputError in place of what Python or torch raise where there is no memory left."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in str(error) for said in _TORCH_SAYS):
            raise InputError(
                "out of memory",
                where="train",
                value=" ".join(str(error).split())[:200] or None,
                fix="lower train.slots_per_pass or data.memory_gib; dry_run=true tells what a run takes",
            ) from error
        raise
