"""Labels that real embeddings give to voxels a trained teacher is unsure of, on scans held out from training.

    python -m tests.bench embeddings --trained RUN --cohort COHORT [--json FILE]

RUN is any finished run (RUN/model) whose cohort has a labelled validation split. Synthetic clusters mislead here: how
well neighbours vote, and how many of them an approximate search misses, are properties of a trained network.

Queries: student embeddings of voxels with Eq 2's entropy >= 0.75 ln K, in patches uniform in the body of validation
scans. References: teacher embeddings of the run's labelled scans, the same number of each class: `surface` (bands just
inside and outside), `random` (in the body and in the object), `doubt` (entropy as the queries'), and `doubt as found`,
with the classes' own frequencies among doubtful voxels.

Keys, for each row NAME of the table: `embeddings.NAME.accuracy`, `.balanced` (mean over classes of the share found),
`.foreground` (share called foreground, against `embeddings.truth.foreground`), for IVF `.recall` against exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from distseg.data.cohort import Cohort
from distseg.data.keys import Purpose, generator, torch_generators
from distseg.data.patches import PatchReader
from distseg.inference.model import Model, load_model
from distseg.inference.whole_scan import WINDOWS_A_BATCH
from distseg.matching.index import build_index
from distseg.matching.prototypes import class_prototypes
from distseg.matching.surface import draw_references, surface_bands
from distseg.methods.uncertainty import uncertainty_and_label
from distseg.networks.stochastic import stochastic_logits

PER_CLASS = 25_000  # references, at most
PATCHES = {"labelled": 16, "held out": 8}  # of a scan
PASSES, NOISE_SIGMA = 5, 0.01  # the paper's
UNSURE = 0.75  # of ln K: the paper's threshold at T = 0
THINNED = 500  # references a class
SEED = 0


@dataclass(frozen=True)
class Patches:
    """All patches of one scan, flat over the P voxels they show, each voxel once."""

    teacher: Tensor  # float32 [P, E], deterministic pass
    student: Tensor  # float32 [P, E]
    truth: Tensor  # int64 [P]
    guess: Tensor  # int64 [P], argmax of the mean of the teacher's passes
    unsure: Tensor  # bool [P]
    band: Tensor  # bool [P], at a surface
    prototypes: Tensor  # [S, K, E] of the patches that have a surface, as the paper draws them
    patch: Tensor  # int64 [P], which patch


def run(trained: str | None = None, cohort: str | None = None) -> dict[str, float]:
    if trained is None or cohort is None:
        Console().print("embeddings: skipped, for it needs --trained RUN and --cohort COHORT")
        return {}
    torch.set_num_threads(1)
    model = load_model(trained)
    with open(f"{trained}/config.yaml", encoding="utf-8") as file:
        labelled_ids = yaml.safe_load(file)["plan"]["labelled"]
    opened = Cohort.open(cohort)
    held_out_ids = [record.scan_id for record in opened.select("val", True)]
    reader = PatchReader(opened, spacing_mm=model.spacing_mm, intensity=model.intensity, memory_nbytes=2**31)
    labelled = [_patches(model, reader, scan_id, PATCHES["labelled"], on_object=True) for scan_id in labelled_ids]
    held_out = [_patches(model, reader, scan_id, PATCHES["held out"], on_object=False) for scan_id in held_out_ids]
    return _report(labelled, held_out, len(model.class_names))


def _report(labelled: Sequence[Patches], held_out: Sequence[Patches], num_classes: int) -> dict[str, float]:
    queries = torch.cat([p.student[p.unsure] for p in held_out])  # [N, E]
    truth = torch.cat([p.truth[p.unsure] for p in held_out])  # [N]
    table, keys = Table(title=f"{len(truth)} voxels the teacher is unsure of, {len(held_out)} held-out scans"), {}
    for column in ("labels by", "references", "accuracy", "balanced", "foreground", "recall"):
        table.add_column(column, justify="left" if column in ("labels by", "references") else "right")

    def add(name: str, references: str, label: Tensor, recall: float | None = None) -> None:
        right = label == truth
        balanced = torch.stack([right[truth == c].float().mean() for c in range(num_classes)]).mean().item()
        scores = {
            "accuracy": right.float().mean().item(),
            "balanced": balanced,
            "foreground": (label > 0).float().mean().item(),
        } | ({} if recall is None else {"recall": recall})
        keys.update({f"embeddings.{name.replace(' ', '_')}.{key}": value for key, value in scores.items()})
        table.add_row(name, references, *(f"{value:.3f}" for value in scores.values()))

    keys["embeddings.truth.foreground"] = (truth > 0).float().mean().item()
    add("truth", "", truth)
    add("always background", "", torch.zeros_like(truth))
    add("teacher", "", torch.cat([p.guess[p.unsure] for p in held_out]))
    add("prototypes of the batch", "80 a class", _by_batch(labelled, held_out))
    for draw in ("surface", "random", "doubt", "doubt as found"):
        embeddings, classes = _bank(labelled, draw, num_classes)
        for name, references, label, recall in _by_bank(draw, embeddings, classes, queries, num_classes):
            add(name, references, label, recall)
    Console(width=100).print(table)
    return keys


def _by_batch(labelled: Sequence[Patches], held_out: Sequence[Patches]) -> Tensor:
    """The paper's matching: each unlabelled patch against one labelled patch with a surface, drawn at random."""
    prototypes = torch.cat([p.prototypes for p in labelled])  # [S, K, E]
    rng = np.random.default_rng(SEED)
    labels = []
    for patches in held_out:
        partner = torch.from_numpy(rng.integers(len(prototypes), size=int(patches.patch.max()) + 1))
        chosen = prototypes[partner[patches.patch[patches.unsure]]]  # [N, K, E]
        labels.append(torch.einsum("nke,ne->nk", chosen, patches.student[patches.unsure]).argmax(1))
    return torch.cat(labels)


