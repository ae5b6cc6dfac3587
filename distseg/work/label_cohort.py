"""Label every scan of a cohort once: what is to do, who does it, and what is left when it is done.

    OUT/masks/ID.nii.gz     the scan's native grid, uint8
    OUT/trust/ID.nii.gz     uint8 = 64 x code + confidence 0..63; codes in inference/label_scan.py
    OUT/scans.csv  review.html  next_to_label.csv    see label_review.py
    OUT/ledger.jsonl  owner.json  .staging/          see ledger.py and owner.py; behind a URL, url_ledger.py
    OUT/dicom.salt          of a DICOM folder: the key that its scans' ids are hashed with

The same command again goes on where it stands, whatever killed it. A scan that fails is tried again after the others,
then set aside with its reason; the next call tries it anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from distseg.config.verbs import LabelSectionConfig
from distseg.data.carry import OWNER, patiently
from distseg.data.dicom.folder import any_dicom
from distseg.data.label_output import read_cohort
from distseg.data.place import is_url, reachable
from distseg.errors import InputError, RunMismatchError
from distseg.inference.label_scan import LabelRule
from distseg.inference.model import Model
from distseg.inference.whole_scan import cached_model, model_fingerprint
from distseg.work.cohort_salt import cohort_salt
from distseg.work.executor import Executor, available_cores
from distseg.work.label_review import write_review
from distseg.work.label_sources import ScanSource, Sources, find_sources
from distseg.work.label_task import Labelled, Labeller, LabelTask, label_one, rule_of
from distseg.work.ledger import Ledger
from distseg.work.owner import Owner, owning
from distseg.work.predict import progress_bar
from distseg.work.url_ledger import open_ledger
from distseg.work.url_owner import owning_folder

SALT = "dicom"
UNTOLD = "the command said why, which may hold a name"


@dataclass
class LabelReport:
    """Counts of scans labelled by this call and done before; set aside as (id, one line why)."""

    output: str
    labelled: int = 0
    done_before: int = 0
    set_aside: list[tuple[str, str]] = field(default_factory=list)


def label_cohort(
    *,
    run: str,
    cohort: str,
    output: str,
    settings: LabelSectionConfig,
    executor: Executor,
    progress: bool = True,
    labeller: Labeller = label_one,
) -> LabelReport:
    """Raises InputError where there is nothing to label or another driver lives on `output`, RunMismatchError where
    `output` was made otherwise. Failed scans are in the report."""
    fingerprint = model_fingerprint(run)
    model, _ = cached_model(run, fingerprint)
    folder = reachable(output, key="output")
    _check_place(folder, cohort)
    sources = find_sources(cohort, only=settings.only, salt=lambda: cohort_salt(folder / SALT))
    rule = rule_of(settings, model.info)
    _say_how(model, sources)
    with _owning(folder) as owner:
        ledger = open_ledger(folder, _identity(fingerprint, model, rule, overlap=settings.overlap), _hidden(cohort))
        try:
            _check_cohort(folder, cohort, sources, ledger)
            report = LabelReport(output, set_aside=list(sources.failures))
            todo = [scan for scan in sources.scans if ledger.versions.get(scan.scan_id) != scan.version]
            report.done_before = len(sources.scans) - len(todo)
            if report.done_before:
                Console(stderr=True).print(f"{report.done_before} of {len(sources.scans)} scans are done and kept")
            task = _task_maker(run, fingerprint, ledger, rule, settings.overlap, executor)
            _label(
                todo,
                task,
                labeller,
                executor,
                ledger,
                owner,
                report,
                attempts=settings.attempts,
                has_names=sources.has_names,
                progress=progress,
            )
        finally:
            ledger.close()
        write_review(
            folder,
            run=run,
            sources=sources,
            model=model,
            settings=settings,
            executor=executor,
            set_aside=_without_names(report.set_aside, sources),
        )
    return report


def _check_place(output: Path, cohort: str) -> None:
    if (output / "config.yaml").exists() or (output / "model").exists():
        raise InputError("a run lives here", where="output", value=output, fix="choose another output=")
    local = not is_url(cohort) and not is_url(output)
    if local and output.is_relative_to(cohort) and Path(cohort).is_dir() and any_dicom(Path(cohort)):
        rule = "NIfTI files below a DICOM folder are taken for labels of its series"
        raise InputError("inside the DICOM folder", where="output", value=output, rule=rule, fix="choose one beside it")


def _check_cohort(output: Path, cohort: str, sources: Sources, ledger: Ledger) -> None:
    """Another cohort whose ids are the same would take the place of this output's, scan by scan."""
    if read_cohort(output) in (None, _hidden(cohort)):
        return
    others = [s.scan_id for s in sources.scans if ledger.versions.get(s.scan_id, s.version) != s.version]
    if others:
        rule = f"it has other images under {len(others)} of the ids, {others[0]} among them"
        fix = "take another output="
        raise RunMismatchError("this output is of another cohort", where=output, rule=rule, fix=fix)


