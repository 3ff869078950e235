"""The slot R: losses between hidden states of the student and of the teachers, and the terms that sum them.

    R(W Φ(h_s,j), Φ(h_i,l)) for student layer j and teacher layer l = g_i(j)

R is a ``Distance`` between two vectors (``HiddenStates``), or a ``Relation`` among the rows of a batch
(``HiddenRelations``; relations.py). Φ is in features.py, W in projections.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import RecipeError
from kdcache.methods.base import Direction, Feature, Needs, Owned, Pair, Scope, Setup, View, Weight
from kdcache.methods.parts.features import at_least_float32, count_vectors, select_vectors
from kdcache.methods.parts.projections import PROJECTIONS, HiddenProjections, rate_factor

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch, Hidden

_TINY_VARIANCE = 1e-8  # a constant target must not divide by zero


class VectorLoss(Protocol):
    """A weighted sum of distances between pairs of vectors, divided by a count."""

    def __call__(
        self, student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None, count: int | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Distance:
    """R. ``scale_free``: it depends on directions only, so W = 0 has no useful gradient."""

    loss: VectorLoss
    scale_free: bool = False


def mean_squared_error(
    student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None, count: int | None = None
) -> Tensor:
    """MSE over tokens and dimensions.

    Args:
        student: ``[tokens, dim]``.
        teacher: ``[tokens, dim]``.
        token_weights: ``[tokens]``, multiply each token's error.
        count: Covered tokens of the whole step; by default those given.

    Returns:
        A scalar; 0, with a gradient of 0, where no token is covered.
    """
    count = max(len(student) if count is None else count, 1)
    if token_weights is None:  # one kernel each way
        return F.mse_loss(at_least_float32(student), at_least_float32(teacher), reduction="sum") / (
            count * student.shape[1]
        )
    errors = (at_least_float32(student) - at_least_float32(teacher)).square().mean(dim=-1)
    return (errors * token_weights).sum() / count


def squared_distance(
    student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None, count: int | None = None
) -> Tensor:
    """The mean of the squared Euclidean distances; arguments as in ``mean_squared_error``."""
    errors = (at_least_float32(student) - at_least_float32(teacher)).square().sum(dim=-1)
    return _weighted(errors, token_weights, count)


def cosine_distance(
    student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None, count: int | None = None
) -> Tensor:
    """The mean of 1 - cos(student, teacher); arguments as in ``mean_squared_error``."""
    errors = 1 - F.cosine_similarity(at_least_float32(student), at_least_float32(teacher), dim=-1)
    return _weighted(errors, token_weights, count)


def _weighted(errors: Tensor, weights: Tensor | None, count: int | None) -> Tensor:
    total = errors.sum() if weights is None else (errors * weights).sum()
    return total / max(len(errors) if count is None else count, 1)


MEAN_SQUARE = Distance(mean_squared_error)
SQUARED = Distance(squared_distance)
COSINE = Distance(cosine_distance, scale_free=True)


def share_of_variance(losses: Mapping[Pair, Tensor], variances: Mapping[Pair, float]) -> dict[Pair, Tensor]:
    """Each pair's MSE divided by the variance of its target; about 1 for an untrained student."""
    return {pair: loss / max(variances[pair], _TINY_VARIANCE) for pair, loss in losses.items()}


def plain_sum(losses: Mapping[Pair, Tensor]) -> Tensor:
    """MT-BERT's reduction, L_hid = sum_i sum_j MSE; it grows with teachers and layers."""
    return torch.stack(list(losses.values())).sum()


def balanced_mean(losses: Mapping[Pair, Tensor]) -> Tensor:
    """The mean over teachers and layers, so that the term's scale does not depend on how many there are."""
    return torch.stack(list(losses.values())).mean()