def _bank(labelled: Sequence[Patches], draw: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """References of all labelled scans, in random order: embeddings [R, E] and classes [R]."""
    masks = {"surface": lambda p: p.band, "random": lambda p: torch.ones_like(p.band)}
    mask = masks.get(draw, lambda p: p.unsure)
    embeddings = torch.cat([p.teacher[mask(p)] for p in labelled])
    classes = torch.cat([p.truth[mask(p)] for p in labelled])
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(SEED))
    counts = classes.bincount(minlength=num_classes)
    most = PER_CLASS if draw.endswith("as found") else min(PER_CLASS, int(counts.min()))
    rows = torch.cat([order[classes[order] == c][:most] for c in range(num_classes)])
    return embeddings[rows], classes[rows]


def _by_bank(
    draw: str, embeddings: Tensor, classes: Tensor, queries: Tensor, num_classes: int
) -> Iterator[tuple[str, str, Tensor, float | None]]:
    """(name, references, labels [N], recall) of each way to ask a bank."""
    counts = " + ".join(str(int(n)) for n in classes.bincount(minlength=num_classes))
    unit, q = functional.normalize(embeddings, dim=1), functional.normalize(queries, dim=1)
    prototypes = torch.stack([unit[classes == c].mean(0) for c in range(num_classes)])
    yield f"{draw} prototypes", counts, (q @ prototypes.T).argmax(1), None
    exact = build_index(embeddings, classes, num_classes=num_classes, backend="torch")
    found = {k: exact.find(queries, k) for k in (1, 5, 15)}
    for k, ids in found.items():
        yield f"{draw} {k} nearest", counts, _closest_class(q, unit, ids), None
    yield f"{draw} 15 nearest majority", counts, _majority(q, unit, found[15]), None
    ivf = build_index(embeddings, classes, num_classes=num_classes, backend="faiss", kind="ivf")
    ids = ivf.find(queries, 15)
    recall = (ids[..., :, None] == found[15][..., None, :]).any(-1).float().mean().item()
    yield f"{draw} 15 nearest ivf", counts, _closest_class(q, unit, ids), recall
    for how, rows in (("random", _first(classes, num_classes)), ("coreset", _coreset(unit, classes, num_classes))):
        thin = build_index(embeddings[rows], classes[rows], num_classes=num_classes, backend="torch")
        ids = rows[thin.find(queries, min(15, int(classes[rows].bincount().min())))]
        yield f"{draw} 15 nearest thinned {how}", f"{THINNED} a class", _closest_class(q, unit, ids), None


def _closest_class(queries: Tensor, references: Tensor, ids: Tensor) -> Tensor:
    """The class whose references found, ids [N, K, k], are most similar on average: [N]."""
    parts = zip(queries.split(4096), ids.split(4096), strict=True)
    return torch.cat([torch.einsum("ne,ncke->nc", q, references[i]).argmax(1) for q, i in parts])


def _majority(queries: Tensor, references: Tensor, ids: Tensor) -> Tensor:
    """The most frequent class among the k most similar of all classes: [N]."""
    _, num_classes, k = ids.shape
    parts = zip(queries.split(4096), ids.split(4096), strict=True)
    similarity = torch.cat([torch.einsum("ne,ncke->nck", q, references[i]) for q, i in parts])
    winners = similarity.flatten(1).topk(k, dim=1).indices // k  # [N, k] classes
    return functional.one_hot(winners, num_classes).sum(1).argmax(1)