def _hidden(cohort: str) -> str:
    """A path, to be known again: folders may be named after patients."""
    return hashlib.sha256(cohort.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _owning(output: Path) -> AbstractContextManager[Owner]:
    if is_url(output):
        return owning_folder(str(output), what="output", key="output")
    return owning(output / OWNER, what="output", name=output)


def _label(
    todo: Sequence[ScanSource],
    task: Callable[[ScanSource], LabelTask],
    labeller: Labeller,
    executor: Executor,
    ledger: Ledger,
    owner: Owner,
    report: LabelReport,
    *,
    attempts: int,
    has_names: bool,
    progress: bool,
) -> None:
    """Rounds over what is to do; what fails in one is the next one's, until the last says that it is set aside."""
    with progress_bar(progress) as bar:
        running = bar.add_task("label", total=len(todo))
        for attempt in range(1, attempts + 1):
            failed: dict[str, str] = {}
            for outcome in executor.map(labeller, _tasks(todo, task), key=_scan_id):
                patiently(owner.check, where=report.output)
                if outcome.value is not None:
                    made: Labelled = outcome.value
                    ledger.commit(made.scan_id, made.version, made.facts)
                    report.labelled += 1
                    bar.advance(running)
                else:
                    why = outcome.error or "no reason given"
                    failed[outcome.key] = why
                    ledger.fail(outcome.key, attempt=attempt, why=UNTOLD if has_names else why)
            todo = [scan for scan in todo if scan.scan_id in failed]
            if not todo:
                return
    report.set_aside += sorted(failed.items())


def _without_names(set_aside: Sequence[tuple[str, str]], sources: Sources) -> list[tuple[str, str]]:
    """As the review may say it: folders and files of DICOM may be named after patients, ids are not."""
    if not sources.has_names:
        return list(set_aside)
    ids = {scan.scan_id for scan in sources.scans}
    return [(name if name in ids else "a series without an id", UNTOLD) for name, _ in set_aside]


def _tasks(todo: Sequence[ScanSource], task: Callable[[ScanSource], LabelTask]) -> Iterator[LabelTask]:
    for scan in todo:
        yield task(scan)


def _task_maker(
    run: str, fingerprint: str, ledger: Ledger, rule: LabelRule, overlap: float, executor: Executor
) -> Callable[[ScanSource], LabelTask]:
    threads = max(1, available_cores() // executor.workers)
    return lambda scan: LabelTask(run, fingerprint, scan, ledger.staging, rule, overlap, threads)


def _scan_id(task: LabelTask) -> str:
    return task.scan_id


def _identity(fingerprint: str, model: Model, rule: LabelRule, *, overlap: float) -> Mapping[str, Any]:
    """What decides the masks; another one does not go on in the same folder."""
    return {
        "model": fingerprint,
        "classes": list(model.class_names),
        "passes": rule.passes.passes,
        "threshold_nats": rule.threshold_nats,
        "quantile": rule.quantile,
        "min_similarity": rule.min_similarity,
        "overlap": overlap,
        "seed": rule.seed,
        "keep_largest": [model.class_names[value] for value in rule.keep_largest],
    }


def _say_how(model: Model, sources: Sources) -> None:
    if model.matcher is None:
        Console(stderr=True).print(
            f"note: the run's method, {model.info.method}, has no references: voxels in doubt take the teacher's argmax"
            " and are marked so in trust/",
            highlight=False,
        )
    wanted = {scan.scan_id for scan in sources.scans}
    records = sources.cohort.records if sources.cohort else []
    others = model.info.of_others(record.modality for record in records if record.scan_id in wanted)
    if others:
        Console(stderr=True).print(f"note: {others}", highlight=False)
    for name, why in sources.failures:
        Console(stderr=True).print(f"note: {name}: {why}", highlight=False, markup=False)