@dataclass(frozen=True)
class HiddenStates:
    """The term: a distance between vectors of the student and of each teacher, over layer pairs.

    Attributes:
        feature: Φ, which vectors.
        normalised: Φ scales them to length 1, before W.
        distance: R.
        direction: The side of W; None leaves it to the recipe.
        paper_direction: The side of W with ``paper = true``.
        weighted: The teachers' weights on the rows multiply the errors.
    """

    feature: Feature = "stored"
    normalised: bool = False
    distance: Distance = MEAN_SQUARE
    direction: Direction | None = None
    paper_direction: Direction = "teacher-to-student"
    weighted: bool = False
    name: str = "hidden"
    weight: Weight = "hidden"
    scope: Scope = "row"
    module: str = PROJECTIONS

    @property
    def needs(self) -> Needs:
        """Logits too if weighted: weights are computed from them."""
        return Needs(logits=self.weighted, hidden=self.feature)

    def bind(self, setup: Setup, /) -> BoundHiddenStates:
        """With a W for every pair. Raises RecipeError without W where widths differ."""
        direction = self.direction or (self.paper_direction if setup.paper else setup.direction)
        if direction == "none":
            _check_widths(setup)
        return BoundHiddenStates(self, setup, direction)


class BoundHiddenStates:
    """The bound term; owns the matrices W. Logs the loss of each pair."""

    def __init__(self, term: HiddenStates, setup: Setup, direction: Direction) -> None:
        self._term, self._setup = term, setup
        self.projections = HiddenProjections(
            setup.dims, setup.student_width, direction, seed=setup.seed, scale_free=term.distance.scale_free
        )
        self._by_variance = not (setup.paper or term.normalised or term.distance.scale_free)

    @property
    def owned(self) -> Mapping[str, Owned]:
        """W, unless the direction is ``none``."""
        factor = rate_factor(self._setup.paper)
        return {self._term.module: Owned(self.projections, factor)} if len(self.projections.matrices) else {}

    def count(self, batch: Batch, /) -> Mapping[Pair, int]:
        return _counts(batch, self._term.feature)

    def __call__(self, view: View, log: dict[str, Tensor], /) -> Tensor:
        counts, losses = view.counts.vectors[self._term.name], dict[Pair, Tensor]()
        for pair, student, teacher, weights in self._sides(view):
            losses[pair] = self._term.distance.loss(student, teacher, token_weights=weights, count=counts[pair])
        if self._by_variance:
            losses = share_of_variance(losses, self._setup.variances(view.moment.epoch))
        return reduced(losses, self._term.name, self._setup, view, log, weighted=self._term.weighted)

    def _sides(self, view: View) -> Iterator[tuple[Pair, Tensor, Tensor, Tensor | None]]:
        targets = active_targets(view)
        if (
            self._term.feature in ("stored", "tokens") and not self._term.normalised
        ):  # one matrix product for all teachers
            length = view.attention_mask.shape[1]
            for pair, (student, teacher) in self.projections(view.student_hidden, targets).items():
                yield (
                    pair,
                    student,
                    teacher,
                    self._weights(view, pair, targets[pair].rows(length)) if self._term.weighted else None,
                )
            return
        for pair, target in targets.items():
            vectors = select_vectors(target, view.student_hidden[pair[1]], view.attention_mask, self._term.feature)
            student, teacher = (
                (F.normalize(at_least_float32(side), dim=-1) for side in vectors[:2])
                if self._term.normalised
                else vectors[:2]
            )
            weights = self._weights(view, pair, vectors.rows) if self._term.weighted else None
            if vectors.valid is not None:
                weights = vectors.valid.to(teacher.dtype) if weights is None else weights * vectors.valid
            yield pair, *self.projections.project(pair, student, teacher), weights

    @staticmethod
    def _weights(view: View, pair: Pair, rows: Tensor | None) -> Tensor:
        weights = view.weights[pair[0]]
        return weights if rows is None else weights[rows]


class Relation(Protocol):
    """R over the rows of a batch: the difference between the student's relations and the teacher's."""

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor, /) -> Tensor:
        """A scalar. Shapes: student ``[rows, width]``, teacher ``[rows, dim]``, valid ``[rows]``, 0 = leave out."""
        ...


