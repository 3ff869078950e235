"""The slot S: how the weights of terms change over the training, and which teachers take part in a step.

Schedules are pure functions of ``Moment`` (step, total steps, epoch, seed), so a resumed training repeats them. Only
raw outputs of numpy's bit generators are used: numpy guarantees those streams for ever (NEP 19).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from kdcache.methods.base import Moment


class Schedule(Protocol):
    """a(t): the factor of a term's weight."""

    def __call__(self, term: str, moment: Moment, /) -> float: ...


class TeacherChoice(Protocol):
    """s_i(t): the factors of ``count`` teachers in a step; 0 leaves a teacher out. At least one is above 0."""

    def __call__(self, moment: Moment, count: int, /) -> tuple[float, ...]: ...


def constant(_term: str, _moment: Moment, /) -> float:
    """Factor 1 for all terms at all times."""
    return 1.0


@dataclass(frozen=True)
class Stages:
    """One set of terms after another, for example hidden states first, then soft labels (TinyBERT, section 3).

    Attributes:
        stages: (end, terms): the share of the training at which the stage ends, ascending to 1, and the names of the
            terms that are active in it.
    """

    stages: tuple[tuple[float, tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        ends = [0.0, *(end for end, _ in self.stages)]
        if any(later <= earlier for earlier, later in itertools.pairwise(ends)) or ends[-1] != 1.0:
            raise ValueError(f"stages end at {ends[1:]}; ascending shares of the training up to 1 were expected")

    def __call__(self, term: str, moment: Moment, /) -> float:
        return float(term in next(terms for end, terms in self.stages if moment.share < end))


@dataclass(frozen=True)
class Annealed:
    """Factors that change linearly over the training.

    Attributes:
        terms: Term -> (factor at the first step, factor at the end). Other terms stay at 1.
    """

    terms: Mapping[str, tuple[float, float]]

    def __call__(self, term: str, moment: Moment, /) -> float:
        first, last = self.terms.get(term, (1.0, 1.0))
        return first + (last - first) * moment.share


def every_teacher(_moment: Moment, count: int, /) -> tuple[float, ...]:
    """All teachers in every step."""
    return (1.0,) * count


@dataclass(frozen=True)
class SampledTeacher:
    """One teacher per step, drawn by ``probabilities``; uniform by default (SKDBERT, arXiv 2211.14466)."""

    probabilities: tuple[float, ...] | None = None

    def __call__(self, moment: Moment, count: int, /) -> tuple[float, ...]:
        shares = np.ones(count) if self.probabilities is None else np.asarray(self.probabilities, np.float64)
        if len(shares) != count:
            raise ValueError(f"{len(shares)} probabilities were given for {count} teachers")
        (draw,) = _uniform(moment, 1)
        chosen = int(np.searchsorted(np.cumsum(shares), draw * shares.sum(), side="right"))
        return tuple(float(index == chosen) for index in range(count))


@dataclass(frozen=True)
class DroppedTeachers:
    """Each teacher is left out of a step with probability ``rate``; if all would be, all stay."""

    rate: float

    def __call__(self, moment: Moment, count: int, /) -> tuple[float, ...]:
        kept = _uniform(moment, count) >= self.rate
        return tuple(kept.astype(float).tolist()) if kept.any() else (1.0,) * count


def _uniform(moment: Moment, count: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on seed and step only."""
    raw = np.asarray(
        np.random.PCG64(np.random.SeedSequence([moment.seed, moment.step, 2])).random_raw(count), np.uint64
    )
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
