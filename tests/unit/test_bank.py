"""The bank: its table, how found references speak, and embedding matching against it, by hand and by brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distseg.config.schema import MatchingConfig, MethodConfig, ReferencesConfig
from distseg.errors import ConfigError, DataError
from distseg.matching.bank import (
    Bank,
    bank_from_parts,
    bank_parts,
    build_bank_index,
    load_bank,
    load_matcher,
    open_bank,
    save_bank,
)
from distseg.matching.prototypes import NO_REFERENCES
from distseg.matching.references import ReferenceTable, choose_voxels, join, load_table, save_table
from distseg.matching.similarity import class_scores, found_similarity, majority, pairwise_similarity
from distseg.matching.surface import surface_bands
from distseg.methods.bank_matching import BankMatching, choose_queries
from distseg.methods.base import Targets
from distseg.methods.embedding_matching import EmbeddingMatching
from distseg.networks.unet import NetworkOutput
from distseg.training.bank import newest_version_after, version_serving

F64 = torch.float64
CPU = torch.device("cpu")


class BruteForce:
    """Cosine in float64, query by query, class by class."""

    def __init__(self, table: ReferenceTable) -> None:
        self.table = table

    def find(self, queries: Tensor, k: int) -> Tensor:
        found = []
        for q in queries.double():
            cosines = torch.stack([torch.cosine_similarity(q, r, dim=0) for r in self.table.embeddings.double()])
            found.append(
                [
                    sorted(torch.nonzero(self.table.classes == c).flatten().tolist(), key=lambda r: -cosines[r])[:k]
                    for c in torch.unique(self.table.classes).tolist()
                ]
            )
        return torch.tensor(found, dtype=torch.int64).view(len(queries), len(torch.unique(self.table.classes)), k)


def make_table(seed: int = 0, counts: tuple[int, ...] = (7, 5), width: int = 3) -> ReferenceTable:
    random = torch.Generator().manual_seed(seed)
    classes = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    return ReferenceTable(
        version=2,
        step=100,
        embeddings=torch.randn(len(classes), width, generator=random),
        classes=classes,
        scans=torch.arange(len(classes)) % 3,
        scan_ids=("a", "b", "c"),
    )


def brute_bank(table: ReferenceTable, num_classes: int = 2, **matching: object) -> Bank:
    config = MatchingConfig(kind="index", **matching)
    return open_bank(table, config, num_classes=num_classes, finder=BruteForce(table))


# The table


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    table = make_table()
    save_table(tmp_path, table)
    again = load_table(tmp_path)
    assert (again.version, again.step, again.scan_ids) == (2, 100, ("a", "b", "c"))
    for name in ("embeddings", "classes", "scans"):
        assert torch.equal(getattr(again, name), getattr(table, name))


def test_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no reference table here"):
        load_table(tmp_path)
    save_table(tmp_path, make_table())
    file = tmp_path / "table.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="unreadable reference table"):
        load_table(tmp_path)
    file.write_bytes(whole.replace(b'"format":"1"', b'"format":"9"'))
    with pytest.raises(DataError, match=r"another format \(got 9\)"):
        load_table(tmp_path)


def test_without_a_scan() -> None:
    table = make_table(counts=(90, 10))
    rest = table.without("b")
    assert torch.equal(rest.embeddings, table.embeddings[table.scans != 1])
    assert torch.equal(rest.classes, table.classes[table.scans != 1])
    assert 1 not in rest.scans


@given(order=st.permutations(range(5)))
def test_pieces_join_in_one_order(order: list[int]) -> None:
    """By scan, class, then draw, whoever made them: patches 0 and 3 are of scan 1, the others of scan 0."""
    pieces = [
        (n, int(n in (0, 3)), torch.tensor([[n, 0.0], [n, 1.0], [n, 2.0]]), torch.tensor([1, 0, 1])) for n in range(5)
    ]
    table = join(3, 60, [pieces[n] for n in order], ("a", "b"))
    assert (table.version, table.step) == (3, 60)
    assert table.scans.tolist() == [0] * 9 + [1] * 6
    assert table.classes.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    rows = [(1, 1), (2, 1), (4, 1), (1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (4, 2)]
    rows += [(0, 1), (3, 1), (0, 0), (0, 2), (3, 0), (3, 2)]
    assert [tuple(row) for row in table.embeddings.int().tolist()] == rows


# Which voxels


@pytest.mark.parametrize("draw", ["surface", "random", "doubt"])
@pytest.mark.parametrize("balanced", [True, False])
def test_chosen_voxels_are_what_they_are_called(draw: str, balanced: bool) -> None:
    label = np.zeros((6, 6, 6), np.uint8)
    label[1:4, 1:4, 1:4] = 1
    label[4:, 4:, 4:] = 2
    doubt = np.random.default_rng(0).random(label.shape)
    bands = surface_bands(label, 3)

    def choose() -> np.ndarray:
        return choose_voxels(
            draw, label=label, doubt=doubt, bands=bands, count=18, balanced=balanced,
            generator=np.random.default_rng(1),
        )  # fmt: skip

    voxels = choose()
    assert len(set(voxels.tolist())) == len(voxels) <= 18
    assert np.array_equal(voxels, choose())
    classes = label.ravel()[voxels]
    if balanced or draw == "surface":
        assert np.bincount(classes, minlength=3).tolist() == [6, 6, 6]
    if draw == "surface":
        assert all(bands[c].ravel()[v] for c, v in zip(classes, voxels, strict=True))
    if draw == "doubt":
        for c in range(3) if balanced else [None]:
            pool = np.flatnonzero(label.ravel() == c) if c is not None else np.arange(label.size)
            chosen = voxels[classes == c] if c is not None else voxels
            most = np.sort(doubt.ravel()[pool])[-len(chosen) :]
            assert np.array_equal(np.sort(doubt.ravel()[chosen]), most)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_patch_gives_no_more_than_its_share_of_the_cap(count: int) -> None:
    label = (np.arange(64).reshape(4, 4, 4) % 3).astype(np.uint8)
    voxels = choose_voxels(
        "random", label=label, doubt=np.zeros(label.shape), bands=surface_bands(label, 3), count=count, balanced=True,
        generator=np.random.default_rng(0),
    )  # fmt: skip
    assert 1 <= len(voxels) <= count


def test_a_cap_below_a_reference_a_patch_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"references\.max_count: value not allowed \(got 10\); must be at least references"
    ):
        ReferencesConfig(patches=32, max_count=10)


def test_equal_doubt_falls_by_lot_and_an_absent_class_gives_none() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    voxels = choose_voxels(
        "doubt", label=label, doubt=np.zeros(label.shape), bands=surface_bands(label, 2), count=8, balanced=True,
        generator=np.random.default_rng(0),
    )  # fmt: skip
    assert len(voxels) == 8
    assert sorted(voxels.tolist()) != list(range(8))
    none = choose_voxels(
        "surface", label=label, doubt=np.zeros(label.shape), bands=surface_bands(label, 2), count=8, balanced=True,
        generator=np.random.default_rng(0),
    )  # fmt: skip
    assert none.tolist() == []


# How references speak


@pytest.mark.parametrize("similarity", ["cosine", "euclid"])
def test_similarities_by_loop(similarity: str) -> None:
    random = torch.Generator().manual_seed(0)
    queries, references = torch.randn(2, 3, 4, generator=random), torch.randn(2, 2, 5, 4, generator=random)
    pairs = pairwise_similarity(queries, references, similarity=similarity)
    for b, n, c, r in np.ndindex(2, 3, 2, 5):
        q, reference = queries[b, n], references[b, c, r]
        cosine = float(q @ reference / q.norm() / reference.norm())
        expected = cosine if similarity == "cosine" else 1 / (1 + float((q - reference).norm()))
        assert float(pairs[b, n, c, r]) == pytest.approx(expected, abs=1e-6)
    found = found_similarity(queries[0], references[0].expand(3, -1, -1, -1), similarity=similarity)
    torch.testing.assert_close(found, pairs[0])


def test_a_query_on_its_reference_has_a_finite_gradient() -> None:
    query = torch.ones(1, 3, requires_grad=True)
    found_similarity(query, torch.ones(1, 1, 1, 3), similarity="euclid").sum().backward()
    assert query.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_votes_by_hand() -> None:
    """Similarities .9 .1 .1 to class 0 and .5 .5 .4 to class 1: the maximum is class 0's, the mean class 1's; of the
    three nearest, .9 .5 .5, two are class 1's."""
    s = torch.tensor([[[0.9, 0.1, 0.1], [0.5, 0.5, 0.4]]], dtype=F64)
    assert class_scores(s, reduction="mean").tolist()[0] == pytest.approx([1.1 / 3, 1.4 / 3])
    assert class_scores(s, reduction="max").tolist() == [[0.9, 0.5]]
    w = [math.exp(9), math.exp(1)]  # temperature .1
    soft = (0.9 * w[0] + 0.2 * w[1]) / (w[0] + 2 * w[1])
    assert class_scores(s, reduction="softmax", temperature=0.1)[0, 0].item() == pytest.approx(soft)
    assert majority(s).tolist() == [1]
    # One vote each of two: the more similar wins.
    assert majority(torch.tensor([[[0.2, 0.1], [0.3, 0.0]], [[0.4, 0.1], [0.3, 0.2]]])).tolist() == [1, 0]


