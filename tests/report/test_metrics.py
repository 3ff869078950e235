"""The four scores against values worked out by hand and against their definitions in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.report.metrics import (
    accuracy,
    calibration_error,
    confusion,
    cross_entropy,
    macro_f1,
    matthews,
    scores,
    standard_error,
)

LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 1, 1, 0, 2])


def test_by_hand() -> None:
    # class 0: precision 2/3, recall 2/3; class 1: 1/2, 1/2; class 2: 1, 1
    assert accuracy(LABELS, PREDICTED) == pytest.approx(4 / 6)
    assert macro_f1(LABELS, PREDICTED) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # c = 4, s = 6, sum p t = 3*3 + 2*2 + 1*1 = 14: (24 - 14) / sqrt(36 - 14)^2
    assert matthews(LABELS, PREDICTED) == pytest.approx(10 / 22)


def test_binary_matthews_is_the_phi_coefficient() -> None:
    labels = np.repeat([1, 1, 0, 0], [6, 1, 3, 2])  # TP 6, FN 1, FP 3, TN 2
    predicted = np.repeat([1, 0, 1, 0], [6, 1, 3, 2])
    assert matthews(labels, predicted) == pytest.approx((6 * 2 - 3 * 1) / math.sqrt(9 * 7 * 5 * 3))


def test_cross_entropy_by_hand_and_with_large_logits() -> None:
    logits = np.array([[0.0, math.log(3.0)], [math.log(3.0), 0.0]])
    assert cross_entropy(np.array([1, 1]), logits) == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2)
    assert cross_entropy(np.array([0]), np.array([[1e4, 0.0]], dtype=np.float32)) == 0.0


def test_rows_without_a_label_are_left_out() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 9.0]])
    assert scores(np.array([0, 1, 1, -1]), logits) == scores(np.array([0, 1, 1]), logits[:3])


def test_without_labelled_rows_every_score_is_nan() -> None:
    assert all(math.isnan(value) for value in scores(np.array([-1]), np.zeros((1, 2))).values())


def test_a_constant_prediction_has_matthews_zero_and_counts_the_missed_class() -> None:
    found = scores(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert found["matthews"] == 0.0
    assert found["macro_f1"] == pytest.approx(1 / 3)  # F1 of 2/3 and of 0


def test_a_class_that_never_occurs_does_not_lower_macro_f1() -> None:
    assert macro_f1(np.array([0, 2]), np.array([0, 2])) == 1.0


def test_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"do not belong together"):
        scores(np.array([0, 1]), np.zeros((3, 2)))


def test_standard_error_of_an_accuracy() -> None:
    assert standard_error(0.9, 900) == pytest.approx(0.01)
    assert math.isnan(standard_error(0.9, 0))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_against_plain_loops(rows: list[tuple[int, int]]) -> None:
    labels, predicted = (np.array(column) for column in zip(*rows, strict=True))
    f1 = []
    for one in sorted({*labels.tolist(), *predicted.tolist()}):
        hits = sum(a == b == one for a, b in rows)
        precision = hits / max(1, sum(b == one for _, b in rows))
        recall = hits / max(1, sum(a == one for a, _ in rows))
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1(labels, predicted) == pytest.approx(sum(f1) / len(f1))
    assert accuracy(labels, predicted) == pytest.approx(sum(a == b for a, b in rows) / len(rows))
    assert confusion(labels, predicted).sum() == len(rows)
    one_hot_labels, one_hot_predicted = np.eye(4)[labels], np.eye(4)[predicted]
    spread = np.sqrt(_covariance(one_hot_labels, one_hot_labels) * _covariance(one_hot_predicted, one_hot_predicted))
    expected = _covariance(one_hot_labels, one_hot_predicted) / spread if spread > 1e-12 else 0.0
    assert matthews(labels, predicted) == pytest.approx(expected, abs=1e-9)


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Gorodkin's: the sum over classes of the covariance of the indicator columns."""
    return float(((a - a.mean(axis=0)) * (b - b.mean(axis=0))).sum() / len(a))


def test_calibration_error_in_loops_and_at_its_ends() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(3), size=400)
    labels = random.integers(0, 3, 400)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        bins.setdefault(min(int(max(row) * 15), 14), []).append((max(row), row.index(max(row)) == label))
    gaps = [abs(sum(right for _, right in rows) - sum(sure for sure, _ in rows)) for rows in bins.values()]
    assert calibration_error(labels, probabilities) == pytest.approx(sum(gaps) / 400)
    certain = np.eye(2)[[0, 0, 1, 1]]
    assert calibration_error(np.array([0, 0, 1, 1]), certain) == 0.0
    assert calibration_error(np.array([1, 1, 0, 0]), certain) == 1.0
    assert calibration_error(np.array([0, 1, 0, 1]), np.full((4, 2), 0.5)) == 0.0
    assert math.isnan(calibration_error(np.array([], int), np.empty((0, 2))))
