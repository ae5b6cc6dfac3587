"""The filter that keeps the largest component of a class, in a mask that is looked at slab by slab.

Memory is a slab's beside the mask's own, however many pieces the mask is in: see `components`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from distseg.inference.components import Components, LargestAgain

PLANES = 16  # of a slab

BoolArray = npt.NDArray[np.bool_]


def remove_islands(mask: npt.NDArray[np.uint8], *, values: Sequence[int]) -> Iterator[BoolArray]:
    """Set to 0 in place what does not belong to the largest component of each class in `values`; other classes stay.
    Yields what was removed, [n, Y, X], slab by slab.

    As `distseg.evaluation.metrics.largest_components`, without an array of the volume's size.
    """
    slabs = [mask[first : first + PLANES] for first in range(0, len(mask), PLANES)]
    components = {value: Components() for value in values}
    for slab in slabs:
        for value, of_value in components.items():
            of_value.add(slab == value)
    again = {value: LargestAgain(of_value) for value, of_value in components.items()}
    for slab in slabs:
        removed = np.zeros(slab.shape, np.bool_)
        for value, largest in again.items():
            found = slab == value
            removed |= found & ~largest.take(found)
        slab[removed] = 0
        yield removed
