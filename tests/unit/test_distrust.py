"""Ranking without truth: rank means by hand, volumes against labelled ones, diverse choices against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from distseg.evaluation.distrust import expected_error, next_to_label, random_with_foreground, volume_deviation

NAN = np.nan


def test_expected_error_is_the_mean_of_ranks() -> None:
    evidence = {
        "a": np.array([1.0, 2.0, 3.0]),  # ranks 0, .5, 1
        "b": np.array([5.0, 5.0, 1.0]),  # ties share: .75, .75, 0
        "c": np.array([NAN, 4.0, 2.0]),  # no say for the first: -, 1, 0
        "d": np.array([7.0, 7.0, 7.0]),  # tells nothing apart
    }
    np.testing.assert_allclose(expected_error(evidence), [0.75 / 2, (0.5 + 0.75 + 1) / 3, 1 / 3])
    np.testing.assert_array_equal(expected_error({"d": np.array([7.0, NAN])}), [0, 0])


def test_volumes_are_compared_with_labelled_ones() -> None:
    labelled = [10.0, 20.0, 40.0]  # logs 1 median absolute deviation of ln 2 apart
    found = volume_deviation(np.array([20.0, 40.0, 0.0, 0.1]), labelled)
    spread = 1.4826 * np.log(2)
    np.testing.assert_allclose(found, [0, np.log(2) / spread, np.log(100) / spread, np.log(100) / spread])
    assert volume_deviation(np.array([22.0]), [20.0, 20.0, 20.0])[0] == pytest.approx(np.log(1.1) / 0.1)
    assert np.isnan(volume_deviation(np.array([20.0]), [10.0, 20.0, 0.0])).all()


def test_next_to_label_is_greedy_by_score_times_distance() -> None:
    rng = np.random.default_rng(0)
    score, vectors = rng.random(30), rng.normal(size=(30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen = next_to_label(score, vectors, count=5)
    expected = [int(score.argmax())]
    while len(expected) < 5:
        gains = {i: score[i] * min(1 - float(vectors[i] @ vectors[j]) for j in expected) for i in range(30)
                 if i not in expected}  # fmt: skip
        expected.append(max(gains, key=gains.__getitem__))
    assert chosen == expected
    twins = np.array([[1.0, 0], [1, 0], [0, 1]], np.float32)
    assert next_to_label(np.array([1.0, 0.9, 0.5]), twins, count=2) == [0, 2]  # the twin brings nothing new
    assert sorted(next_to_label(np.array([1.0, 0.9, 0.5]), twins, count=9)) == [0, 1, 2]
    assert 29 not in next_to_label(np.arange(30.0)[::-1], np.eye(30, dtype=np.float32), count=2)  # sure: no candidate


def test_the_baseline_draws_where_something_was_found() -> None:
    found = np.array([True, False, True, False, True])
    drawn = {tuple(random_with_foreground(found, count=2, rng=np.random.default_rng(s))) for s in range(40)}
    assert {i for pair in drawn for i in pair} == {0, 2, 4}
    four = random_with_foreground(found, count=4, rng=np.random.default_rng(0))
    assert set(four[:3]) == {0, 2, 4}
    assert len(set(four)) == 4