@given(seed=st.integers(0, 1000), count=st.integers(1, 6), num_classes=st.integers(2, 4))
def test_majority_by_loop(seed: int, count: int, num_classes: int) -> None:
    s = torch.rand(4, num_classes, count, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for row, winner in zip(s, majority(s).tolist(), strict=True):
        nearest = sorted(((float(v), c) for c, of in enumerate(row) for v in of), reverse=True)[:count]
        votes = {c: [v for v, of in nearest if of == c] for c in range(num_classes)}
        assert winner == max(votes, key=lambda c: (len(votes[c]), sum(votes[c])))


# The bank


@pytest.mark.parametrize("similarity", ["cosine", "euclid"])
def test_a_bank_comes_back_and_travels(tmp_path: Path, similarity: str) -> None:
    config = MatchingConfig(kind="index", k=3, similarity=similarity)
    table = make_table(counts=(20, 0, 10))  # of class 1 there is no reference
    index = build_bank_index(table, config, num_classes=3, seed=0)
    save_bank(tmp_path, table, config, index)
    bank = open_bank(table, config, num_classes=3, finder=index)
    queries = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    rows = bank.find(queries)
    assert rows.shape == (8, 2, 3)
    assert bool((table.classes[rows] == torch.tensor([0, 2])[None, :, None]).all())
    loaded = load_bank(tmp_path, num_classes=3, device=CPU)
    travelled = bank_from_parts(bank_parts(bank), num_classes=3, device=CPU)
    for other in (loaded, travelled):
        assert torch.equal(other.find(queries), rows)
        assert (other.version, other.step, other.k, other.present.tolist()) == (2, 100, 3, [True, False, True])
    scores = bank.scores(bank.similarities(queries, rows))
    assert scores.shape == (8, 3)
    assert bool((scores[:, 1] == NO_REFERENCES).all())
    assert set(bank.classes(bank.similarities(queries, rows)).tolist()) <= {0, 2}
    classes, again = load_matcher(tmp_path, num_classes=3, device=CPU).match(queries)
    assert torch.equal(again, scores)
    assert torch.equal(classes, scores.argmax(1))


def test_k_is_at_most_what_the_rarest_class_has_and_it_is_said() -> None:
    bank = brute_bank(make_table(counts=(20, 4)), k=15)
    assert bank.k == 4
    assert "matching.k=15 is taken as 4, all that the rarest class has" in bank.chosen
    assert "taken as" not in brute_bank(make_table(counts=(20, 4)), k=4).chosen


def test_a_damaged_bank_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unreadable bank"):
        load_bank(tmp_path, num_classes=2, device=CPU)
    (tmp_path / "bank.json").write_text('{"format": 7}')
    with pytest.raises(DataError, match=r"bank of another format \(got 7\)"):
        load_bank(tmp_path, num_classes=2, device=CPU)
    (tmp_path / "bank.json").write_text('{"format": 1, "index": "", "matching": {"kind": "index", "sorcery": 1}}')
    with pytest.raises(DataError, match="sorcery"):
        load_bank(tmp_path, num_classes=2, device=CPU)


@pytest.mark.parametrize(("similarity", "reduction"), [("cosine", "mean"), ("cosine", "max"), ("euclid", "softmax")])
def test_a_saved_prototype_matcher_is_the_loop(tmp_path: Path, similarity: str, reduction: str) -> None:
    config = MatchingConfig(kind="prototypes", similarity=similarity, reduction=reduction)
    table = make_table(counts=(6, 0, 4))
    save_bank(tmp_path, table, config, None)
    queries = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    classes, scores = load_matcher(tmp_path, num_classes=3, device=CPU).match(queries)
    for c in (0, 2):
        references = table.embeddings[table.classes == c].expand(5, 1, -1, -1)
        pairs = found_similarity(queries, references, similarity=similarity)[:, 0]
        torch.testing.assert_close(scores[:, c], class_scores(pairs, reduction=reduction))
    assert bool((scores[:, 1] == NO_REFERENCES).all())
    assert torch.equal(classes, scores.argmax(1))


# Which version serves which step


@pytest.mark.parametrize("every", [1, 3, 50])
def test_a_version_serves_the_steps_that_design_says(every: int) -> None:
    """Version v > 0: steps (v + 1) R + 1 to (v + 2) R; version 0: 1 to 2 R; none serves before it is made."""
    for step in range(1, 6 * every + 1):
        serving = [v for v in range(8) if (v + 1) * every + 1 <= step <= (v + 2) * every] or [0]
        assert [version_serving(step, every)] == serving
        assert version_serving(step, every) * every < step
        assert version_serving(step, every) <= newest_version_after(step - 1, every)


# Queries


@given(seed=st.integers(0, 1000), count=st.integers(1, 30), share=st.floats(0, 1))
def test_queries_are_eligible_voxels(seed: int, count: int, share: float) -> None:
    random = torch.Generator().manual_seed(seed)
    eligible = torch.rand(2, 2, 3, 4, generator=random) < share
    generators = [torch.Generator().manual_seed(seed + b) for b in range(2)]
    voxels, valid = choose_queries(eligible, count, generators)
    for b in range(2):
        there = int(eligible[b].sum())
        assert int(valid[b].sum()) == min(there, count, 24)
        chosen = voxels[b][valid[b]]
        assert bool(eligible[b].flatten()[chosen].all())
        assert len(set(voxels[b].tolist())) == voxels.shape[1]
    alone, _ = choose_queries(eligible[1:], count, [torch.Generator().manual_seed(seed + 1)])
    assert torch.equal(alone[0], voxels[1])  # a slot's lots are its own
    everything, valid = choose_queries(eligible, None, None)
    assert everything[1].tolist() == list(range(24))
    assert torch.equal(valid, eligible.flatten(1))


# The method


def student(seed: int, *, requires_grad: bool = False) -> NetworkOutput:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 2, 2, 2, 3, generator=random, dtype=F64)
    embeddings = torch.randn(2, 3, 2, 2, 3, generator=random, dtype=F64)
    return NetworkOutput(logits, embeddings.requires_grad_(requires_grad))


