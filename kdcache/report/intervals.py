"""Confidence intervals: over rows by the bootstrap, over seeds by Student's t; without scipy, slow to import.

The two answer different questions. The interval over rows says how far the score could be from that on all texts of
this kind, for this very student. The one over seeds says how far another training of it would be, on the same rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
_TOGETHER = 1 << 22  # counts of resamples that are held at a time


@dataclass(frozen=True)
class Difference:
    """The mean difference of two models over the seeds that both have, with its interval; one seed has no interval."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """``ours`` - ``theirs`` by seed, with a t interval of 95 % over seeds; None without a common seed.

    The interval is about seeds alone: both models are scored on the same rows, and another sample of rows would move
    both.
    """
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return None
    mean, deviation = statistics.fmean(pairs), spread(pairs)
    if deviation is None:
        return Difference(mean, None, None, 1)
    half = t_quantile(CONFIDENCE, len(pairs) - 1) * deviation / math.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half, len(pairs))


def t_quantile(confidence: float, freedom: int) -> float:
    """The t that ``confidence`` of Student's distribution lies within, on both sides of 0."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: int) -> float:
    """P(-t < T < t) for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for power in range(freedom % 2, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)


@dataclass(frozen=True)
class Interval:
    """A score on the rows, and the interval of 95 % over resampled rows."""

    value: float
    low: float
    high: float


def bootstrap(
    labels: np.ndarray, predictions: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """``accuracy``, ``macro_f1`` and ``matthews`` with percentile intervals over rows; empty without labelled rows.

    Rows with equal (label, prediction) are exchangeable, so the counts of the distinct pairs are drawn instead of rows:
    a multinomial, with the same distribution. ``labels`` int[n] (-1 = none) and ``predictions`` int[n].
    """
    known = labels >= 0
    if not known.any():
        return {}
    pairs, counts = np.unique(np.stack([labels[known], predictions[known]], axis=1), axis=0, return_counts=True)
    values = {name: float(value[0]) for name, value in weighted_scores(pairs, counts[None]).items()}
    return _with_bounds(values, _resampled(counts, resamples, seed, lambda drawn: weighted_scores(pairs, drawn)))


def accuracy_difference(
    labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Accuracy of ``ours`` - that of ``theirs``, predictions int[n] on the same rows, which are drawn together.

    None without labelled rows.
    """
    known = labels >= 0
    if not known.any():
        return None
    gains = (ours == labels)[known].astype(np.int64) - (theirs == labels)[known]
    values, counts = np.unique(gains, return_counts=True)

    def difference(drawn: np.ndarray) -> dict[str, np.ndarray]:
        return {"accuracy": drawn @ values / len(gains)}

    found = _with_bounds({"accuracy": float(gains.mean())}, _resampled(counts, resamples, seed, difference))
    return found["accuracy"]


def weighted_scores(pairs: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [R] of the rows that have each of the K ``pairs`` (label, prediction) ``counts`` [R, K] times."""
    counts = counts.astype(np.float64)
    classes = int(pairs.max()) + 1
    right = pairs[:, 0] == pairs[:, 1]
    total, hits = counts.sum(axis=1), counts[:, right].sum(axis=1)
    true, predicted = (_by_class(counts, pairs[:, side], classes) for side in (0, 1))
    of_class = _by_class(counts[:, right], pairs[right, 0], classes)
    occurring = true + predicted
    there = occurring > 0
    f1 = np.divide(2 * of_class, occurring, out=np.zeros_like(of_class), where=there)
    covariance = hits * total - (true * predicted).sum(axis=1)
    spreads = np.sqrt(total**2 - (predicted**2).sum(axis=1)) * np.sqrt(total**2 - (true**2).sum(axis=1))
    return {
        "accuracy": hits / total,
        "macro_f1": f1.sum(axis=1) / there.sum(axis=1),
        "matthews": np.divide(covariance, spreads, out=np.zeros_like(covariance), where=spreads > 0),
    }


def _by_class(counts: np.ndarray, of: np.ndarray, classes: int) -> np.ndarray:
    """Sums [R, classes] of the columns of ``counts`` [R, K], by their class ``of`` [K]."""
    sums = np.zeros((len(counts), classes))
    if len(of):
        order = np.argsort(of, kind="stable")
        there, first = np.unique(of[order], return_index=True)
        sums[:, there] = np.add.reduceat(counts[:, order], first, axis=1)
    return sums


def _resampled(
    counts: np.ndarray, resamples: int, seed: int, score: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The scores [resamples] of as many draws of the rows, in pieces that fit into memory."""
    rng, rows = np.random.Generator(np.random.PCG64(seed)), int(counts.sum())
    piece = max(1, _TOGETHER // len(counts))
    drawn = [
        score(rng.multinomial(rows, counts / rows, size=min(piece, resamples - done)))
        for done in range(0, resamples, piece)
    ]
    return {name: np.concatenate([each[name] for each in drawn]) for name in drawn[0]}


def _with_bounds(values: Mapping[str, float], drawn: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    ends = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
    return {
        name: Interval(value, *(float(end) for end in np.percentile(drawn[name], ends)))
        for name, value in values.items()
    }
