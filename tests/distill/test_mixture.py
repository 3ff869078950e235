"""The fit of weights and temperatures: against plain searches, and what copies and noise get."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.distill import mixture
from kdcache.distill.mixture import KINDS, Fitter, Kind, LabelledLogits, Mixture, margins, simplex_weights
from kdcache.distill.weigh import fitted_mixture, weigh

EQUAL, WEIGHTS, BOTH = Kind("equal", False), Kind("all classes", False), Kind("all classes", True)


def made(strengths: tuple[float, ...], rows: int = 400, classes: int = 3, seed: int = 0) -> LabelledLogits:
    """Teachers whose logits are noise, and more of it in the label's place by ``strengths``; three times too sharp."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    hard = random.normal(size=(rows, classes))
    logits = [random.normal(size=(rows, classes)) + hard * (strength > 0) for strength in strengths]
    for each, strength in zip(logits, strengths, strict=True):
        each[np.arange(rows), labels] += strength
    return LabelledLogits(3 * np.array(logits, np.float32), labels, random.permutation(rows) % 5)


def nll(data: LabelledLogits, found: Mixture) -> float:
    """Written out row by row."""
    total = 0.0
    for row, label in enumerate(data.labels.tolist()):
        each = [
            np.exp(z[row] / t) / np.exp(z[row] / t).sum()
            for z, t in zip(data.logits.astype(np.float64), found.temperatures, strict=True)
        ]
        mixed = sum(w * p for w, p in zip(found.weights, each, strict=True))
        if found.class_weights is not None:
            own = found.class_weights[:, int(np.argmax(mixed))]
            mixed = sum(w * p for w, p in zip(own, each, strict=True))
        total -= float(np.log(mixed[label]))
    return total / len(data.labels)


def test_probabilities_are_those_of_the_formula() -> None:
    data = made((2.0, 1.0), rows=30)
    for classes in (None, np.array([[0.1, 0.5, 1.0], [0.9, 0.5, 0.0]])):
        found = Mixture(np.array([0.3, 0.7]), np.array([2.0, 0.5]), classes)
        probabilities = found.probabilities(data.logits)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        assert -np.log(probabilities[np.arange(30), data.labels]).mean() == pytest.approx(nll(data, found))


@given(st.integers(0, 2**16), st.integers(1, 5), st.sampled_from([3, 40, 300]))
@settings(max_examples=25, deadline=None)
def test_weights_are_those_of_the_highest_likelihood(seed: int, count: int, rows: int) -> None:
    """Against 1000 steps of EM, which never decrease the likelihood, and by the conditions of an optimum."""
    likelihoods = np.random.default_rng(seed).uniform(0.01, 1, (count, rows)) ** 2
    found = simplex_weights(likelihoods)
    assert found.sum() == pytest.approx(1) and (found >= 0).all()
    weights = np.full(count, 1 / count)
    for _ in range(1000):
        weights = (weights[:, None] * likelihoods / (weights @ likelihoods)).mean(axis=1)
    assert np.log(found @ likelihoods).mean() >= np.log(weights @ likelihoods).mean() - 1e-6
    pull = (likelihoods / (found @ likelihoods)).mean(axis=1)  # 1 where the weight is above 0, at most 1 elsewhere
    assert pull.max() <= 1 + 1e-4
    np.testing.assert_allclose(pull[found > 1e-3], 1, atol=1e-3)


def test_rows_may_count_several_times() -> None:
    likelihoods = np.random.default_rng(1).uniform(size=(3, 50))
    counts = np.random.default_rng(2).integers(1, 4, 50)
    repeated = simplex_weights(np.repeat(likelihoods, counts, axis=1))
    np.testing.assert_allclose(simplex_weights(likelihoods, counts), repeated, atol=1e-6)


def test_almost_equal_teachers_have_almost_equal_weights() -> None:
    likelihoods = np.random.default_rng(1).uniform(size=(1, 500))
    weights = simplex_weights(np.concatenate([likelihoods, likelihoods * (1 + 1e-12)]))
    np.testing.assert_allclose(weights, 0.5, atol=1e-3)


