"""Means over seeds, and confidence intervals of paired differences: Student's t, without scipy, which takes long to
import.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


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
