"""Out of memory while training, told as what it is: whoever allocates says it in words of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distseg.errors import InputError, is_out_of_memory


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Raises InputError in place of what Python or torch raise where there is no memory left."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            "out of memory",
            where="train",
            value=" ".join(str(error).split())[:200] or None,
            fix="lower train.slots_per_pass or data.memory_gib; dry_run=true tells what a run takes",
        ) from error
