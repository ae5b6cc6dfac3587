"""Labelling beside the network alone, and beside a plain script.

By default phantoms at 4 mm and an untrained network of preset `small` (32^3, overlap 0.5, M = 5) with a bank of its own
embeddings, its threshold set so that 0.5 % of the voxels are in doubt; with --trained and --cohort a run's model on up
to 20 scans of a cohort at its spacing (--scans: fewer), overlap 0.25, once each. One thread a process; what is compared
is timed in turns. Keys:
  label.share_of_network_speed   seconds of the very same batches of windows, passes and generators, and nothing else /
                                 seconds of `label_cohort` on the scans: reading, blending, matching, writing, ledger
  label.share_of_network_cpu     the same in CPU time of the process: what a busy machine cannot blur, and what one core
                                 without another to overlap on would see
  label.voxels_per_s             of the run's grid, end to end
  label.plain_over_ours          seconds of a plain script (nibabel, MONAI's sliding_window_inference, M passes, mean,
                                 argmax, save) / ours with what the script has not left out: matching, the component
                                 filter
  label.plain_over_ours_cpu      the same in CPU time
  label.plain_voxels_per_s       of the script
  label.same_as_plain            share of the voxels of up to 5 scans with the same label; passes draw other dropout
                                 and noise
  label.same_as_plain_quiet      the same with dropout and noise of 0 in both: what differs is Gaussian weights near a
                                 window's corner, and float32 sums in another order
  label.foreground_dice_quiet    of those masks, all foreground as one: most voxels are air, which nobody gets wrong
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from rich.console import Console

from distseg.config.compose import train_config
from distseg.config.schema import MatchingConfig
from distseg.config.verbs import LabelSectionConfig
from distseg.data.cohort import Cohort
from distseg.data.intensity import Intensity
from distseg.data.nifti import read_nifti
from distseg.data.phantom import make_phantom
from distseg.errors import FinishedWithFailures
from distseg.inference import teacher_passes
from distseg.inference.model import ModelInfo, build_network, save_model
from distseg.inference.whole_scan import cached_model, model_fingerprint
from distseg.matching.references import ReferenceTable
from distseg.networks import stochastic
from distseg.networks.dropout import dropout_active
from distseg.networks.stochastic import pass_outputs
from distseg.work.executor import Executor, LocalExecutor
from distseg.work.label_cohort import label_cohort
from distseg.work.label_task import label_one

SPACING_MM, PHANTOMS, MOST_SCANS, COMPARED_SCANS = (4.0, 4.0, 4.0), 3, 20, 5
DOUBTFUL = 0.005


def run(
    trained: str | None = None, cohort: str | None = None, scans: int | None = None, rounds: int = 3
) -> dict[str, float]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as scratch:
        keys = Bench(Path(scratch), trained, cohort, scans).shares(1 if trained else rounds)
    Console().print({key: round(value, 4) for key, value in keys.items()})
    return keys


class Bench:
    """A run, a folder of images at its spacing, and settings."""

    def __init__(self, scratch: Path, trained: str | None, cohort: str | None, scans: int | None) -> None:
        self.scratch, self.outputs = scratch, 0
        self.images = scratch / "images"
        self.images.mkdir()
        self.settings = LabelSectionConfig(review_scans=0, attempts=1)
        if trained is not None and cohort is not None:
            self.run, self.settings.overlap = trained, 0.25
            self._write_cohort(Cohort.open(cohort), scans or MOST_SCANS)
        else:
            self.run = untrained_run(scratch)
            for number in range(min(scans or PHANTOMS, PHANTOMS)):
                write_image(self.images / f"phantom_{number}.nii.gz", make_phantom(number).image, SPACING_MM)
            self.settings.threshold = self._threshold_of(DOUBTFUL)
        self.model, _ = cached_model(self.run, model_fingerprint(self.run))

    def shares(self, rounds: int) -> dict[str, float]:
        recorded: list[Callable[[], object]] = []
        with _recording(recorded):
            facts = self.label()
        voxels = sum(line["voxels"] for line in facts)
        no_matching = dataclasses.replace(self.settings, threshold=99.0, components="all")
        images = sorted(self.images.iterdir())
        work: dict[str, Callable[[], object]] = {
            "end to end": self.label,
            "alone": lambda: [replay() for replay in recorded],
            "no matching": lambda: self.label(no_matching),
            "plain": lambda: [self._plain(image) for image in images],
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
        for _ in range(rounds):  # interleaved: a machine that drifts drifts for all alike
            for name, function in work.items():
                seconds[name].append(_timed(function))
                print(name, seconds[name][-1], flush=True)
        median, cpu = (
            {name: statistics.median(t[i] for t in taken) for name, taken in seconds.items()} for i in (0, 1)
        )
        Console().print({name: f"{median[name]:.2f} s, {cpu[name]:.2f} s of CPU" for name in work})
        same, _ = self._agreement(no_matching)
        with _quiet(self.model.networks["teacher"]):
            same_quiet, dice = self._agreement(no_matching)
        return {
            "label.share_of_network_speed": median["alone"] / median["end to end"],
            "label.share_of_network_cpu": cpu["alone"] / cpu["end to end"],
            "label.voxels_per_s": voxels / median["end to end"],
            "label.plain_over_ours": median["plain"] / median["no matching"],
            "label.plain_over_ours_cpu": cpu["plain"] / cpu["no matching"],
            "label.plain_voxels_per_s": voxels / median["plain"],
            "label.same_as_plain": same,
            "label.same_as_plain_quiet": same_quiet,
            "label.foreground_dice_quiet": dice,
        }

    def _agreement(self, settings: LabelSectionConfig) -> tuple[float, float]:
        """Share of voxels that the script labels as we do, and Dice of the two foregrounds."""
        some = self.scratch / "compared"
        if not some.exists():
            some.mkdir()
            for image in sorted(self.images.iterdir())[:COMPARED_SCANS]:
                os.link(image, some / image.name)
        self.label(settings, cohort=some)
        same = voxels = both = either = 0
        for image in sorted(some.iterdir()):
            ours = read_nifti(self.scratch / f"out_{self.outputs - 1}" / "masks" / image.name).array
            plain = self._plain(image)
            same, voxels = same + int((ours == plain).sum()), voxels + plain.size
            both += 2 * int(((ours > 0) & (ours == plain)).sum())
            either += int((ours > 0).sum() + (plain > 0).sum())
        return same / voxels, both / max(1, either)

    def label(
        self,
        settings: LabelSectionConfig | None = None,
        *,
        cohort: Path | None = None,
        executor: Executor | None = None,
    ) -> list[dict[str, Any]]:
        """Label the images into a new output; the ledger's facts."""
        facts: list[dict[str, Any]] = []
        output = self.scratch / f"out_{self.outputs}"
        self.outputs += 1

        def labeller(task: Any) -> Any:
            made = label_one(task)
            facts.append(made.facts)
            return made

        report = label_cohort(
            run=self.run, cohort=str(cohort or self.images), output=str(output), settings=settings or self.settings,
            executor=executor or LocalExecutor(1, at_once=2), progress=False,
            labeller=label_one if executor else labeller,
        )  # fmt: skip
        if report.set_aside:
            raise FinishedWithFailures("the bench's own scans", report.set_aside)
        return facts

    def _threshold_of(self, share: float) -> float:
        settings = dataclasses.replace(self.settings, quantile=1 - share)
        return float(statistics.median(line["threshold_nats"] for line in self.label(settings)))

    @torch.inference_mode()
    def _plain(self, image: Path) -> np.ndarray:
        """What one writes in an afternoon; returns the mask [Z, Y, X]."""
        volume = read_nifti(image)
        teacher, info = self.model.networks["teacher"], self.model.info
        array = self.model.intensity.normalise(
            volume.array, nonzero_mean=float(volume.array.mean()), nonzero_sd=float(volume.array.std())
        )
        batch, mean = torch.from_numpy(array)[None, None], torch.zeros(())
        for _ in range(info.passes):
            with dropout_active(teacher):
                mean = mean + sliding_window_inference(
                    stochastic.add_noise(batch, info.teacher_noise_sigma), info.patch_zyx, 4,
                    lambda windows: torch.softmax(teacher(windows).logits, 1), overlap=self.settings.overlap,
                    mode="gaussian",
                )  # fmt: skip
        mask = mean.argmax(1)[0].to(torch.uint8).numpy()
        write_image(self.scratch / "plain.nii.gz", mask, info.spacing_mm)
        return mask

    def _write_cohort(self, cohort: Cohort, count: int) -> None:
        for record in cohort.records[:count]:
            scan = cohort.scan(record.scan_id)
            write_image(self.images / f"{record.scan_id}.nii.gz", np.asarray(scan.image[...]), scan.geometry.spacing_mm)


