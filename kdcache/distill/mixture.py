"""Weights and temperatures of teachers, fitted to labelled rows by the likelihood of the mixture of their soft labels.

    p(c | x) = sum over teachers i of w_i softmax(z_i / T_i)[c],    w on the simplex

Plain numpy, so that a fit takes seconds without a GPU. Given the temperatures, the log likelihood is concave in w: a
Newton method with an active set finds its maximum, with exact zeros. Given w, the temperatures climb with safeguarded
Newton steps. Both alternate. Copies of a teacher are one teacher here, whose weight they share in equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

SMALLEST = 0.01  # a smaller weight becomes 0
CLASS_ROWS = 100  # rows that the mixture predicts a class for, below which the class has no weights of its own
_PRIOR_ROWS = 50  # rows by which the weights of a class are drawn towards those of all classes
_EVIDENCE = 6.0  # nats by which a teacher must beat the uniform distribution on all rows together
_RIDGE = 1e-7  # makes the weights of almost equal teachers unique
_LARGEST_LOG = 3.0  # temperatures lie within e^-3 and e^3
_LEAST = -600.0  # log likelihoods are not lower, so that sums of likelihoods are above 0
_TOGETHER = 4096  # rows of a step whose numbers fit into a processor's cache
_ENOUGH = 1e-9  # nats per row: a smaller gain ends a fit

Weighted = Literal["equal", "all classes", "each class"]


class Kind(NamedTuple):
    """What is fitted."""

    weights: Weighted
    temperatures: bool

    def __str__(self) -> str:
        names = {"equal": "equal weights", "all classes": "weights", "each class": "weights per predicted class"}
        return names[self.weights] + (", temperatures" if self.temperatures else "")


KINDS = tuple(Kind(weights, hot) for weights in ("equal", "all classes", "each class") for hot in (False, True))


@dataclass(frozen=True, eq=False)
class Mixture:
    """Weights that sum to 1, and temperatures, of N teachers.

    Attributes:
        weights: [N].
        temperatures: [N].
        class_weights: [N, C]: the weights on rows for which the mixture by ``weights`` predicts class c. None: the
            same on all rows.
    """

    weights: np.ndarray
    temperatures: np.ndarray
    class_weights: np.ndarray | None = None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """p(c | x) as float64 [n, C] of ``logits`` [N, n, C]."""
        pieces = range(0, max(logits.shape[1], 1), _TOGETHER)
        return np.concatenate([self._probabilities(logits[:, first : first + _TOGETHER]) for first in pieces])

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        each = softmax(logits / self.temperatures[:, None, None])
        mixed: np.ndarray = np.einsum("i,inc->nc", self.weights, each)
        if self.class_weights is None:
            return mixed
        own = self.class_weights[:, mixed.argmax(axis=1)]  # [N, n]
        return np.asarray(np.einsum("in,inc->nc", own, each))

    def rounded(self) -> Mixture:
        """With four decimals; weights still sum to 1. What is recorded is then what is used, on every machine."""
        weights = _round_shares(self.weights)
        classes = None if self.class_weights is None else np.stack([_round_shares(c) for c in self.class_weights.T], 1)
        return Mixture(weights, np.round(self.temperatures, 4), classes)


@dataclass(frozen=True, eq=False)
class LabelledLogits:
    """N teachers on n labelled rows.

    Attributes:
        logits: float [N, n, C].
        labels: int64 [n], each from 0 to C - 1.
        folds: int64 [n]: the fold of each row in cross-validation.
    """

    logits: np.ndarray
    labels: np.ndarray
    folds: np.ndarray

    def teachers(self, which: Sequence[int]) -> LabelledLogits:
        """The same rows of some teachers."""
        return replace(self, logits=self.logits[list(which)])

    def rows(self, which: np.ndarray) -> LabelledLogits:
        """Some rows, by mask or index."""
        return LabelledLogits(self.logits[:, which], self.labels[which], self.folds[which])


class Fitter:
    """Fits mixtures of several kinds to the same rows, after the temperature of each teacher alone."""

    def __init__(self, data: LabelledLogits, start: Fitter | None = None) -> None:
        """``start``: a fit of the same teachers to other rows, from whose temperatures this one starts."""
        self._data, self._found = data, dict[Kind, Mixture]()
        self._kept: dict[bool, tuple[np.ndarray, np.ndarray]] = {}  # by temperatures: weights, likelihoods [N, n]
        self._groups: list[list[int]] = _copies(data.logits) if start is None else start._groups
        distinct = data.logits[[group[0] for group in self._groups]]
        self._own = _Temperatures([margins(each, data.labels) for each in distinct])
        if start is not None:
            self._own.move(start._own.logs)
        for alone in np.eye(len(distinct)):
            self._own.climb_up(alone)
        gained = len(data.labels) * np.log(data.logits.shape[2]) + np.log(self._own.likelihoods).sum(axis=1)
        self._informed = gained > _EVIDENCE if (gained > _EVIDENCE).any() else np.ones(len(gained), bool)

    def mixture(self, kind: Kind) -> Mixture:
        """The mixture of highest likelihood of this kind; asked again, the same."""
        if kind not in self._found:
            self._found[kind] = self._fit(kind)
        return self._found[kind]

    def _fit(self, kind: Kind) -> Mixture:
        if kind.weights == "each class":
            found = self.mixture(Kind("all classes", kind.temperatures))
            predicted = found.probabilities(self._data.logits).argmax(axis=1)
            return replace(found, class_weights=self._by_class(*self._kept[kind.temperatures], predicted))
        state = self._own.copy()
        if not kind.temperatures:
            state.move(np.zeros(len(self._groups)))
        weights = np.full(len(self._groups), 1 / len(self._groups))
        if kind.weights == "all classes":
            weights = _best_weights(state, self._informed, kind.temperatures)
            self._kept[kind.temperatures] = weights, state.likelihoods
        elif kind.temperatures:
            state.climb_up(weights)
        return self._spread(Mixture(weights, np.exp(-state.logs)))

    def _by_class(self, weights: np.ndarray, likelihoods: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """[N, C]: the weights fitted to the rows of each predicted class, drawn towards ``weights``."""
        count, used = self._data.logits.shape[2], np.flatnonzero(weights)
        columns = np.tile(weights[:, None], (1, count))
        for label in range(count):
            rows = np.flatnonzero(predicted == label)
            if len(rows) >= CLASS_ROWS:
                prior = np.maximum(np.eye(len(used)), 1e-12)
                together = np.concatenate([likelihoods[np.ix_(used, rows)], prior], axis=1)
                counts = np.concatenate([np.ones(len(rows)), _PRIOR_ROWS * weights[used]])
                columns[used, label] = simplex_weights(together, counts)
        return np.stack([self._shared(column) for column in columns.T], axis=1)

    def _spread(self, found: Mixture) -> Mixture:
        temperatures = np.empty(len(self._data.logits))
        for place, group in enumerate(self._groups):
            temperatures[group] = found.temperatures[place]
        return Mixture(self._shared(found.weights), temperatures)

    def _shared(self, weights: np.ndarray) -> np.ndarray:
        """The weights of distinct teachers, shared by the copies of each."""
        shared = np.empty(len(self._data.logits))
        for place, group in enumerate(self._groups):
            shared[group] = weights[place] / len(group)
        return shared


class _Temperatures:
    """The inverse temperatures of N teachers, as logarithms, and the likelihoods of the labels under them."""

    def __init__(self, margins: Sequence[np.ndarray]) -> None:
        self._margins = margins
        self.logs = np.zeros(len(margins))
        self._responses = np.stack([_response(each, 1.0) for each in margins])  # [N, 3, n]
        self.likelihoods = np.exp(np.maximum(self._responses[:, 0], _LEAST))  # [N, n]

    def copy(self) -> _Temperatures:
        other = object.__new__(_Temperatures)
        other._margins, other.logs = self._margins, self.logs.copy()
        other._responses, other.likelihoods = self._responses.copy(), self.likelihoods.copy()
        return other

    def move(self, logs: np.ndarray) -> None:
        """Set the logarithms of the inverse temperatures."""
        for index in np.flatnonzero(logs != self.logs).tolist():
            self._responses[index] = _response(self._margins[index], float(np.exp(logs[index])))
            self.likelihoods[index] = np.exp(np.maximum(self._responses[index, 0], _LEAST))
        self.logs = logs.copy()

    def climb(self, weights: np.ndarray) -> float:
        """One Newton step uphill of the teachers with a weight; returns the gain per row."""
        used = np.flatnonzero(weights)
        rows, mixed = self._responses.shape[2], weights @ self.likelihoods
        part = weights[used, None] * self.likelihoods[used] / mixed  # responsibilities [used, n]
        slopes, bends = self._responses[used, 1], self._responses[used, 2]
        pulled = part * slopes
        gradient = pulled.mean(axis=1) - self.logs[used] / rows
        curvature = np.diag((part * (bends + slopes**2)).mean(axis=1) - 1 / rows) - pulled @ pulled.T / rows
        values, axes = np.linalg.eigh(curvature)
        step = np.clip(axes @ ((axes.T @ gradient) / np.maximum(np.abs(values), 1e-6)), -1, 1)
        before, logs = float(np.log(mixed).mean()) + self._prior(), self.logs.copy()
        for _ in range(30):
            trial = logs.copy()
            trial[used] = np.clip(logs[used] + step, -_LARGEST_LOG, _LARGEST_LOG)
            self.move(trial)
            gain = float(np.log(weights @ self.likelihoods).mean() + self._prior() - before)
            if gain >= 0:
                return gain
            step = step / 2
        self.move(logs)
        return 0.0

    def climb_up(self, weights: np.ndarray) -> None:
        """Climb until a step gains nothing."""
        for _ in range(50):
            if self.climb(weights) <= _ENOUGH:
                return

    def _prior(self) -> float:
        """Of one row's worth: temperatures near 1."""
        squares, rows = float(self.logs @ self.logs), self._responses.shape[2]
        return -squares / (2 * int(rows))


