"""dataset.json, which nnU-Net raw and the Medical Segmentation Decathlon share: classes and the one channel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.errors import DataError


def read_classes(data: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Class name -> label value 0, 1, 2, ..., in this order. `path` is for the message."""
    labels = data.get("labels")
    if not isinstance(labels, dict):
        rule = 'labels is {"background": 0, "mandible": 1}'
        raise DataError("no classes", where=path, value=labels, rule=rule, fix="add labels")
    if all(str(key).isdecimal() and isinstance(value, str) for key, value in labels.items()):
        labels = {value: int(key) for key, value in labels.items()}  # nnU-Net v1 and the Decathlon: the other way round
    rule = "label values are 0 (background), 1, 2, ... without gaps, at most 255; no regions, no ignore label"
    values = list(labels.values())
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values) or "ignore" in labels:
        raise DataError("classes not understood", where=path, value=labels, rule=rule)
    if sorted(values) != list(range(len(values))) or not 1 <= len(values) <= 256:
        raise DataError("classes not understood", where=path, value=labels, rule=rule)
    return dict(sorted(((str(name), int(value)) for name, value in labels.items()), key=lambda item: item[1]))


def read_channel(data: Mapping[str, Any], path: Path) -> dict[str, str]:
    """{"0": its name}. Raises DataError for none or more than one."""
    channels = data.get("channel_names", data.get("modality"))
    if not isinstance(channels, dict) or "0" not in channels:
        rule = 'channel_names is {"0": "CT"} or another name'
        raise DataError("no channel name", where=path, value=channels, rule=rule, fix="add channel_names")
    if len(channels) > 1:
        raise DataError("more than one channel", where=path, value=channels, rule="one channel per scan")
    return {"0": str(channels["0"])}


def modality_of(channel_names: Mapping[str, str]) -> str:
    """What its scans are: "CT", or the channel's name as it is."""
    name = channel_names["0"]
    return "CT" if name.upper() == "CT" else name