@contextlib.contextmanager
def _quiet(network: torch.nn.Module) -> Iterator[None]:
    """Inside, dropout drops nothing and no noise is added: each pass is the network."""
    dropouts = [(module, module.p) for module in network.modules() if hasattr(module, "p")]
    for module, _ in dropouts:
        module.p = 1e-9
    try:
        with mock.patch.object(stochastic, "add_noise", lambda images, *_: images):
            yield
    finally:
        for module, p in dropouts:
            module.p = p


@contextlib.contextmanager
def _recording(replays: list[Callable[[], object]]) -> Iterator[None]:
    """Inside, the passes of every batch of windows are noted as functions that run them again."""
    kind = teacher_passes.TeacherPasses
    before_run, before_embeddings = kind._run, kind.embeddings

    def _run(self: Any, windows: Any, numbers: Any) -> torch.Tensor:
        images, s = torch.stack(list(windows))[:, None].clone(), self._settings

        def again() -> None:
            with torch.inference_mode():
                for _ in pass_outputs(
                    self._teacher, images, passes=s.passes, noise_sigma=s.noise_sigma,
                    generators=self._generators(numbers),
                ):  # fmt: skip
                    pass

        replays.append(again)
        return before_run(self, windows, numbers)

    def embeddings(self: Any, windows: Any) -> torch.Tensor:
        images = torch.stack(list(windows))[:, None].clone()

        def again() -> None:
            with torch.inference_mode():
                self._teacher(images)

        replays.append(again)
        return before_embeddings(self, windows)

    with mock.patch.object(kind, "_run", _run), mock.patch.object(kind, "embeddings", embeddings):
        yield