def test_a_teachers_temperature_is_that_of_the_best_on_a_grid() -> None:
    data = made((2.0,), rows=200)
    found = Fitter(data).mixture(Kind("equal", True))
    grid = np.exp(np.linspace(0, 2, 81))
    losses = [nll(data, Mixture(np.ones(1), np.array([temperature]))) for temperature in grid]
    assert found.temperatures[0] == pytest.approx(grid[int(np.argmin(losses))], rel=0.04)  # one row's prior towards 1
    assert nll(data, found) <= min(losses) + 1e-4


def test_weights_and_temperatures_are_not_beaten_nearby() -> None:
    data = made((2.0, 1.0), rows=300)
    found = Fitter(data).mixture(BOTH)
    best = nll(data, found)
    for moved, first, second in itertools.product((-0.05, 0.0, 0.05), (0.9, 1.0, 1.1), (0.9, 1.0, 1.1)):
        weights = np.clip(found.weights + np.array([moved, -moved]), 0, 1)
        other = Mixture(weights / weights.sum(), found.temperatures * (first, second))
        assert nll(data, other) > best - 2e-3  # the prior of one row
    assert best < nll(data, Fitter(data).mixture(WEIGHTS)) < nll(data, Fitter(data).mixture(EQUAL))


def test_derivatives_are_those_of_differences() -> None:
    own = margins(made((1.0,), rows=20, classes=4).logits[0], made((1.0,), rows=20, classes=4).labels)
    value, first, second = mixture._response(own, 0.7)
    step = 1e-4
    above, below = (mixture._response(own, 0.7 * np.exp(sign * step))[0] for sign in (1, -1))
    np.testing.assert_allclose(first, (above - below) / (2 * step), atol=1e-6)
    np.testing.assert_allclose(second, (above - 2 * value + below) / step**2, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(st.integers(0, 2**16), st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_copies_share_the_weight_of_the_teacher(kind: Kind, seed: int, copies: int) -> None:
    data = made((2.0, 1.5, 0.8), seed=seed)
    alone = Fitter(data).mixture(kind)
    several = Fitter(data.teachers([1] * copies + [0, 1, 2])).mixture(kind)
    same = [*range(copies), copies + 1]
    assert len(set(several.weights[same].tolist())) == 1
    assert several.weights.sum() == pytest.approx(1)
    assert several.weights[same].sum() == pytest.approx(alone.weights[1])
    np.testing.assert_allclose(several.weights[[copies, copies + 2]], alone.weights[[0, 2]])
    np.testing.assert_allclose(several.temperatures[[copies, *same[:1], copies + 2]], alone.temperatures)
    assert (several.class_weights is None) == (alone.class_weights is None)
    if several.class_weights is not None and alone.class_weights is not None:
        np.testing.assert_allclose(several.class_weights[same].sum(axis=0), alone.class_weights[1], atol=1e-12)
        np.testing.assert_allclose(several.class_weights.sum(axis=0), 1)


@given(st.integers(0, 2**16), st.sampled_from([0.1, 1.0, 3.0]))
@settings(max_examples=15, deadline=None)
def test_a_teacher_of_random_logits_gets_no_weight(seed: int, scale: float) -> None:
    data = made((2.5, 1.5, 0.0), seed=seed)
    data.logits[2] *= scale
    for kind in KINDS[2:]:
        found = Fitter(data).mixture(kind)
        assert found.weights[2] == 0
        assert found.class_weights is None or (found.class_weights[2] == 0).all()
    assert fitted_mixture(data).weights[2] == 0


def test_a_weight_below_the_threshold_becomes_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made((2.5, 2.0))
    smaller = float(Fitter(data).mixture(WEIGHTS).weights.min())
    assert smaller > mixture.SMALLEST
    monkeypatch.setattr(mixture, "SMALLEST", smaller + 1e-6)
    assert sorted(Fitter(data).mixture(WEIGHTS).weights.tolist()) == [0.0, 1.0]


def test_classes_have_their_own_weights_only_where_there_are_rows_enough() -> None:
    """The first teacher knows classes 0 and 1 apart, the second only class 2; class 3 has few rows."""
    random = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(3), 400), np.full(30, 3)])
    logits = random.normal(size=(2, len(labels), 4))
    for row, label in enumerate(labels.tolist()):
        logits[0 if label < 2 else 1, row, label] += 5
        logits[1 if label < 2 else 0, row, label] += 1
    data = LabelledLogits(logits.astype(np.float32), labels, random.permutation(len(labels)) % 5)
    found = Fitter(data).mixture(Kind("each class", True))
    assert found.class_weights is not None
    assert found.class_weights[0, 0] > found.weights[0] > found.class_weights[0, 2]
    np.testing.assert_array_equal(found.class_weights[:, 3], found.weights)
    assert nll(data, found) < nll(data, Fitter(data).mixture(BOTH))


