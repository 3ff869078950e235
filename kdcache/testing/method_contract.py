"""The contract of a method, as test classes.

``MethodContract`` holds the tests that every registered method passes without knowing its formula. ``GoldenMethod``
compares a method with its formula, written out in plain loops over rows, classes and tokens::

    class TestMine(GoldenMethod):
        method = "mine"

        def expected(self, step: PlainStep) -> dict[str, float]: ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from kdcache.distill.objective import DistillationModel, ObjectiveSettings, objective_settings
from kdcache.errors import RecipeError
from kdcache.methods.base import Moment, Pair, Setup
from kdcache.methods.parts.layer_map import TeacherLayers
from kdcache.methods.parts.projections import PROJECTIONS, HiddenProjections
from kdcache.methods.parts.weighting import teacher_weights
from kdcache.methods.registry import find_method
from kdcache.recipe import DistillSection
from kdcache.testing.steps import (
    COVERED,
    LENGTH,
    MASK,
    PAIRS,
    ROWS,
    SCORES,
    STUDENT_SCORES,
    TEACHERS,
    VARIANCES,
    WIDTH,
    alone,
    loop_model,
    step_batch,
    step_loss,
)

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch

Vector = list[float]
START, LATE = Moment(0, 10), Moment(9, 10)


def settings_of(name: str, **keys: Any) -> ObjectiveSettings:
    """Of a recipe that names the method, with ``keys`` of its [distill] section."""
    return objective_settings(DistillSection(method=name, student_scores=STUDENT_SCORES, **keys))


def pairs_of(settings: ObjectiveSettings) -> dict[Pair, int]:
    """The layer pairs of two layers of the student and of each teacher, by the method's map."""
    maps = settings.layer_map.layers(dict.fromkeys(TEACHERS, TeacherLayers(2, (1, 2))), 2)
    layers = {(i, j): layer for i, name in enumerate(TEACHERS) for j, layer in enumerate(maps[name], start=1)}
    return {pair: PAIRS[pair] for pair, layer in layers.items() if layer is not None}


def without_labels(batch: Batch) -> Batch:
    """The same rows, none with a label."""
    return replace(batch, labels=torch.full_like(batch.labels, -1))


