"""The slots Φ, R and W: losses between hidden states of the student and of the teachers, and the terms that sum them.

    R(W Φ(h_s,j), Φ(h_i,l)) for student layer j and teacher layer l = g_i(j)

Φ picks vectors (``Feature``: all tokens, the first token, their mean) and may scale them to length 1. R is a ``Distance``
between two vectors (``HiddenStates``), or a ``Relation`` among the rows of a batch (``HiddenRelations``, relations.py).
W is ``HiddenProjections``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.errors import RecipeError
from kdcache.methods.base import Direction, Feature, Needs, Owned, Pair, Scope, Setup, View, Weight

if TYPE_CHECKING:
    from kdcache.codecs.base import TokenSelection
    from kdcache.distill.targets import Batch, Hidden

_TINY_VARIANCE = 1e-8  # a constant target has nothing to teach; it must not divide by zero either
PROJECTIONS = "projections"  # what W is called in checkpoints

FITS: Mapping[Feature, tuple[TokenSelection, ...]] = {  # what a cache may hold (dump.tokens) for a feature
    "stored": ("all", "first", "pooled"),
    "tokens": ("all",),
    "first": ("all", "first"),
    "mean": ("all", "pooled"),
}


# --- Φ: which vectors -------------------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """The two sides of a layer pair: n vectors each, and the row of the batch that each belongs to.

    ``valid`` [n] is 0 for vectors without a target, which lie there so that shapes depend on no values; None: all have one.
    """

    student: Tensor  # [n, width]
    teacher: Tensor  # [n, dim]
    rows: Tensor | None  # [n]; None: vector n is row n
    valid: Tensor | None


def select_vectors(target: Hidden, states: Tensor, mask: Tensor, feature: Feature) -> Vectors:
    """Φ without scaling.

    Args:
        target: Of one layer pair.
        states: The student's, ``[batch, tokens, width]``.
        mask: Attention mask, ``[batch, tokens]``; padding may be on either side.
        feature: Which vectors. The first token is the first that is no padding. The mean is over the tokens that have a
            target; of targets that are stored as a mean, over all.

    Returns:
        For ``stored`` and ``tokens`` one vector for each target; else one for each row. No value is read on the host.
    """
    flat = states.flatten(0, 1)
    if feature in ("stored", "tokens"):
        return Vectors(target.of_student(flat), target.aligned(), target.rows(states.shape[1]), None)
    if target.bags is not None:
        return Vectors(target.of_student(flat), target.aligned(), None, None)
    begins = torch.arange(len(states), device=target.positions.device) * states.shape[1]
    return _first(target, flat, begins + mask.argmax(dim=1)) if feature == "first" else _mean(target, flat, begins)


def _first(target: Hidden, flat: Tensor, first: Tensor) -> Vectors:
    student, found = flat.index_select(0, first), len(target.positions)
    if not found:
        return _nothing(student, target)
    place = torch.searchsorted(target.positions, first).clamp(max=found - 1)
    valid = target.positions[place] == first
    if target.src is None:  # decode only what is used
        scales = None if target.scales is None else target.scales[place]
        teacher = replace(target, values=target.values[place], scales=scales, positions=first).aligned()
    else:
        teacher = target.aligned()[place]
    return Vectors(student, teacher, None, valid)


def _mean(target: Hidden, flat: Tensor, begins: Tensor) -> Vectors:
    found = len(target.positions)
    if not found:
        return _nothing(flat.index_select(0, begins), target)
    offsets = torch.searchsorted(target.positions, begins)
    counts = torch.diff(offsets, append=offsets.new_tensor([found]))
    teacher = F.embedding_bag(torch.arange(found, device=offsets.device), target.aligned(), offsets, mode="mean")
    return Vectors(F.embedding_bag(target.positions, _exact(flat), offsets, mode="mean"), teacher, None, counts > 0)


def _nothing(student: Tensor, target: Hidden) -> Vectors:
    teacher = target.aligned()
    return Vectors(student, teacher.new_zeros(len(student), teacher.shape[1]), None, torch.zeros_like(student[:, 0]))


def count_vectors(target: Hidden, mask: Tensor, feature: Feature) -> int:
    """How many vectors of a feature have a target; on the host, with the attention mask ``[batch, tokens]``."""
    if feature in ("stored", "tokens") or target.bags is not None:
        return target.count
    positions, length = target.positions.cpu(), mask.shape[1]
    if feature == "mean":
        return len(torch.unique_consecutive(positions // length))
    first = mask.cpu().argmax(dim=1) + length * torch.arange(len(mask))
    return int(torch.isin(first, positions).sum())


def _exact(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# --- R: distances between two vectors -----------------------------------------------------------------------------------


class VectorLoss(Protocol):
    """A weighted sum of distances between pairs of vectors, divided by a count."""

    def __call__(
        self, student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None, count: int | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Distance:
    """R. ``scale_free``: it looks at directions alone, so a W of zeros has no gradient that means anything."""

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
        count: Covered tokens of the whole step; those given here where it is not given.

    Returns:
        A scalar; 0, with a gradient of 0, where no token is covered.
    """
    count = max(len(student) if count is None else count, 1)
    if token_weights is None:  # one kernel each way
        return F.mse_loss(_exact(student), _exact(teacher), reduction="sum") / (count * student.shape[1])
    errors = (_exact(student) - _exact(teacher)).square().mean(dim=-1)
    return (errors * token_weights).sum() / count


