"""The slot S: how the weights of terms change over the training, and which teachers take part in a step.

Schedules are pure functions of ``Moment`` (step, total steps, epoch, seed), so a resumed training repeats them. Only
raw outputs of numpy's bit generators are used: numpy guarantees those streams for ever (NEP 19).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.methods.base import Moment, Setup


class Schedule(Protocol):
    """a(t): the factor of a term's weight."""

    def __call__(self, term: str, moment: Moment, /) -> float: ...


class TeacherChoice(Protocol):
    """s_i(t): the factors of ``count`` teachers in a step; 0 leaves a teacher out. At least one is above 0."""

    def __call__(self, moment: Moment, count: int, /) -> tuple[float, ...]: ...


@runtime_checkable
class TeacherRule(Protocol):
    """A choice of teachers that depends on facts about them; bound once, before the first step.

    Attributes:
        reads: The facts, for ``kdcache methods``.
    """

    @property
    def reads(self) -> str: ...

    def bind(self, setup: Setup, /) -> TeacherChoice:
        """The choice among the teachers of ``setup``. Raises RecipeError where a fact is missing."""
        ...


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


@dataclass(frozen=True)
class Staircase:
    """A factor that rises to 1 in equal steps: 1/steps, 2/steps, …, 1 (Annealing-KD, arXiv 2104.07163).

    Attributes:
        steps: How many values it takes, each for an equal share of the time until ``end``.
        end: The share of the training after which it stays at 1.
    """

    steps: int
    end: float = 1.0

    def __call__(self, moment: Moment, /) -> float:
        return min(int(moment.share / self.end * self.steps) + 1, self.steps) / self.steps


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
class BestTeacher:
    """The teacher with the best validation score, in every step. Of equal ones it is the first."""

    reads: str = "validation scores"

    def bind(self, setup: Setup, /) -> TeacherChoice:
        """Fixed for the training."""
        scores = setup.validation_scores()
        best = tuple(float(index == int(np.argmax(scores))) for index in range(len(scores)))
        return lambda _moment, _count: best


@dataclass(frozen=True)
class SampledByTeacherRank:
    """One teacher per step; its probability is the rank of its validation score (SKDBERT, teacher-rank)."""

    reads: str = "validation scores"

    def bind(self, setup: Setup, /) -> TeacherChoice:
        """With probabilities of the ranks."""
        return SampledTeacher(rank_shares(setup.validation_scores()))


@dataclass(frozen=True)
class SampledByStudentRank:
    """One teacher per step; its probability is the rank of ``distill.student_scores`` (SKDBERT, student-rank)."""

    reads: str = "distill.student_scores"

    def bind(self, setup: Setup, /) -> TeacherChoice:
        """With probabilities of the ranks. Raises RecipeError where a teacher has no score."""
        missing = [name for name in setup.teachers if name not in setup.student_scores]
        if missing:
            raise RecipeError(
                f"distill.student_scores has no score for teacher '{missing[0]}'; the method needs one for each of: "
                f"{', '.join(setup.teachers)}",
                "Distil one student from each teacher alone (distill.teachers = [NAME]), and give their validation "
                "scores as distill.student_scores = {NAME = 0.87, ...}.",
            )
        return SampledTeacher(rank_shares([setup.student_scores[name] for name in setup.teachers]))


def rank_shares(scores: Sequence[float]) -> tuple[float, ...]:
    """Shares that sum to 1 and are proportional to the ranks of the scores: 1 for the lowest, N for the highest.

    Equal scores share the mean of their ranks, so the order of the teachers does not matter.
    """
    values = np.asarray(scores, np.float64)
    ranks = [float(np.mean([np.sum(values < value) + 1, np.sum(values <= value)])) for value in values]
    return tuple(rank / sum(ranks) for rank in ranks)


def _uniform(moment: Moment, count: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on seed and step only."""
    raw = np.asarray(
        np.random.PCG64(np.random.SeedSequence([moment.seed, moment.step, 2])).random_raw(count), np.uint64
    )
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
