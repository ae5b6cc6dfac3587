"""Run benchmarks by name, print their tables, write their flat JSON."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

BENCHMARKS = (
    "step", "step_growth", "precision", "methods", "index", "embeddings", "bank", "scaling", "ray", "resume", "tune",
    "label", "label_actors", "label_ledger", "label_quality",
    "ingest", "layout", "patches", "loader", "open_cohort", "hosts", "layers",
)  # fmt: skip
OPTIONS = {
    "index": ("large",),
    "embeddings": ("trained", "cohort"),
    "precision": ("trained", "cohort"),
    "label": ("trained", "cohort", "scans"),
    "label_actors": ("trained", "cohort", "scans"),
    "label_ledger": ("scans",),
    "label_quality": ("trained", "cohort", "output"),
    "patches": ("data",),
    "hosts": ("rounds",),
    "tune": ("cohort", "trials"),
}  # which of the arguments a benchmark takes


LEFT_OUT = ("label_quality", "hosts", "layers")  # unless named: one needs a run, one root, one fetches half a gigabyte


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all if none is named")
    parser.add_argument("--json", type=Path, help="write every key here, flat")
    parser.add_argument("--large", action="store_true", help="index: 10 million references too, minutes and 6 GB")
    parser.add_argument(
        "--trained", metavar="RUN", help="embeddings, precision, label*: a finished run whose model is looked at"
    )
    parser.add_argument("--cohort", help="embeddings, precision, label*: of the run's kind; tune: to train on")
    parser.add_argument("--scans", type=int, help="label, label_actors, label_ledger: so many in place of their own")
    parser.add_argument("--output", help="label_quality: where masks and review are kept")
    parser.add_argument("--data", help="patches: a folder that keeps the scans made (10 GB) for the next time")
    parser.add_argument("--rounds", type=int, help="hosts: fewer than its own five")
    parser.add_argument("--trials", type=int, help="tune: fewer than its own sixteen")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}")
    results: dict[str, float] = {}
    for name in arguments.names or [name for name in BENCHMARKS if name not in LEFT_OUT]:
        options = {option: getattr(arguments, option) for option in OPTIONS.get(name, ())}
        results |= importlib.import_module(f"tests.bench.{name}").run(**options)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