def untrained_run(scratch: Path) -> str:
    config = train_config(cohort="-", run="-", preset="small", overrides={})
    z, y, x = config.sampling.patch_zyx
    info = ModelInfo(
        class_names=("background", "hip_bone"), modality="CT", spacing_mm=SPACING_MM, patch_zyx=(z, y, x),
        network=config.network, intensity=Intensity("ct", -200.0, 1200.0, 300.0, 300.0), method="embedding_matching",
        threshold_nats=0.52, step=1, checkpoint="last", passes=config.method.passes,
    )  # fmt: skip
    torch.manual_seed(0)
    network = build_network(config.network, num_classes=2)
    weights = network.state_dict()
    with torch.inference_mode():
        embeddings = network.eval()(torch.randn(1, 1, z, y, x)).embeddings[0].flatten(1).T[:6000].clone()
    count = len(embeddings)
    table = ReferenceTable(1, 1, embeddings, torch.arange(count) % 2, torch.zeros(count, dtype=torch.int64), ("-",))
    run = scratch / "run"
    run.mkdir()
    save_model(
        run / "model", info, {"student": weights, "teacher": weights}, references=table,
        matching=MatchingConfig(kind="index"),
    )  # fmt: skip
    return str(run)


def write_image(path: Path, array: np.ndarray, spacing_mm: Any) -> None:
    """[Z, Y, X] as a file with axes x, y, z towards L, P, S."""
    z, y, x = spacing_mm
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), np.diag([-x, -y, z, 1.0])), path)


def _timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of CPU."""
    begun = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]
