"""What somebody should know before the scores: warnings on a student, its teachers, its loss and its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.progress import listed
from kdcache.report.html import Caution
from kdcache.report.losses import by_stage, loss_shares, read_curves, weights_of_terms
from kdcache.report.process import DISTILL
from kdcache.report.table import remarks

if TYPE_CHECKING:
    from kdcache.report.loaded import LoadedRun

COVERAGE = 0.9  # of the student's tokens with a target, below which alignment is in question
NO_EFFECT = 0.01  # share of the loss, below which a term has hardly an effect
_NAMES = 8  # classes that are named


def cautions(
    loaded: LoadedRun, baseline: LoadedRun | None, models_that_differ: Sequence[str] = (), *, compared: bool = True
) -> list[Caution]:
    """The warnings of a run, the gravest first.

    ``models_that_differ``: whose rows do not give their score. ``compared``: whether the baseline is the same student.
    """
    alone = None if baseline is None or not compared else baseline.results
    return [
        *_stale(models_that_differ),
        *_one_class(loaded, "student"),
        *([] if baseline is None else _one_class(baseline, "student without teachers")),
        *(Caution(line) for line in remarks(loaded.results, alone)),
        *_idle_terms(loaded),
        *_coverage(loaded.results),
        *_lacking_classes(loaded),
    ]


def _stale(models: Sequence[str]) -> Iterator[Caution]:
    for name in models:
        yield Caution(
            f"The kept answers of the {name} do not give its score, so they are of another training.",
            "Make them again: kdcache report RUN --predict",
        )


def _one_class(loaded: LoadedRun, name: str) -> Iterator[Caution]:
    """A student that gives the same answer to all rows, although these have several labels."""
    for split, rows in loaded.predictions.items():
        answers, labels = np.unique(rows.student.predictions), np.unique(rows.labels[rows.labels >= 0])
        if len(answers) == 1 and len(labels) > 1:
            only = _named(loaded.labels, answers)
            yield Caution(
                f"The {name} answers {only} to all {len(rows.labels):,} rows of {split}.",
                "More epochs, or another distill.learning_rate, may help.",
            )
            return


def _idle_terms(loaded: LoadedRun) -> Iterator[Caution]:
    for stage, curves in by_stage(read_curves(loaded.run.metrics, "steps")).items():
        shares = loss_shares(curves, weights_of_terms(loaded.results, stage)) if stage.startswith(DISTILL) else None
        for term, share in ({} if shares is None or len(shares.terms) < 2 else shares.of_all()).items():
            if share < NO_EFFECT:
                yield Caution(
                    f"The loss term '{term}' has hardly an effect: it is {100 * share:.2g}% of the loss ({stage}).",
                    "Raise its weight in [distill.weights], or set it to 0: its targets are then not read.",
                )


def _coverage(results: Mapping[str, Any]) -> Iterator[Caution]:
    for teacher, share in results.get("coverage", {}).items():
        if share < COVERAGE:
            yield Caution(
                f"Only {100 * share:.1f}% of the student's tokens have a hidden target of teacher {teacher}.",
                "Its tokenizer may lose text, or its max_length cuts texts that the student reads: raise "
                "teachers.max_length.",
            )


def _lacking_classes(loaded: LoadedRun) -> Iterator[Caution]:
    rows = loaded.predictions.get("validation")
    if rows is None or not len(rows.labels):
        return
    lacking = np.setdiff1d(np.arange(rows.logits.shape[1]), rows.labels)
    if len(lacking):
        yield Caution(
            f"Validation has no row of {len(lacking):,} of {rows.logits.shape[1]:,} classes: "
            f"{_named(loaded.labels, lacking)}. The best epoch is chosen without them.",
            "Name a larger data.validation, or raise data.validation_fraction.",
        )


def _named(labels: Sequence[str], numbers: np.ndarray) -> str:
    names = [f"'{labels[number]}'" if number < len(labels) else str(number) for number in numbers.tolist()]
    return listed(names, most=_NAMES)
