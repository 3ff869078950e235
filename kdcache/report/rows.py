"""What the answers on each row show: errors by class, disagreements, agreement of models, and calibration.

Everything here is counted over the rows of one split, from the class and the probability that each model answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kdcache.report.metrics import confidence_gap, confusion
from kdcache.report.predictions import Answers

BINS = 10  # of confidence, in a reliability curve


class OfClass(NamedTuple):
    """How a class is recognised; ``recall``, ``precision`` and ``f1`` are None where they are undefined."""

    label: int
    rows: int
    predicted: int
    recall: float | None
    precision: float | None
    f1: float | None


class Confused(NamedTuple):
    """``rows`` rows of class ``label`` that were answered with ``prediction``."""

    label: int
    prediction: int
    rows: int


class Bin(NamedTuple):
    """The rows of an interval of confidence: their mean confidence, their share of right answers, their number."""

    confidence: float
    accuracy: float
    rows: int


@dataclass(frozen=True)
class Calibration:
    """``error``: expected calibration error over 15 intervals (Guo et al., arXiv 1706.04599)."""

    error: float
    confidence: float
    accuracy: float
    bins: tuple[Bin, ...]


def labelled(labels: np.ndarray, answers: Answers) -> tuple[np.ndarray, Answers]:
    """The rows that have a label."""
    known = labels >= 0
    return labels[known], Answers(answers.predictions[known], answers.confidence[known])


def counted(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64[classes, classes] of labelled rows: row = label, column = prediction."""
    known = labels >= 0
    found = confusion(labels[known], predictions[known])
    whole = np.zeros((max(classes, len(found)),) * 2, dtype=np.int64)
    whole[: len(found), : len(found)] = found
    return whole


def by_class(counts: np.ndarray) -> list[OfClass]:
    """The classes of ``counted``, in their order."""
    right, rows, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return [
        OfClass(
            number,
            int(rows[number]),
            int(predicted[number]),
            share(int(right[number]), int(rows[number])),
            share(int(right[number]), int(predicted[number])),
            share(2 * int(right[number]), int(rows[number] + predicted[number])),
        )
        for number in range(len(counts))
    ]


def most_confused(counts: np.ndarray, most: int) -> list[Confused]:
    """The pairs of classes that are mistaken most often, at most ``most``; equal ones in the order of classes."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    labels, predictions = np.nonzero(wrong)
    sizes = wrong[labels, predictions]
    order = np.lexsort((predictions, labels, -sizes))[:most]
    return [Confused(int(labels[place]), int(predictions[place]), int(sizes[place])) for place in order]


def disagreements(
    labels: np.ndarray, student: Answers, teachers: Sequence[Answers], most: int
) -> dict[str, tuple[int, list[int]]]:
    """Rows on which the student and most of the teachers' answers differ in being right: (how many, the first rows).

    ``student wrong``: every teacher is right. ``teachers wrong``: the student is right, and no teacher. The rows come
    in the order of the confidence of who is wrong, the surest first.
    """
    known = labels >= 0
    right = known & (student.predictions == labels)
    of_teachers = np.array([known & (each.predictions == labels) for each in teachers])
    if not len(of_teachers):
        return {}
    surest = np.max([each.confidence for each in teachers], axis=0)
    groups = {
        "student wrong": (known & ~right & of_teachers.all(axis=0), student.confidence),
        "teachers wrong": (right & ~of_teachers.any(axis=0), surest),
    }
    found = {}
    for name, (where, confidence) in groups.items():
        rows = np.flatnonzero(where)
        ordered = rows[np.argsort(-confidence[rows], kind="stable")]
        found[name] = (len(rows), [int(row) for row in ordered[:most]])
    return found


def agreement(answers: Mapping[str, Answers]) -> dict[tuple[str, str], float]:
    """The share of rows on which two models answer with the same class, for each ordered pair of names."""
    return {
        (first, second): float(np.mean(one.predictions == two.predictions)) if len(one.predictions) else float("nan")
        for first, one in answers.items()
        for second, two in answers.items()
    }


def calibration(labels: np.ndarray, answers: Answers) -> Calibration | None:
    """Whether answers are as often right as their probability says; None without labelled rows, and for NaN.

    A student of kdcache 0.2 that diverged in its last step has a probability of NaN.
    """
    labels, answers = labelled(labels, answers)
    if not len(labels) or not np.isfinite(answers.confidence).all():
        return None
    right = answers.predictions == labels
    which = np.minimum((answers.confidence * BINS).astype(np.int64), BINS - 1)
    bins = tuple(
        Bin(float(answers.confidence[mine].mean()), float(right[mine].mean()), int(mine.sum()))
        for mine in (which == number for number in range(BINS))
        if mine.any()
    )
    error = confidence_gap(right, answers.confidence)
    return Calibration(error, float(answers.confidence.mean()), float(right.mean()), bins)
