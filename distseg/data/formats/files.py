"""What the layouts share: NIfTI files of a folder, JSON beside them, and splits.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from distseg.data.digest import file_size
from distseg.data.formats.case import Case, Source
from distseg.errors import DataError

SUFFIXES = (".nii.gz", ".nii")
SPLIT_NAMES = ("train", "val", "test")
SPLITS_FILE = "splits.json"
MOST_NAMED = 5
MAX_JSON_NBYTES = 2**28  # a list of a million cases is a tenth of this

Failures = list[tuple[str, str]]


def nifti_stem(path: PurePath) -> str | None:
    """The file's name without .nii or .nii.gz; None for a hidden file or one of another kind."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    return None if suffix is None or path.name.startswith(".") else path.name[: -len(suffix)]


def nifti_files(folder: Path) -> tuple[dict[str, Path], Failures]:
    """File name without suffix -> file; hidden files are left out, a name that is there twice is a failure."""
    by_name: dict[str, Path] = {}
    twice: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        name = nifti_stem(path)
        if name is None:
            continue
        if name in by_name:
            rule = "one file per case name"
            both = f"{by_name[name].name} and {path.name}"
            twice[name] = str(DataError("duplicate case name", where=both, rule=rule, fix="remove or rename one"))
        by_name[name] = path
    return {name: path for name, path in by_name.items() if name not in twice}, sorted(twice.items())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError for anything else."""
    size = file_size(path)
    if size > MAX_JSON_NBYTES:
        raise DataError("too large", where=path, value=f"{size} bytes", rule=f"at most {MAX_JSON_NBYTES}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("not readable as JSON", where=path, value=error) from error
    if not isinstance(data, dict):
        raise DataError("not a JSON object", where=path, value=type(data).__name__)
    return data


def read_splits(path: Path) -> dict[str, str] | None:
    """Case -> split; None without the file. A case in two splits would leak, so it is refused."""
    if not path.is_file():
        return None
    splits: dict[str, str] = {}
    for split, cases in read_json(path).items():
        if split not in SPLIT_NAMES or not isinstance(cases, list):
            rule = 'an object {"train": [...], "val": [...], "test": [...]} of case names'
            raise DataError("splits not understood", where=path, value=split, rule=rule)
        for case in cases:
            if splits.get(str(case), split) != split:
                rule = "a case is in one split only"
                raise DataError("case in two splits", where=path, value=case, rule=rule, fix="remove one")
            splits[str(case)] = split
    return splits


def source_of(
    root: Path,
    kind: str,
    cases: Mapping[str, Case],
    failures: Sequence[tuple[str, str]],
    *,
    classes: dict[str, int],
    channel_names: dict[str, str] | None,
    names_are: str,
    notes: Sequence[str] = (),
) -> Source:
    """The source of `cases`, by their name in splits.json, with what `root`/splits.json says where it is there. A case
    that is among the failures is left out. `names_are`: what those names are, for a message."""
    splits = read_splits(root / SPLITS_FILE)
    found = list(failures)
    refused = {name for name, _ in failures}
    if splits is not None:
        found += _split_failures(splits, cases, refused, names_are)
        refused = {name for name, _ in found}
    kept = {name: case for name, case in sorted(cases.items()) if name not in refused}
    said = list(notes)
    if splits is not None:
        unnamed = sum(name not in splits and case.split is None for name, case in kept.items())
        said += [f"{unnamed} cases are in no split of {SPLITS_FILE}: they train"] if unnamed else []
        kept = {name: replace(case, split=splits.get(name, case.split)) for name, case in kept.items()}
    return Source(kind, classes, channel_names, list(kept.values()), found, splits is not None, tuple(said))


def _split_failures(
    splits: Mapping[str, str], cases: Mapping[str, Case], refused: set[str], names_are: str
) -> Failures:
    """The names in splits.json without a case, as one line. Where there are any, a case that it does not name may be
    one of them, misspelt and to be held out, so it is not taken."""
    without = sorted(set(splits) - set(cases) - refused)
    if not without or not (cases or refused):
        return []
    found: Failures = []
    for name in sorted(set(cases) - set(splits) - refused):
        rule = "it may be one of the names there that have no image, and be meant to be held out"
        where = cases[name].image.path.name
        found.append((name, str(DataError("case is not in splits.json", where=where, rule=rule, fix="add it there"))))
    named = ", ".join(without[:MOST_NAMED]) + (
        f" and {len(without) - MOST_NAMED} more" if len(without) > MOST_NAMED else ""
    )
    fix = "correct them, add the images or drop the names"
    why = DataError("names without an image", where=SPLITS_FILE, value=named, rule=f"each is {names_are}", fix=fix)
    found.append((SPLITS_FILE, str(why)))
    return found