def squared_distance(
    student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None, count: int | None = None
) -> Tensor:
    """The mean of the squared Euclidean distances; arguments as in ``mean_squared_error``."""
    errors = (_exact(student) - _exact(teacher)).square().sum(dim=-1)
    return _weighted(errors, token_weights, count)


def cosine_distance(student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None, count: int | None = None) -> Tensor:
    """The mean of 1 - cos(student, teacher); arguments as in ``mean_squared_error``."""
    errors = 1 - F.cosine_similarity(_exact(student), _exact(teacher), dim=-1)
    return _weighted(errors, token_weights, count)


def _weighted(errors: Tensor, weights: Tensor | None, count: int | None) -> Tensor:
    total = errors.sum() if weights is None else (errors * weights).sum()
    return total / max(len(errors) if count is None else count, 1)


MEAN_SQUARE = Distance(mean_squared_error)
SQUARED = Distance(squared_distance)
COSINE = Distance(cosine_distance, scale_free=True)


def share_of_variance(losses: Mapping[Pair, Tensor], variances: Mapping[Pair, float]) -> dict[Pair, Tensor]:
    """Each pair's MSE divided by the variance of its target: about 1 for a student that knows nothing about it."""
    return {pair: loss / max(variances[pair], _TINY_VARIANCE) for pair, loss in losses.items()}


def plain_sum(losses: Mapping[Pair, Tensor]) -> Tensor:
    """MT-BERT's reduction, L_hid = sum_i sum_j MSE: grows with teachers and layers."""
    return torch.stack(list(losses.values())).sum()


def balanced_mean(losses: Mapping[Pair, Tensor]) -> Tensor:
    """The mean over teachers and layers, so that the term's scale does not depend on how many there are."""
    return torch.stack(list(losses.values())).mean()


# --- W: learnable projections -------------------------------------------------------------------------------------------