def bank_targets(bank: Bank, seed: int, count: int | None, *, everywhere: bool = False) -> Targets:
    random = torch.Generator().manual_seed(seed)
    reliable = torch.rand(2, 2, 2, 3, generator=random) < 0.5
    lots = [torch.Generator().manual_seed(seed + b) for b in range(2)]
    return Targets(
        label=torch.randint(2, (2, 2, 2, 3), generator=random),
        reliable=reliable,
        hidden=torch.randint(-1, 2, (2, 2, 2, 3), generator=random),
        queries=choose_queries(~reliable, count, lots),
        entropy_queries=choose_queries(torch.ones_like(reliable), None, None) if everywhere else None,
        bank=bank,
    )


def bank_method(**matching: object) -> BankMatching:
    config = MatchingConfig(kind="index", **matching)
    return BankMatching(MethodConfig(), num_classes=2, matching=config, bank_of=lambda step: pytest.fail(str(step)))


@pytest.mark.parametrize("count", [None, 3])
def test_terms_by_loop(count: int | None) -> None:
    """Voxel by voxel: the k nearest of each class by brute force, their mean cosine, Eq 3 and Eq 4 where it matches."""
    bank, output = brute_bank(make_table(), k=3), student(1)
    targets = bank_targets(bank, 2, count)
    terms = bank_method(k=3).terms(output, targets)
    for b in range(2):
        nll, entropies, right = [], [], []
        for voxel, valid in zip(targets.queries.voxels[b].tolist(), targets.queries.valid[b].tolist(), strict=True):
            if not valid:
                continue
            q = output.embeddings[b].flatten(1)[:, voxel]
            means = []
            for c in range(2):
                of_class = bank.table.embeddings[bank.table.classes == c].double()
                cosines = sorted((float(torch.cosine_similarity(q, r, dim=0)) for r in of_class), reverse=True)
                means.append(sum(cosines[:3]) / 3)
            label = int(means[1] > means[0])
            p = torch.softmax(output.logits[b].flatten(1)[:, voxel], 0)
            nll.append(-math.log(p[label]))
            share = math.exp(means[1]) / (math.exp(means[0]) + math.exp(means[1]))
            entropies.append(-share * math.log(share) - (1 - share) * math.log(1 - share))
            truth = int(targets.hidden[b].flatten()[voxel])
            right += [label == truth] if truth >= 0 else []
        assert terms.losses["nn"][b].item() == pytest.approx(np.mean(nll), abs=1e-6)
        assert terms.losses["en"][b].item() == pytest.approx(np.mean(entropies), abs=1e-6)
        reliable = targets.reliable[b].flatten()
        sure = torch.log_softmax(output.logits[b].flatten(1), 0).gather(0, targets.label[b].flatten()[None])[0]
        assert terms.losses["ua"][b].item() == pytest.approx(float(-sure[reliable].mean()))
        assert [s[b].item() for s in terms.shares["coverage_matched"]] == [len(nll), 12]
        assert [s[b].item() for s in terms.shares["matched_accuracy"]] == [sum(right), len(right)]


