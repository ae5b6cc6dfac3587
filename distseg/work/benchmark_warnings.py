"""What the runs of a benchmark warned of while they trained, a line a row and alarm."""

from __future__ import annotations

from collections import defaultdict

from distseg.training.alarms import Sounded, sounded
from distseg.training.run import RunDirectory
from distseg.work.benchmark_checks import Benchmark


def training_warnings(benchmark: Benchmark) -> list[tuple[str, str]]:
    """(row and labels, what and when), over the seeds that have trained. The words are those of the first seed."""
    heard: dict[tuple[str, str], list[tuple[int, Sounded]]] = defaultdict(list)
    for cell in (*benchmark.phase_a, *benchmark.phase_b):
        if cell.run.is_dir():
            where = f"{cell.row}, {benchmark.titles[cell.labelled]}"
            for alarm in sounded(RunDirectory(cell.run).metrics()):
                heard[where, alarm.name].append((cell.seed, alarm))
    return [(where, _in_words(alarms)) for (where, _), alarms in heard.items()]


def _in_words(alarms: list[tuple[int, Sounded]]) -> str:
    when = "; ".join(f"seed {seed} {alarm.when}" for seed, alarm in alarms)
    return f"{alarms[0][1].text}. {when[:1].upper()}{when[1:]}."
