"""Weighs the teachers of a cache by what they know of labelled texts, without running a teacher.

The cached logits of a split are read, mixtures of several kinds are compared by cross-validation, and the one with the
best held-out likelihood is fitted to all rows. Scores that depend on a fit are held-out scores: each row is scored by a
fit that did not see its text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kdcache.distill.mixture import KINDS, Fitter, Kind, LabelledLogits, Mixture, simplex_weights, softmax
from kdcache.errors import DataError
from kdcache.loading.examples import join_examples, stored_logits
from kdcache.progress import listed
from kdcache.report.metrics import accuracy, calibration_error

if TYPE_CHECKING:
    from kdcache.cache.ids import Examples
    from kdcache.cache.reader import Cache

FEWEST_TEXTS = 50  # labelled texts, below which a fit says nothing
FOLDS = 5
_SAME = 1e-6  # nats per row: a smaller difference counts as none


@dataclass(frozen=True)
class Quality:
    """How good probabilities are: share of right answers, nats per row, and calibration error."""

    accuracy: float
    nll: float
    calibration_error: float

    @classmethod
    def of(cls, labels: np.ndarray, probabilities: np.ndarray) -> Quality:
        """Of ``probabilities`` [n, C] against ``labels`` [n]."""
        return cls(
            accuracy(labels, probabilities.argmax(axis=1)),
            float(-np.log(_of_labels(probabilities, labels)).mean()),
            calibration_error(labels, probabilities),
        )


@dataclass(frozen=True)
class WeighedTeacher:
    """One teacher: alone as cached (``raw``), alone at its temperature, and what the mixture loses without it.

    ``loss_without``: nats per row, held out, with its ``standard_error``; None for a single teacher.
    """

    weight: float
    temperature: float
    raw: Quality
    calibrated: Quality
    loss_without: float | None
    standard_error: float | None


@dataclass(frozen=True)
class Weighing:
    """The result: ``kinds`` gives the held-out nats per row of each kind of mixture, ``kind`` is the chosen one."""

    split: str
    rows: int
    label_names: tuple[str, ...]
    kind: Kind
    kinds: Mapping[Kind, float]
    mixture: Mixture
    teachers: Mapping[str, WeighedTeacher]
    mean: Quality  # of the plain mean of the teachers' probabilities
    fitted: Quality  # of the chosen mixture
    leave_out: tuple[str, ...]  # the held-out likelihood does not fall without them

    def settings(self) -> dict[str, Any]:
        """The keys of ``[distill]`` that give this mixture."""
        return mixture_settings(self.mixture, tuple(self.teachers))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "split": self.split,
            "rows": self.rows,
            "chosen": str(self.kind),
            "held_out_nll": {str(kind): nll for kind, nll in self.kinds.items()},
            "teachers": {
                name: {**vars(each), "raw": vars(each.raw), "calibrated": vars(each.calibrated)}
                for name, each in self.teachers.items()
            },
            "mean": vars(self.mean),
            "fitted": vars(self.fitted),
            "leave_out": list(self.leave_out),
            "distill": self.settings(),
        }


def mixture_settings(mixture: Mixture, teachers: Sequence[str]) -> dict[str, Any]:
    """A mixture as keys of ``[distill]``; ``teacher_class_weights`` only where classes have weights of their own."""
    weights, temperatures = mixture.weights.tolist(), mixture.temperatures.tolist()
    settings: dict[str, Any] = {
        "teacher_weights": dict(zip(teachers, weights, strict=True)),
        "teacher_temperatures": dict(zip(teachers, temperatures, strict=True)),
    }
    if mixture.class_weights is not None:
        settings["teacher_class_weights"] = dict(zip(teachers, mixture.class_weights.tolist(), strict=True))
    return settings


def labelled_logits(
    cache: Cache,
    teachers: Sequence[str],
    split: str,
    *,
    examples: Callable[[str], Examples] | None = None,
    missing: Literal["error", "skip"] = "error",
    seed: int = 0,
) -> LabelledLogits:
    """The cached logits of the labelled rows of ``split``; rows with the same text are in the same fold.

    ``examples`` gives the rows of a split; those of the cache by default. Raises DataError where labels are missing or
    too few, MismatchError where the cache lacks the split or its texts.
    """
    joined = join_examples(cache, examples, (split,), missing=missing)
    labels = joined.labels[:]
    known = np.flatnonzero(labels >= 0)
    place = joined.parts[known].astype(np.int64) << 32 | joined.rows[known]
    texts, text_of = np.unique(place, return_inverse=True)
    _check_labels(cache, split, labels[known], len(texts), len(labels))
    fold_of = np.random.default_rng(seed).permutation(len(texts)) % FOLDS
    return LabelledLogits(stored_logits(cache, teachers, joined)[:, known], labels[known], fold_of[text_of])


def _check_labels(cache: Cache, split: str, labels: np.ndarray, texts: int, rows: int) -> None:
    names, there = cache.task.label_names, np.unique(labels)
    if texts < FEWEST_TEXTS:
        raise DataError(
            f"'{split}' of cache '{cache.path}' has {texts} labelled texts ({rows} rows); weighing teachers needs at "
            f"least {FEWEST_TEXTS}",
            "Label more texts, choose another --split, or give the weights yourself: distill.teacher_weights.",
        )
    if len(there) < 2:
        raise DataError(
            f"all labelled rows of '{split}' of cache '{cache.path}' have the label '{names[there[0]]}'; weighing "
            f"teachers needs several of: {listed(names)}",
            "Choose another --split, or give the weights yourself: distill.teacher_weights.",
        )


def weigh(data: LabelledLogits, teachers: Sequence[str], label_names: Sequence[str], split: str) -> Weighing:
    """Compare the kinds of mixtures by cross-validation, fit the best one, and score everything."""
    whole, folds = _fitters(data)
    kind, kinds, held_out = _compared(data, folds)
    mixture = whole.mixture(kind).rounded()
    each = [fold.mixture(kind) for fold in folds]
    temperatures = np.stack([found.temperatures for found in each])[data.folds]  # [n, N]
    losses, leave_out = _without(data, temperatures, equal=kind.weights == "equal")
    found = {}
    for index, name in enumerate(teachers):
        scaled = softmax(data.logits[index] / temperatures[:, index, None])
        found[name] = WeighedTeacher(
            float(mixture.weights[index]),
            float(mixture.temperatures[index]),
            Quality.of(data.labels, softmax(data.logits[index])),
            Quality.of(data.labels, scaled),
            *(losses[index] if losses else (None, None)),
        )
    mean = np.mean([softmax(logits) for logits in data.logits], axis=0)
    return Weighing(
        split,
        len(data.labels),
        tuple(label_names),
        kind,
        kinds,
        mixture,
        found,
        Quality.of(data.labels, mean),
        Quality.of(data.labels, held_out),
        tuple(teachers[index] for index in leave_out),
    )


def fitted_mixture(data: LabelledLogits) -> Mixture:
    """The mixture that ``weigh`` finds, without the scores."""
    whole, folds = _fitters(data)
    return whole.mixture(_compared(data, folds)[0]).rounded()


def _fitters(data: LabelledLogits) -> tuple[Fitter, list[Fitter]]:
    """To all rows, and for each fold to the rows of the others."""
    whole = Fitter(data)
    return whole, [Fitter(data.rows(data.folds != fold), whole) for fold in range(FOLDS)]


def _compared(data: LabelledLogits, folds: Sequence[Fitter]) -> tuple[Kind, dict[Kind, float], np.ndarray]:
    """The kind with the best held-out likelihood, those of all kinds, and its held-out probabilities [n, C]."""
    nlls: dict[Kind, float] = {}
    chosen, best = KINDS[0], np.zeros(0)[:, None]
    for kind in KINDS if len(data.logits) > 1 else [kind for kind in KINDS if kind.weights == "equal"]:
        held_out = np.empty(data.logits.shape[1:])
        for fold, fitter in enumerate(folds):
            rows = data.folds == fold
            held_out[rows] = fitter.mixture(kind).probabilities(data.logits[:, rows])
        nlls[kind] = float(-np.log(_of_labels(held_out, data.labels)).mean())
        if not len(best) or nlls[kind] < nlls[chosen] - _SAME:
            chosen, best = kind, held_out
    return chosen, nlls, best


def _without(
    data: LabelledLogits, temperatures: np.ndarray, *, equal: bool
) -> tuple[list[tuple[float, float]], list[int]]:
    """Per teacher what the mixture loses without it, in nats per row, with its standard error; and whom to leave out.

    Weights are fitted again without the teacher, temperatures are kept. Teachers are left out one after the other, as
    long as the held-out likelihood does not fall.
    """
    likelihoods = np.stack(
        [
            _of_labels(softmax(logits / own[:, None]), data.labels)
            for logits, own in zip(data.logits, temperatures.T, strict=True)
        ]
    )

    def held_out(which: list[int]) -> np.ndarray:
        found, own = np.empty(len(data.labels)), likelihoods[which]
        for fold in range(FOLDS):
            mine = data.folds == fold
            weights = np.full(len(which), 1 / len(which)) if equal else simplex_weights(own[:, ~mine])
            found[mine] = np.log(weights @ own[:, mine])
        return found

    there, losses, left = list(range(len(likelihoods))), list[tuple[float, float]](), list[int]()
    while len(there) > 1:
        full = held_out(there)
        gone = {index: full - held_out([other for other in there if other != index]) for index in there}
        if not losses:
            losses = [(float(gone[i].mean()), float(gone[i].std() / np.sqrt(len(data.labels)))) for i in there]
        least = min(there, key=lambda index: float(gone[index].mean()))
        if gone[least].mean() > _SAME:
            break
        there.remove(least)
        left.append(least)
    return losses, left


def _of_labels(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300))