@pytest.mark.parametrize("vote", ["score", "majority"])
def test_a_bank_that_is_the_batch_is_the_prototypes(vote: str) -> None:
    """All references of a class found, all voxels queried, L_EN over all voxels: the same terms and the same gradient
    of L_EN, which finite differences confirm."""
    random = torch.Generator().manual_seed(3)
    references = torch.randn(2, 5, 3, generator=random, dtype=F64)  # [K, R, E], of both slots
    table = ReferenceTable(
        0, 0, references.flatten(0, 1), torch.arange(2).repeat_interleave(5), torch.zeros(10, dtype=torch.int64), ("a",)
    )
    bank = brute_bank(table, k=5, vote=vote)
    prototypes = torch.nn.functional.normalize(references, dim=-1).mean(1)
    ours, theirs = student(4, requires_grad=True), student(4, requires_grad=True)
    targets = bank_targets(bank, 5, None, everywhere=True)
    closed = Targets(
        label=targets.label,
        reliable=targets.reliable,
        references=prototypes.expand(2, -1, -1),
        present=torch.ones(2, 2, dtype=torch.bool),
    )
    by_eq_4 = MethodConfig(entropy_over="all")
    method = EmbeddingMatching(by_eq_4, num_classes=2, matching=MatchingConfig(), draws=1)
    by_bank, by_prototypes = bank_method(k=5).terms(ours, targets), method.terms(theirs, closed)
    for name in ("ua", "en") if vote == "majority" else ("ua", "nn", "en"):
        torch.testing.assert_close(by_bank.losses[name], by_prototypes.losses[name])
    by_bank.losses["en"].sum().backward()
    by_prototypes.losses["en"].sum().backward()
    torch.testing.assert_close(ours.embeddings.grad, theirs.embeddings.grad)
    flat, step = ours.embeddings.detach().flatten(), 1e-6
    for i in range(0, flat.numel(), 7):
        slopes = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[i] += sign * step
            output = NetworkOutput(ours.logits, moved.view_as(ours.embeddings))
            slopes.append(bank_method(k=5).terms(output, targets).losses["en"].sum().item())
        slope = (slopes[0] - slopes[1]) / (2 * step)
        assert ours.embeddings.grad.flatten()[i].item() == pytest.approx(slope, abs=1e-8)


