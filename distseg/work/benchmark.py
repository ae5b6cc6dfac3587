"""A suite of methods x label counts x seeds on one cohort, cell by cell, to tables, curves and the paper's Figure 2.

    RUN/benchmark.yaml              what this directory was made with
    RUN/cells/                      a run directory a cell, see work/benchmark_cells.py
    RUN/tables/summary.csv          every figure of every row; summary.md: the same to read
    RUN/tables/comparisons.csv      paired differences, intervals, tests
    RUN/tables/cells.csv            what became of each cell: steps, seconds, or why it failed
    RUN/figures/   RUN/report.html

The same command again does what is still to do. A cell that fails is named with its reason while the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.config.verbs import BenchmarkConfig
from distseg.errors import FinishedWithFailures
from distseg.training.local import train_local
from distseg.work.benchmark_cells import Cell, CellJob, Evaluate, Train, evaluate_cell, job_name, run_cell
from distseg.work.benchmark_checks import Benchmark, claimed, prepare
from distseg.work.benchmark_progress import BenchmarkProgress
from distseg.work.benchmark_report import write_report
from distseg.work.executor import Executor


@dataclass(frozen=True)
class BenchmarkResult:
    """`report` is None where no cell could be measured."""

    run: str
    finished: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    report: Path | None


def run_benchmark(
    config: BenchmarkConfig, *, executor: Executor, train: Train = train_local, evaluate: Evaluate = evaluate_cell
) -> BenchmarkResult:
    """Run or resume the benchmark in `config.run` (absolute); `executor` has as many workers as cells run at once.

    `train` and `evaluate` must be picklable where the executor's workers are other processes. Raises ConfigError,
    DataError or RunMismatchError before anything runs; FinishedWithFailures, once all else is written, naming the
    cells that failed.
    """
    benchmark = prepare(config)
    with claimed(config, benchmark) as run:
        _announce(config, benchmark)
        failed = _run_cells(config, benchmark, executor, train, evaluate)
        report, trouble = write_report(run, benchmark, failed, executor=executor)
    cells = [*benchmark.phase_a, *benchmark.phase_b]
    finished = tuple(cell.name for cell in cells if cell.is_finished())
    failures = (*failed.items(), *trouble)
    if report is not None:
        print(f"report: {report}", flush=True)
    if failures:
        raise FinishedWithFailures(f"{run}: {len(finished)} of {len(cells)} cells finished", failures)
    return BenchmarkResult(config.run, finished, failures, report)


def _announce(config: BenchmarkConfig, benchmark: Benchmark) -> None:
    """What will run and, before anyone has looked, what so many scans can show."""
    suite = benchmark.suite
    subsets, seeds = (", ".join(map(str, values)) for values in (suite.labelled, suite.seeds))
    if config.cells_from is not None:
        cells = [*benchmark.phase_a, *benchmark.phase_b]
        taken = sum(cell.run.parents[1] == Path(config.cells_from) for cell in cells)
        print(f"{taken} of {len(cells)} cells are finished in {config.cells_from} and read there")
    print(f"suite {suite.name}: {', '.join(row.name for row in suite.rows)}; labelled {subsets}; seeds {seeds}")
    print(
        f"{len(benchmark.scans)} {suite.split} scans, tests of each metric: {benchmark.comparisons}. A mean paired "
        f"difference of {benchmark.detectable_sd:.2f} of its sd is found in 4 of 5 such benchmarks",
        flush=True,
    )


def _run_cells(
    config: BenchmarkConfig, benchmark: Benchmark, executor: Executor, train: Train, evaluate: Evaluate
) -> dict[str, str]:
    """Run what is not finished; returns cell name -> why it failed."""
    phase_a = [cell for cell in benchmark.phase_a if not cell.is_finished()]
    phase_b = [cell for cell in benchmark.phase_b if not cell.is_finished()]
    done = len(benchmark.phase_a) + len(benchmark.phase_b) - len(phase_a) - len(phase_b)
    failed: dict[str, str] = {}
    progress_of = BenchmarkProgress(
        [*phase_a, *phase_b], done=done, scans=len(benchmark.scans), enabled=config.logging.progress
    )
    with progress_of as progress:
        for wave in waves(phase_a, phase_b, executor.workers):
            ready = []
            for cell in wave:
                if cell.parent in failed and not _can_branch(benchmark, cell):
                    failed[cell.name] = f"its phase A failed: {failed[cell.parent]}"
                    progress.ended(cell.name, failed[cell.name])
                else:
                    ready.append(CellJob(cell, train, evaluate))
            for outcome in executor.map(run_cell, ready, key=job_name):
                if outcome.error is not None:
                    failed[outcome.key] = outcome.error
                progress.ended(outcome.key, outcome.error)
    return failed


def waves(phase_a: Sequence[Cell], phase_b: Sequence[Cell], side_by_side: int) -> Iterator[list[Cell]]:
    """Cells in sets to run one after the other, so that a branch never starts before the phase A it comes from.

    Phase A cells that do not fill all workers run beside branches of those that are done; only the last set waits.
    """
    full = len(phase_a) - len(phase_a) % side_by_side
    rest = list(phase_a[full:])
    waiting = {cell.name for cell in rest}
    sets = [
        list(phase_a[:full]),
        [*rest, *(cell for cell in phase_b if cell.parent not in waiting)],
        [cell for cell in phase_b if cell.parent in waiting],
    ]
    yield from (cells for cells in sets if cells)


def _can_branch(benchmark: Benchmark, cell: Cell) -> bool:
    """Whether its phase A is trained, though not measured."""
    return any(parent.name == cell.parent and parent.is_trained() for parent in benchmark.phase_a)
