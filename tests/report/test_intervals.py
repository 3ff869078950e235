"""Bootstrap intervals over rows, against resampling row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.report.intervals import accuracy_difference, bootstrap, weighted_scores
from kdcache.report.metrics import accuracy, macro_f1, matthews

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=12)


@given(ROWS)
def test_scores_of_counted_pairs_are_those_of_the_rows(rows: list[tuple[int, int, int]]) -> None:
    counts = np.array([count for _, _, count in rows])
    counts[0] += 1  # at least one row
    pairs = np.array([(label, prediction) for label, prediction, _ in rows])
    found = weighted_scores(pairs, counts[None])
    labels, predictions = (np.repeat(pairs[:, side], counts) for side in (0, 1))
    assert found["accuracy"][0] == pytest.approx(accuracy(labels, predictions))
    assert found["macro_f1"][0] == pytest.approx(macro_f1(labels, predictions))
    assert found["matthews"][0] == pytest.approx(matthews(labels, predictions), abs=1e-9)


def _answers(seed: int, right: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 300)
    wrong = rng.random(300) > right
    return labels, np.where(wrong, (labels + rng.integers(1, 3, 300)) % 3, labels)


def test_intervals_are_those_of_rows_that_are_drawn_one_by_one() -> None:
    labels, predictions = _answers(0, 0.8)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(800):
        rows = [int(row) for row in rng.integers(0, 300, 300)]
        drawn.append([score(labels[rows], predictions[rows]) for score in (accuracy, macro_f1, matthews)])
    for place, (name, found) in enumerate(bootstrap(labels, predictions, resamples=4000).items()):
        expected = np.percentile([scores[place] for scores in drawn], [2.5, 97.5])
        assert name == ("accuracy", "macro_f1", "matthews")[place]
        assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.01)
        assert found.low < found.value < found.high


def test_a_difference_draws_the_rows_of_both_together() -> None:
    labels, ours = _answers(0, 0.8)
    theirs = ours.copy()
    theirs[:30] = (labels[:30] + 1) % 3  # worse on some rows, equal on the others
    found = accuracy_difference(labels, ours, theirs)
    assert found is not None
    assert found.value == pytest.approx(accuracy(labels, ours) - accuracy(labels, theirs))
    rng, drawn = np.random.default_rng(1), []
    for _ in range(1500):
        rows = rng.integers(0, 300, 300)
        drawn.append(accuracy(labels[rows], ours[rows]) - accuracy(labels[rows], theirs[rows]))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.01)
    alone = bootstrap(labels, ours)["accuracy"]
    assert found.high - found.low < alone.high - alone.low  # pairing removes what both have in common
    same = accuracy_difference(labels, ours, ours)
    assert same is not None
    assert (same.low, same.high) == (0.0, 0.0)


def test_rows_without_label_do_not_count_and_equal_seeds_give_equal_intervals() -> None:
    labels, predictions = _answers(2, 0.6)
    extended = np.concatenate([labels, [-1, -1]]), np.concatenate([predictions, [0, 1]])
    assert bootstrap(*extended) == bootstrap(labels, predictions)
    nothing = np.array([-1]), np.array([0])
    assert bootstrap(*nothing) == {}
    assert accuracy_difference(*nothing, np.array([0])) is None