def test_few_rows_do_not_overfit() -> None:
    """On other rows, what 60 rows chose is as good as the plain mean of equal teachers, within a little."""
    for seed in range(3):
        data = made((1.5, 1.5, 1.5), rows=60, seed=seed)
        other = made((1.5, 1.5, 1.5), rows=800, seed=100 + seed)
        equal = Mixture(np.full(3, 1 / 3), np.ones(3))
        chosen = fitted_mixture(data)
        assert nll(other, chosen) < nll(other, equal) + 0.02


def test_the_table_of_a_copy_a_weak_and_a_random_teacher() -> None:
    data = made((2.5, 1.5, 0.0), rows=600)
    found = weigh(data.teachers([0, 0, 1, 2]), ("good", "copy", "weak", "noise"), ("a", "b", "c"), "validation")
    assert sum(each.weight for each in found.teachers.values()) == pytest.approx(1)
    assert found.teachers["good"].weight == pytest.approx(found.teachers["copy"].weight, abs=1e-4)
    assert found.teachers["noise"].weight == 0
    assert "noise" in found.leave_out
    assert len({"good", "copy"} & set(found.leave_out)) == 1  # one of two copies, not both
    assert "weak" not in found.leave_out
    assert found.fitted.nll < found.mean.nll
    assert found.fitted.nll == pytest.approx(found.kinds[found.kind])
    good = found.teachers["good"]
    assert good.raw.nll == pytest.approx(nll(data.teachers([0]), Mixture(np.ones(1), np.ones(1))))
    assert found.teachers["weak"].loss_without is not None
    assert found.teachers["weak"].loss_without > 0
    assert found.settings()["teacher_weights"]["noise"] == 0


def test_held_out_means_that_no_fold_sees_its_rows() -> None:
    """By a plain loop over the folds."""
    data = made((2.0, 1.0), rows=300)
    found = weigh(data, ("a", "b"), ("0", "1", "2"), "validation")
    total = 0.0
    for fold in range(5):
        fit = Fitter(data.rows(data.folds != fold)).mixture(BOTH)
        seen = data.rows(data.folds == fold)
        total += nll(seen, fit) * len(seen.labels)
    assert found.kinds[BOTH] == pytest.approx(total / 300, abs=1e-5)


def test_one_teacher_has_all_the_weight() -> None:
    found = weigh(made((1.5,)), ("only",), ("a", "b", "c"), "validation")
    only = found.teachers["only"]
    assert (only.weight, only.loss_without, found.leave_out) == (1.0, None, ())
    assert only.temperature > 1.2  # its logits are three times too sharp
    assert only.calibrated.nll < only.raw.nll


def test_rounded_weights_sum_to_one() -> None:
    shares = np.array([1 / 3, 1 / 3, 1 / 3])
    found = Mixture(shares, np.array([1.23456, 1, 1]), np.stack([shares, shares], 1)).rounded()
    assert found.weights.tolist() == [0.3334, 0.3333, 0.3333]
    assert found.temperatures.tolist() == [1.2346, 1, 1]
    assert found.class_weights is not None
    np.testing.assert_allclose(found.class_weights.sum(axis=0), 1)