@dataclass(frozen=True)
class HiddenRelations:
    """The term: relations among the rows of a batch, over layer pairs. Widths may differ, so there is no W.

    Attributes:
        relations: (factor, R) of each kind of relation.
        feature: Φ, one vector per row.
        normalised: Φ scales them to length 1.
    """

    relations: tuple[tuple[float, Relation], ...]
    feature: Feature = "mean"
    normalised: bool = False
    name: str = "hidden"
    weight: Weight = "hidden"
    scope: Scope = "batch"
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.feature not in ("first", "mean"):
            raise ValueError(f"relations among rows take one vector per row: 'first' or 'mean', not '{self.feature}'")

    @property
    def needs(self) -> Needs:
        return Needs(hidden=self.feature)

    def bind(self, setup: Setup, /) -> BoundHiddenRelations:
        """For every layer pair of the setup."""
        return BoundHiddenRelations(self, setup)


class BoundHiddenRelations:
    """The bound term, without parameters. Logs the loss of each pair."""

    owned: Mapping[str, Owned] = {}

    def __init__(self, term: HiddenRelations, setup: Setup) -> None:
        self._term, self._setup = term, setup

    def count(self, _batch: Batch, /) -> Mapping[Pair, int]:
        return {}

    def __call__(self, view: View, log: dict[str, Tensor], /) -> Tensor:
        losses: dict[Pair, Tensor] = {}
        for pair, target in active_targets(view).items():
            vectors = select_vectors(target, view.student_hidden[pair[1]], view.attention_mask, self._term.feature)
            student, teacher = (at_least_float32(side) for side in vectors[:2])
            if self._term.normalised:
                student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
            valid = torch.ones_like(teacher[:, 0]) if vectors.valid is None else vectors.valid.to(teacher.dtype)
            with torch.autocast(student.device.type, enabled=False):  # differences of close vectors need float32
                parts = [factor * relation(student, teacher, valid) for factor, relation in self._term.relations]
            losses[pair] = torch.stack(parts).sum()
        return reduced(losses, self._term.name, self._setup, view, log)


def _check_widths(setup: Setup) -> None:
    for (teacher, layer), dim in setup.dims.items():
        if dim != setup.student_width:
            raise RecipeError(
                f"targets of teacher '{setup.teachers[teacher]}' for student layer {layer} have {dim} dimensions, "
                f"the student has {setup.student_width}, and no projection stands between them",
                'Set distill.hidden_direction = "student-to-teacher" (without distill.paper), or dump with that dim.',
            )


def active_targets(view: View) -> dict[Pair, Hidden]:
    """The targets of the teachers that take part in this step."""
    return {pair: target for pair, target in view.hidden_targets.items() if view.factors[pair[0]] > 0}


def _counts(batch: Batch, feature: Feature) -> dict[Pair, int]:
    """Vectors with a target, per pair; pairs that share an alignment are counted once."""
    mask, known = batch.inputs["attention_mask"], dict[int, int]()
    targets = batch.targets.hidden if batch.targets is not None else {}
    for target in targets.values():
        if id(target.positions) not in known:
            known[id(target.positions)] = count_vectors(target, mask, feature)
    return {pair: known[id(target.positions)] for pair, target in targets.items()}


def reduced(
    losses: Mapping[Pair, Tensor],
    name: str,
    setup: Setup,
    view: View,
    log: dict[str, Tensor],
    *,
    weighted: bool = False,
) -> Tensor:
    """The reduction over teachers and layers, with each teacher's factor; ``weighted`` losses have it already."""
    log |= {f"{name}/{setup.teachers[teacher]}/{layer}": loss for (teacher, layer), loss in sorted(losses.items())}
    if not weighted and any(factor not in (0.0, 1.0) for factor in view.factors):
        losses = {pair: view.factors[pair[0]] * loss for pair, loss in losses.items()}
    return plain_sum(losses) if setup.paper else balanced_mean(losses)
