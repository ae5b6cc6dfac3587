"""The component filter of an exported MONAI bundle: `distseg export format=monai_bundle` copies this into its scripts.

It needs MONAI, numpy and scipy alone (MONAI's own filter wants scikit-image). Masks are those of `distseg predict`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_numpy
from scipy import ndimage


class KeepLargestd(MapTransform):
    """Of each label value in `values`, the largest component alone, voxels touching by face, edge or corner."""

    def __init__(self, keys: Sequence[str], values: Sequence[int]) -> None:
        super().__init__(keys)
        self.values = tuple(values)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        for key in self.key_iterator(out):
            mask = convert_to_numpy(out[key]).copy()[0]
            for value in self.values:
                components, count = ndimage.label(mask == value, structure=np.ones((3, 3, 3)))
                if count > 1:
                    largest = np.bincount(components.ravel())[1:].argmax() + 1
                    mask[(components > 0) & (components != largest)] = 0
            out[key] = convert_to_dst_type(mask[None], out[key])[0]
        return out