def _first(classes: Tensor, num_classes: int) -> Tensor:
    """The first THINNED rows a class; rows of a bank are in random order."""
    return torch.cat([(classes == c).nonzero()[:THINNED, 0] for c in range(num_classes)])


def _coreset(unit: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Greedy k-centre (Sener and Savarese 2018) a class: each row taken is the one least similar to those before."""
    chosen = []
    for c in range(num_classes):
        rows = (classes == c).nonzero().flatten()
        closest = torch.full((len(rows),), -torch.inf)
        taken = [0]
        while len(taken) < min(THINNED, len(rows)):
            closest = torch.maximum(closest, unit[rows] @ unit[rows[taken[-1]]])
            closest[taken[-1]] = torch.inf  # a zero embedding is not similar even to itself
            taken.append(int(closest.argmin()))
        chosen.append(rows[torch.tensor(taken)])
    return torch.cat(chosen)


@torch.inference_mode()
def _patches(model: Model, reader: PatchReader, scan_id: str, count: int, *, on_object: bool) -> Patches:
    """`count` patches of a scan, uniform in its body, or every other one around a foreground voxel."""
    size, number = model.patch_zyx, int.from_bytes(scan_id.encode()[-4:], "big")
    rng = generator(SEED, Purpose.VALIDATION, number)
    placement = reader.placement(scan_id)
    foreground = np.concatenate([*placement.foreground.values(), np.empty((0, 3), np.int32)])
    centres = [placement.body[rng.integers(len(placement.body))] for _ in range(count)]
    if on_object and len(foreground):
        centres[::2] = [foreground[rng.integers(len(foreground))] for _ in centres[::2]]
    starts = [tuple(int(c) - n // 2 for c, n in zip(centre, size, strict=True)) for centre in centres]
    images = torch.from_numpy(np.stack([reader.image(scan_id, start, size) for start in starts]))[:, None]
    labels = np.stack([reader.label(scan_id, start, size) for start in starts])
    num_classes = len(model.class_names)
    bands = [surface_bands(label, num_classes) for label in labels]
    drawn = [draw_references(band, k=16, draws=5, generator=rng) for band in bands]
    parts = []
    for first in range(0, count, WINDOWS_A_BATCH):
        some = slice(first, min(first + WINDOWS_A_BATCH, count))
        keys = torch_generators(SEED, Purpose.TEACHER, number, range(some.start, some.stop), PASSES)
        passes = stochastic_logits(
            model.networks["teacher"], images[some], passes=PASSES, noise_sigma=NOISE_SIGMA, generators=keys
        )
        entropy, guess = uncertainty_and_label(passes, uncertainty="mean_of_entropies")
        embedded = {name: network(images[some]).embeddings for name, network in model.networks.items()}
        index = torch.from_numpy(np.stack([voxels for voxels, _ in drawn[some]]))
        parts.append(
            (embedded["teacher"], embedded["student"], guess, entropy, class_prototypes(embedded["teacher"], index))
        )
    teacher, student, guess, entropy, prototypes = (torch.cat(column) for column in zip(*parts, strict=True))
    once = _each_voxel_once(starts, size, reader.shape(scan_id))
    whole = torch.tensor([bool(present.all()) for _, present in drawn])
    return Patches(
        teacher=teacher.movedim(1, -1).flatten(0, 3)[once].clone(),
        student=student.movedim(1, -1).flatten(0, 3)[once].clone(),
        truth=torch.from_numpy(labels).long().flatten()[once],
        guess=guess.flatten()[once],
        unsure=(entropy.flatten() >= UNSURE * math.log(num_classes))[once],
        band=torch.from_numpy(np.stack([np.any(band, axis=0) for band in bands])).flatten()[once],
        prototypes=prototypes[whole],
        patch=torch.arange(count).repeat_interleave(math.prod(size))[once],
    )


def _each_voxel_once(starts: Sequence[Sequence[int]], size: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Flat positions in the stacked patches: every voxel of the scan that they show, in the first that shows it."""
    low = np.asarray(starts)[:, :, None, None, None]  # [S, 3, 1, 1, 1]
    voxels = (low + np.indices(size)).transpose(1, 0, 2, 3, 4).reshape(3, -1)  # [3, S Z Y X]
    inside = np.flatnonzero(((voxels >= 0) & (voxels < np.asarray(shape)[:, None])).all(0))
    _, first = np.unique(np.ravel_multi_index(tuple(voxels[:, inside]), tuple(shape)), return_index=True)
    return torch.from_numpy(inside[first])