class HiddenProjections(nn.Module):
    """W_ij, one learnable matrix per teacher and student layer, thrown away after training (MT-BERT, section 3.2).

    student-to-teacher keeps the teachers' matrices of one student layer as blocks of a single [sum of dims, width] matrix:
    one product instead of N. teacher-to-student keeps one [width, dim] matrix per pair. ``both`` has one matrix on each
    side, into the smaller of the two widths. ``none`` has no matrix. No bias, as in the paper.

    On the student's side W starts at zero: the student's side is 0, the loss starts at the variance of its target, and W
    learns before the student is pulled. Started at random it predicts noise, which costs many times that variance, and the
    student pays for it (docs/results.md). Where the teacher's side is projected, zero is the collapse itself, so W starts at
    random, by ``seed``; so it does for losses that are free of scale, which have no gradient at zero.

    Args:
        dims: (teacher index, student layer) -> dimensions of the stored target.
        width: Hidden size of the student.
        direction: On which side W stands.
        seed: Of random initial values.
        scale_free: The loss looks at directions alone.
    """

    def __init__(
        self, dims: Mapping[Pair, int], width: int, direction: Direction, *, seed: int = 0, scale_free: bool = False
    ) -> None:
        super().__init__()
        self.direction = direction
        self.dims = dict(sorted(dims.items(), key=lambda item: (item[0][1], item[0][0])))
        generator = torch.Generator().manual_seed(seed)

        def drawn(rows: int, columns: int) -> Tensor:
            matrix: Tensor = torch.randn((rows, columns), generator=generator) / columns**0.5
            return matrix

        self.matrices = nn.ParameterDict()
        for (teacher, layer), dim in self.dims.items():
            own = f"layer{layer}-teacher{teacher}"
            if direction == "student-to-teacher":
                block = drawn(dim, width) if scale_free else torch.zeros(dim, width)
                self._append(f"layer{layer}", block)
            elif direction == "teacher-to-student":
                self._append(own, drawn(width, dim))
            elif direction == "both":
                self._append(f"{own}-student", drawn(min(width, dim), width))
                self._append(f"{own}-teacher", drawn(min(width, dim), dim))

    def _append(self, name: str, block: Tensor) -> None:
        known = [self.matrices[name].data] if name in self.matrices else []
        self.matrices[name] = nn.Parameter(torch.cat([*known, block]))

    def forward(self, student_hidden: Sequence[Tensor], targets: Mapping[Pair, Hidden]) -> dict[Pair, tuple[Tensor, Tensor]]:
        """Both sides of every pair, for targets as they are stored.

        Args:
            student_hidden: ``[batch, tokens, width]`` by layer, 0 = embeddings.
            targets: (teacher index, student layer) -> targets of the batch.

        Returns:
            (student side, teacher side) of every pair, both ``[targets, dim or width]``.
        """
        if self.direction != "student-to-teacher":
            return {
                pair: self.project(pair, target.of_student(student_hidden[pair[1]].flatten(0, 1)), target.aligned())
                for pair, target in targets.items()
            }
        sides: dict[Pair, tuple[Tensor, Tensor]] = {}
        for layer in sorted({layer for _, layer in targets}):
            states = student_hidden[layer].flatten(0, 1)
            blocks = self._blocks(layer)
            if any(targets[pair].count < len(states) // 2 for pair in blocks if pair in targets):  # targets per text
                sided = {
                    pair: F.linear(targets[pair].of_student(states), block) for pair, block in blocks.items() if pair in targets
                }
            else:
                sizes = [len(block) for block in blocks.values()]
                projected = zip(blocks, F.linear(states, self.matrices[f"layer{layer}"]).split(sizes, dim=1), strict=True)
                sided = {pair: targets[pair].of_student(side) for pair, side in projected if pair in targets}
            sides |= {pair: (side, targets[pair].aligned()) for pair, side in sided.items()}
        return sides

    def project(self, pair: Pair, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of a pair after W; student ``[n, width]``, teacher ``[n, dim]``."""
        own = f"layer{pair[1]}-teacher{pair[0]}"
        if self.direction == "student-to-teacher":
            return F.linear(student, self._blocks(pair[1])[pair]), teacher
        if self.direction == "teacher-to-student":
            return student, _on_teacher(teacher, self.matrices[own])
        if self.direction == "both":
            return F.linear(student, self.matrices[f"{own}-student"]), _on_teacher(teacher, self.matrices[f"{own}-teacher"])
        return student, teacher

    def _blocks(self, layer: int) -> dict[Pair, Tensor]:
        pairs = [pair for pair in self.dims if pair[1] == layer]
        blocks = self.matrices[f"layer{layer}"].split([self.dims[pair] for pair in pairs])
        return dict(zip(pairs, blocks, strict=True))


def _on_teacher(teacher: Tensor, matrix: Tensor) -> Tensor:
    return F.linear(teacher.to(matrix.dtype), matrix)  # stored values are float32 at most


def rate_factor(paper: bool) -> int:
    """The learning rate of W over that of the student: at the student's own rate W hardly moves (docs/method.md)."""
    return 1 if paper else 10


# --- the terms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HiddenStates:
    """The term: a distance between vectors of the student and of each teacher, over layer pairs.

    Attributes:
        feature: Φ, which vectors.
        normalised: Φ scales them to length 1, before W.
        distance: R.
        direction: W; None leaves it to the recipe.
        paper_direction: W with ``paper = true``.
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
        """Weights are made from logits."""
        return Needs(logits=self.weighted, hidden=self.feature)

    def bind(self, setup: Setup, /) -> BoundHiddenStates:
        """With a W for every pair; RecipeError where there is none to be and widths differ."""
        direction = self.direction or (self.paper_direction if setup.paper else setup.direction)
        if direction == "none":
            _check_widths(setup)
        return BoundHiddenStates(self, setup, direction)


class BoundHiddenStates:
    """Ready to use; owns the matrices W. Logs the loss of each pair."""

    def __init__(self, term: HiddenStates, setup: Setup, direction: Direction) -> None:
        self._term, self._setup = term, setup
        self.projections = HiddenProjections(
            setup.dims, setup.student_width, direction, seed=setup.seed, scale_free=term.distance.scale_free
        )
        self._by_variance = not (setup.paper or term.normalised or term.distance.scale_free)

    @property
    def owned(self) -> Mapping[str, Owned]:
        """W, where there is one."""
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
        return _reduced(losses, self._term.name, self._setup, view, log)

    def _sides(self, view: View) -> Iterator[tuple[Pair, Tensor, Tensor, Tensor | None]]:
        targets = _active(view)
        if self._term.feature in ("stored", "tokens") and not self._term.normalised:  # W first: one product for all teachers
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
                (F.normalize(_exact(side), dim=-1) for side in vectors[:2]) if self._term.normalised else vectors[:2]
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
    """R over the rows of a batch: how the relations among the student's vectors differ from those among the teacher's."""

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor, /) -> Tensor:
        """A scalar. Shapes: student ``[rows, width]``, teacher ``[rows, dim]``; valid ``[rows]``, 0 = leave the row out."""
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
    """Ready to use; owns no parameters. Logs the loss of each pair."""

    owned: Mapping[str, Owned] = {}

    def __init__(self, term: HiddenRelations, setup: Setup) -> None:
        self._term, self._setup = term, setup

    def count(self, _batch: Batch, /) -> Mapping[Pair, int]:
        return {}

    def __call__(self, view: View, log: dict[str, Tensor], /) -> Tensor:
        losses: dict[Pair, Tensor] = {}
        for pair, target in _active(view).items():
            vectors = select_vectors(target, view.student_hidden[pair[1]], view.attention_mask, self._term.feature)
            student, teacher = (_exact(side) for side in vectors[:2])
            if self._term.normalised:
                student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
            valid = torch.ones_like(teacher[:, 0]) if vectors.valid is None else vectors.valid.to(teacher.dtype)
            with torch.autocast(student.device.type, enabled=False):  # differences of near vectors want all bits
                parts = [factor * relation(student, teacher, valid) for factor, relation in self._term.relations]
            losses[pair] = torch.stack(parts).sum()
        return _reduced(losses, self._term.name, self._setup, view, log)


def _check_widths(setup: Setup) -> None:
    for (teacher, layer), dim in setup.dims.items():
        if dim != setup.student_width:
            raise RecipeError(
                f"targets of teacher '{setup.teachers[teacher]}' for student layer {layer} have {dim} dimensions, "
                f"the student has {setup.student_width}, and no projection stands between them",
                'Set distill.hidden_direction = "student-to-teacher" (without distill.paper), or dump with that dim.',
            )


def _active(view: View) -> dict[Pair, Hidden]:
    """The targets of the teachers that count in this step."""
    return {pair: target for pair, target in view.hidden_targets.items() if view.factors[pair[0]] > 0}


def _counts(batch: Batch, feature: Feature) -> dict[Pair, int]:
    """Per pair; pairs that share an alignment are counted once."""
    mask, known = batch.inputs["attention_mask"], dict[int, int]()
    targets = batch.targets.hidden if batch.targets is not None else {}
    for target in targets.values():
        if id(target.positions) not in known:
            known[id(target.positions)] = count_vectors(target, mask, feature)
    return {pair: known[id(target.positions)] for pair, target in targets.items()}


def _reduced(losses: Mapping[Pair, Tensor], name: str, setup: Setup, view: View, log: dict[str, Tensor]) -> Tensor:
    """Over teachers and layers; a teacher's factor multiplies what it adds."""
    log |= {f"{name}/{setup.teachers[teacher]}/{layer}": loss for (teacher, layer), loss in sorted(losses.items())}
    if any(factor not in (0.0, 1.0) for factor in view.factors):
        losses = {pair: view.factors[pair[0]] * loss for pair, loss in losses.items()}
    return plain_sum(losses) if setup.paper else balanced_mean(losses)