def without_hidden(batch: Batch, rows: Sequence[int]) -> Batch:
    """The same rows, of which ``rows`` have logits only."""
    assert batch.targets is not None
    hidden = {}
    for pair, target in batch.targets.hidden.items():
        kept = ~torch.isin(target.positions // LENGTH, torch.tensor(rows))
        hidden[pair] = replace(target, values=target.values[kept], positions=target.positions[kept])
    return replace(batch, targets=replace(batch.targets, hidden=hidden))


class MethodContract:
    """Inherit and give the fixture ``name``. Each test computes its loss through the module that is trained."""

    def test_it_says_where_it_comes_from(self, name: str) -> None:
        method = find_method(name)
        assert method.name == name
        assert method.title
        assert method.note
        assert "arXiv" in method.source or "doi" in method.source or name == "fine-tune"

    @pytest.mark.parametrize("logits_only", [(), (0, 3, 4)], ids=["hidden states", "logits only in some rows"])
    @pytest.mark.parametrize("moment", [START, LATE], ids=["start", "late"])
    def test_micro_batches_add_up_or_are_refused_by_name(
        self, name: str, moment: Moment, logits_only: tuple[int, ...]
    ) -> None:
        settings, batch = settings_of(name), without_hidden(step_batch(), logits_only)
        if find_method(name).scope == "batch":
            with pytest.raises(RecipeError, match=f"method '{name}' compares the rows of a batch"):
                settings_of(name, accumulation=2)
            return
        model = loop_model(settings, pairs_of(settings))
        whole, _, gradients = step_loss(model, _taken(batch, settings), moment=moment)
        for pieces in (2, ROWS):
            summed, _, parts = step_loss(model, _taken(batch, settings), pieces, moment)
            assert summed == pytest.approx(whole, rel=1e-6)
            assert all(torch.allclose(parts[key], gradients[key], atol=1e-6) for key in gradients)

    @pytest.mark.parametrize("moment", [START, LATE], ids=["start", "late"])
    @pytest.mark.parametrize("what", ["as they are", "no labels", "one row", "one teacher", "logits only"])
    def test_it_is_finite_on_any_batch(self, name: str, what: str, moment: Moment) -> None:
        settings, batch = settings_of(name), step_batch()
        batches = {"no labels": without_labels(batch), "one row": batch.split(ROWS)[1], "one teacher": alone(batch)}
        batches["logits only"] = without_hidden(batch, range(ROWS))
        batch = batches.get(what, batch)
        teachers = TEACHERS[:1] if what == "one teacher" else TEACHERS
        loss, _, gradients = step_loss(
            loop_model(settings, pairs_of(settings), teachers=teachers), _taken(batch, settings), moment=moment
        )
        assert math.isfinite(loss)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
        assert what != "as they are" or any(bool(gradient.any()) for gradient in gradients.values())

    def test_no_gradient_flows_through_the_weights_of_teachers(self, name: str) -> None:
        settings, batch = settings_of(name), step_batch()
        assert batch.targets is not None
        model = loop_model(settings, pairs_of(settings))
        gradients = step_loss(model, _taken(batch, settings))[2]
        logits = model.student(batch.inputs).logits
        weighing = settings.method.bound_weighting(plain_setup())
        fixed = teacher_weights(weighing, logits, batch.targets.logits, batch.labels)
        frozen = replace(settings, method=replace(settings.method, weighting=lambda *_: fixed))
        for key, gradient in step_loss(loop_model(frozen, pairs_of(frozen)), _taken(batch, settings))[2].items():
            assert torch.equal(gradient, gradients[key])


def _taken(batch: Batch, settings: ObjectiveSettings) -> Batch:
    """The targets that a source gives for these settings: layers of the map, and nothing that no term needs."""
    assert batch.targets is not None
    pairs = pairs_of(settings) if settings.needs_hidden else {}
    hidden = {pair: target for pair, target in batch.targets.hidden.items() if pair in pairs}
    logits = batch.targets.logits if settings.needs_logits else batch.targets.logits[:, :, :0]
    return replace(batch, targets=replace(batch.targets, logits=logits, hidden=hidden))


def plain_setup() -> Setup:
    """What rules of a method are bound to."""
    return Setup(
        TEACHERS,
        WIDTH,
        {},
        lambda _epoch: VARIANCES,
        validation_scores=lambda: SCORES,
        student_scores=STUDENT_SCORES,
    )


@dataclass(frozen=True)
class PlainStep:
    """A step as numbers in lists, for formulas in loops.

    Attributes:
        student: Logits by row.
        teachers: Logits by teacher and row.
        labels: By row, -1 = none.
        states: Student's hidden states by layer (0 = embeddings), row and token.
        targets: Layer pair -> (row, token) -> the teacher's vector.
        temperature: T.
        factor: T² where the recipe asks for it, else 1.
        paper: Whether sums are plain.
        factors: By teacher; 0 for one that takes no part.
        moment: The point in the training.
        model: For the matrices W.
    """

    student: list[Vector]
    teachers: list[list[Vector]]
    labels: list[int]
    states: list[list[list[Vector]]]
    targets: dict[Pair, dict[tuple[int, int], Vector]]
    temperature: float
    factor: float
    paper: bool
    factors: tuple[float, ...]
    moment: Moment
    model: DistillationModel

    @property
    def task(self) -> float:
        """CE(y, z_s), the mean over the rows with a label; 0 without one."""
        errors = [-log_softmax(row)[label] for row, label in zip(self.student, self.labels, strict=True) if label >= 0]
        return sum(errors) / max(len(errors), 1)

    def errors(self, row: int) -> Vector:
        """CE(y, z_i) of each teacher; 0 without a label."""
        label = self.labels[row]
        return [-log_softmax(logits[row])[label] if label >= 0 else 0.0 for logits in self.teachers]

    def soft_cross_entropy(self, row: int, target: Vector) -> float:
        """CE(softmax(target/T), softmax(z_s/T)) times the factor."""
        p, q = softmax(target, self.temperature), log_softmax(self.student[row], self.temperature)
        return -self.factor * sum(a * b for a, b in zip(p, q, strict=True))

    def sum_of_soft(self, weights: Sequence[Sequence[float]]) -> float:
        """The mean over rows of the sum over teachers of weight[row][teacher] times the soft cross-entropy."""
        return sum(
            weight * self.soft_cross_entropy(row, self.teachers[teacher][row])
            for row in range(ROWS)
            for teacher, weight in enumerate(weights[row])
        ) / ROWS  # fmt: skip

    def soft_of(self, targets: Sequence[Vector]) -> float:
        """The mean over rows of the soft cross-entropy with one target per row."""
        return sum(self.soft_cross_entropy(row, target) for row, target in enumerate(targets)) / ROWS

    def mean_probability(self, row: int) -> Vector:
        """T times the logarithm of the mean of the softened probabilities: logits of the mixture."""
        each = [softmax(logits[row], self.temperature) for logits in self.teachers]
        return [self.temperature * math.log(mean(column)) for column in zip(*each, strict=True)]

    def per_layer(self, losses: Mapping[Pair, float]) -> float:
        """Reduction over teachers and layers: a plain sum for the paper, else the mean over those that take part."""
        active = [loss for pair, loss in losses.items() if self.factors[pair[0]]]
        return sum(active) if self.paper else mean(active)

    def vectors(self, pair: Pair, feature: str = "tokens") -> dict[int, list[tuple[Vector, Vector]]]:
        """Row -> (student, teacher) vectors with a target: of ``tokens``, of the ``first`` token, or their ``mean``."""
        found: dict[int, list[tuple[Vector, Vector]]] = {}
        for (row, token), theirs in self.targets[pair].items():
            if feature != "first" or token == MASK[row].index(1):
                found.setdefault(row, []).append((self.states[pair[1]][row][token], theirs))
        if feature == "mean":
            return {
                row: [(average([m for m, _ in both]), average([t for _, t in both]))] for row, both in found.items()
            }
        return found

    def projected(self, pair: Pair, mine: Vector, theirs: Vector) -> tuple[Vector, Vector]:
        """Both sides after W, which is on one side or on none."""
        if PROJECTIONS not in self.model.owned:
            return mine, theirs
        projections = self.model.owned[PROJECTIONS].module
        assert isinstance(projections, HiddenProjections)
        if projections.direction == "teacher-to-student":
            return mine, times(projections.matrices[f"layer{pair[1]}-teacher{pair[0]}"].tolist(), theirs)
        first = sum(dim for (teacher, layer), dim in projections.dims.items() if layer == pair[1] and teacher < pair[0])
        matrix = projections.matrices[f"layer{pair[1]}"][first : first + projections.dims[pair]]
        return times(matrix.tolist(), mine), theirs


class GoldenMethod:
    """Inherit, name the method, and write its terms out in ``expected``."""

    method: ClassVar[str]

    def expected(self, step: PlainStep) -> dict[str, float]:
        """The terms that count in this step, by name and before the recipe's weights."""
        raise NotImplementedError(f"{type(self).__name__} must write out the terms of '{self.method}'")

    @pytest.mark.parametrize("keys", [{}, {"temperature": 3.0, "t_squared": True}, {"paper": True}], ids=str)
    @pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no-labels"])
    @pytest.mark.parametrize("moment", [START, Moment(6, 10, seed=3), LATE], ids=["start", "later", "late"])
    def test_the_loss_is_that_of_the_formula(self, keys: dict[str, Any], labelled: bool, moment: Moment) -> None:
        settings = settings_of(self.method, **keys)
        pairs = pairs_of(settings)
        model, batch = loop_model(settings, pairs), _taken(step_batch(), settings)
        batch = batch if labelled else without_labels(batch)
        expected = self.expected(plain_step(model, batch, moment))
        loss, terms, _ = step_loss(model, batch, moment=moment)
        for name, value in expected.items():
            assert terms[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name  # hidden targets are float32
        total = sum(settings.weight(term) * expected[term.name] for term in settings.terms if term.name in expected)
        assert loss == pytest.approx(total, rel=1e-6, abs=1e-9)


def plain_step(model: DistillationModel, batch: Batch, moment: Moment) -> PlainStep:
    """The numbers of a step."""
    assert batch.targets is not None
    settings, output = model.settings, model.student(batch.inputs, hidden_states=True)
    places = {i: [(row, token) for row, tokens in enumerate(COVERED[i]) for token in tokens] for i in (0, 1)}
    return PlainStep(
        student=output.logits.tolist(),
        teachers=batch.targets.logits.tolist(),
        labels=batch.labels.tolist(),
        states=[layer.tolist() for layer in output.hidden_states],
        targets={
            pair: dict(zip(places[pair[0]], target.values.tolist(), strict=True))
            for pair, target in batch.targets.hidden.items()
        },
        temperature=settings.temperature,
        factor=settings.temperature**2 if settings.t_squared else 1.0,
        paper=settings.paper,
        factors=settings.method.bound_teachers(plain_setup())(moment, len(TEACHERS)),
        moment=moment,
        model=model,
    )


def log_softmax(values: Sequence[float], temperature: float = 1.0) -> Vector:
    """In nats, of values / temperature."""
    scaled = [value / temperature for value in values]
    total = math.log(sum(math.exp(value) for value in scaled))
    return [value - total for value in scaled]


def softmax(values: Sequence[float], temperature: float = 1.0) -> Vector:
    """Of values / temperature."""
    return [math.exp(value) for value in log_softmax(values, temperature)]


def entropy(values: Sequence[float]) -> float:
    """Of softmax(values), in nats."""
    return -sum(p * math.log(p) for p in softmax(values))


def mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return sum(values) / max(len(values), 1)


def average(vectors: Sequence[Vector]) -> Vector:
    """By dimension."""
    return [mean(column) for column in zip(*vectors, strict=True)]


def cosine(a: Vector, b: Vector) -> float:
    """Of the angle between two vectors."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def squared_error(a: Vector, b: Vector) -> float:
    """The mean over the dimensions."""
    return mean([(x - y) ** 2 for x, y in zip(a, b, strict=True)])


def huber(a: float, b: float) -> float:
    """Huber loss with threshold 1."""
    return 0.5 * (a - b) ** 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def times(matrix: Sequence[Vector], vector: Vector) -> Vector:
    """A matrix times a vector."""
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]