def test_dissimilar_voxels_are_rejected() -> None:
    bank, output = brute_bank(make_table(), k=2), student(6)
    targets = bank_targets(bank, 7, None)
    free = bank_method(k=2).terms(output, targets)
    bound = bank_method(k=2, min_similarity=0.9).terms(output, targets)
    matched = [int(terms.shares["coverage_matched"].part.sum()) for terms in (free, bound)]
    assert 0 < matched[1] < matched[0] == int((~targets.reliable).sum())
    assert int(bound.shares["coverage_rejected"].part.sum()) == matched[0] - matched[1]
    nothing = bank_method(k=2, min_similarity=1.0).terms(output, targets)
    assert nothing.losses["nn"].tolist() == nothing.losses["en"].tolist() == [0.0, 0.0]


def test_a_bank_of_one_class_matches_nothing() -> None:
    table = make_table(counts=(0, 6))
    terms = bank_method(k=2).terms(student(8), bank_targets(brute_bank(table, k=2), 9, None))
    assert terms.losses["nn"].tolist() == terms.losses["en"].tolist() == [0.0, 0.0]
    assert int(terms.shares["coverage_matched"].part.sum()) == 0


def test_no_query_no_loss() -> None:
    """Late in a run the threshold leaves no voxel unreliable (METHOD trap 2)."""
    output = student(10, requires_grad=True)
    targets = bank_targets(brute_bank(make_table(), k=2), 11, 4)
    sure = torch.ones_like(targets.reliable)
    lots = [torch.Generator().manual_seed(b) for b in range(2)]
    empty = Targets(label=targets.label, reliable=sure, queries=choose_queries(~sure, 4, lots), bank=targets.bank)
    terms = bank_method(k=2).terms(output, empty)
    assert terms.losses["nn"].tolist() == terms.losses["en"].tolist() == [0.0, 0.0]
    (terms.losses["nn"] + terms.losses["en"]).sum().backward()
    assert bool(torch.isfinite(output.embeddings.grad).all())