def _best_weights(state: _Temperatures, allowed: np.ndarray, temperatures: bool) -> np.ndarray:
    """The weights of the ``allowed`` teachers; with ``temperatures`` those of ``state`` are fitted as well."""
    support = np.flatnonzero(allowed)
    weights = np.zeros(len(allowed))
    for _ in range(50):
        weights[:] = 0.0
        weights[support] = simplex_weights(state.likelihoods[support])
        if (weights[support] < SMALLEST).any():
            support = np.flatnonzero(weights >= SMALLEST)
        elif not temperatures or state.climb(weights) <= _ENOUGH:
            break
    return weights


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 [C - 1, n]: the logits of the other classes minus that of the label."""
    rows, count = logits.shape
    others = np.ones((rows, count), bool)
    others[np.arange(rows), labels] = False
    true = logits[np.arange(rows), labels].astype(np.float64)
    return np.ascontiguousarray(logits[others].reshape(rows, count - 1).T - true)


def _response(margins: np.ndarray, inverse: float) -> np.ndarray:
    """float64 [3, n]: log p of the label at this inverse temperature, and its first two derivatives by log inverse."""
    found = np.empty((3, margins.shape[1]))
    for first in range(0, margins.shape[1], _TOGETHER):
        scaled = inverse * margins[:, first : first + _TOGETHER]
        top = np.maximum(scaled.max(axis=0), 0.0)
        powers = np.exp(scaled - top)
        total = np.exp(-top) + powers.sum(axis=0)
        powers *= scaled
        mean = powers.sum(axis=0) / total
        powers *= scaled
        part = found[:, first : first + _TOGETHER]
        part[0], part[1] = -top - np.log(total), -mean
        part[2] = mean**2 - mean - powers.sum(axis=0) / total
    return found


def simplex_weights(likelihoods: np.ndarray, row_weights: np.ndarray | None = None) -> np.ndarray:
    """The weights [N] on the simplex that maximise the mean of log(w @ likelihoods).

    Args:
        likelihoods: [N, n], above 0.
        row_weights: [n]; all 1 by default.

    Returns:
        Weights that sum to 1; those at the border are exactly 0.
    """
    count, rows = likelihoods.shape
    shares = np.full(rows, 1 / rows) if row_weights is None else row_weights / row_weights.sum()
    weights, free = np.full(count, 1 / count), np.ones(count, bool)
    value = _concave(likelihoods, shares, weights)
    for _ in range(100 * count):
        ratios = likelihoods / (weights @ likelihoods)
        gradient = ratios @ shares - _RIDGE * weights
        curvature = (ratios * shares) @ ratios.T + _RIDGE * np.eye(count)
        level = gradient @ weights  # of the multiplier, at the optimum that of every free weight
        step = _newton_step(gradient, curvature, free)
        if gradient[free] @ step[free] < _ENOUGH:  # optimal on this face: may another weight enter?
            outside = np.flatnonzero(~free & (gradient > level + _ENOUGH))
            if not len(outside):
                break
            free[outside[gradient[outside].argmax()]] = True
            continue
        falling = step < 0
        reach = float(np.min(weights[falling] / -step[falling], initial=1.0))
        length = reach
        while (trial := _concave(likelihoods, shares, _moved(weights, step, length))) < value and length > 1e-12:
            length /= 2
        weights, value = _moved(weights, step, length), max(value, trial)
        free &= ~(falling & (weights <= 1e-12)) if length == reach else True
        weights = np.where(free, weights, 0.0)
    return np.asarray(weights / weights.sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def _newton_step(gradient: np.ndarray, curvature: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The step of the ``free`` weights that keeps their sum."""
    inside = np.flatnonzero(free)
    matrix = np.zeros((len(inside) + 1, len(inside) + 1))
    matrix[:-1, :-1] = curvature[np.ix_(inside, inside)]
    matrix[:-1, -1] = matrix[-1, :-1] = 1.0
    step = np.zeros(len(gradient))
    step[inside] = np.linalg.solve(matrix, np.append(gradient[inside], 0.0))[:-1]
    return step


def _concave(likelihoods: np.ndarray, shares: np.ndarray, weights: np.ndarray) -> float:
    return float(shares @ np.log(weights @ likelihoods) - _RIDGE / 2 * weights @ weights)


def _moved(weights: np.ndarray, step: np.ndarray, length: float) -> np.ndarray:
    return np.asarray(np.maximum(weights + length * step, 0.0))


def _round_shares(shares: np.ndarray) -> np.ndarray:
    rounded = np.round(shares, 4)
    rounded[rounded.argmax()] += 1 - rounded.sum()
    return np.round(rounded, 4)


def _copies(logits: np.ndarray) -> list[list[int]]:
    """Teachers with exactly equal logits, together."""
    groups: list[list[int]] = []
    for index in range(len(logits)):
        same = next((group for group in groups if np.array_equal(logits[group[0]], logits[index])), None)
        if same is None:
            groups.append([index])
        else:
            same.append(index)
    return groups
