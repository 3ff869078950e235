"""Hidden losses of every feature, distance and direction, through the trained module, against loops over texts and
tokens.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kdcache.distill.objective import DistillationModel, ObjectiveSettings
from kdcache.errors import RecipeError
from kdcache.loading.targets import Batch, Hidden
from kdcache.methods.base import Direction, Feature, Method, Pair
from kdcache.methods.parts.features import select_vectors
from kdcache.methods.parts.hidden_states import (
    COSINE,
    MEAN_SQUARE,
    SQUARED,
    Distance,
    HiddenRelations,
    HiddenStates,
)
from kdcache.methods.parts.relations import cosine_relation
from kdcache.testing.steps import (
    COVERED,
    LENGTH,
    MASK,
    PAIRS,
    ROWS,
    TEACHERS,
    VARIANCES,
    loop_model,
    step_batch,
    step_loss,
)

Vector = list[float]
NARROW: dict[Pair, int] = {(0, 1): 4, (0, 2): 4, (1, 1): 3, (1, 2): 3}


def settings_of(term: HiddenStates | HiddenRelations, paper: bool = False) -> ObjectiveSettings:
    direction: Direction = "teacher-to-student" if paper else "student-to-teacher"
    return ObjectiveSettings(Method("of-the-test", "", "", (term,)), hidden=1.0, direction=direction, paper=paper)


def vectors(states: torch.Tensor, target: Hidden, teacher: int, feature: Feature) -> list[tuple[Vector, Vector]]:
    """(student, teacher) of everything that has a target, token by token."""
    told = dict(
        zip(
            ((row, token) for row in range(ROWS) for token in COVERED[teacher][row]),
            target.values.tolist(),
            strict=True,
        )
    )
    found: list[tuple[Vector, Vector]] = []
    for row in range(ROWS):
        tokens = [token for token in range(LENGTH) if (row, token) in told]
        if feature == "first":
            tokens = [token for token in tokens if token == MASK[row].index(1)]
        pairs = [(states[row, token].tolist(), told[row, token]) for token in tokens]
        if feature == "mean" and pairs:
            pairs = [(mean([mine for mine, _ in pairs]), mean([theirs for _, theirs in pairs]))]
        found += pairs
    return found


def mean(rows: list[Vector]) -> Vector:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def scaled(vector: Vector) -> Vector:
    length = math.sqrt(sum(value**2 for value in vector))
    return [value / length for value in vector]


def times(matrix: torch.Tensor, vector: Vector) -> Vector:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix.tolist()]


def distance(mine: Vector, theirs: Vector, kind: Distance) -> float:
    if kind is COSINE:
        return 1 - sum(a * b for a, b in zip(scaled(mine), scaled(theirs), strict=True))
    squares = [(a - b) ** 2 for a, b in zip(mine, theirs, strict=True)]
    return sum(squares) / (len(squares) if kind is MEAN_SQUARE else 1)


def projected(
    model: DistillationModel, pair: Pair, mine: Vector, theirs: Vector, direction: Direction
) -> tuple[Vector, Vector]:
    teacher, layer = pair
    matrices = model.projections.matrices if direction != "none" else {}
    if direction == "student-to-teacher":
        first = 0 if teacher == 0 else NARROW[0, layer]
        return times(matrices[f"layer{layer}"][first : first + NARROW[pair]], mine), theirs
    if direction == "teacher-to-student":
        return mine, times(matrices[f"layer{layer}-teacher{teacher}"], theirs)
    if direction == "both":
        name = f"layer{layer}-teacher{teacher}"
        return times(matrices[f"{name}-student"], mine), times(matrices[f"{name}-teacher"], theirs)
    return mine, theirs


@pytest.mark.parametrize("direction", ["student-to-teacher", "teacher-to-student", "both", "none"])
@pytest.mark.parametrize("kind", [MEAN_SQUARE, SQUARED, COSINE], ids=["mse", "squared", "cosine"])
@pytest.mark.parametrize(
    ("feature", "normalised"), [("stored", False), ("tokens", True), ("first", False), ("first", True), ("mean", True)]
)
@pytest.mark.parametrize("paper", [False, True])
def test_the_loss_is_that_of_a_loop(
    feature: Feature, normalised: bool, kind: Distance, direction: Direction, paper: bool
) -> None:
    dims = PAIRS if direction == "none" else NARROW
    model = loop_model(settings_of(HiddenStates(feature, normalised, kind, direction, direction), paper), dims)
    batch, losses = step_batch(dims), {}
    assert batch.targets is not None
    states = model.student(batch.inputs, hidden_states=True).hidden_states
    for pair, target in batch.targets.hidden.items():
        errors = []
        for mine, theirs in vectors(states[pair[1]], target, pair[0], feature):
            sides = (scaled(mine), scaled(theirs)) if normalised else (mine, theirs)
            errors.append(distance(*projected(model, pair, *sides, direction), kind))
        losses[pair] = sum(errors) / len(errors)
        if not (paper or normalised or kind is COSINE):
            losses[pair] /= VARIANCES[pair]
    expected = sum(losses.values()) / (1 if paper else len(losses))
    loss, terms, _ = step_loss(model, batch)
    assert loss == pytest.approx(expected, rel=1e-6)  # targets are float32
    assert all(terms[f"hidden/{TEACHERS[i]}/{j}"] == pytest.approx(value, rel=1e-6) for (i, j), value in losses.items())


def test_a_loss_that_is_free_of_scale_starts_with_random_projections() -> None:
    from kdcache.methods.losses import HiddenProjections

    assert not any(matrix.any() for matrix in HiddenProjections(NARROW, 4, "student-to-teacher").parameters())
    assert all(
        matrix.all() for matrix in HiddenProjections(NARROW, 4, "student-to-teacher", scale_free=True).parameters()
    )


def test_unequal_widths_without_a_projection_are_refused() -> None:
    with pytest.raises(
        RecipeError, match="targets of teacher 'b' for student layer 1 have 3 dimensions, the student has 4"
    ) as caught:
        loop_model(settings_of(HiddenStates(direction="none")), NARROW)
    assert "distill.hidden_direction" in caught.value.hint


def test_cosines_among_rows_are_those_of_a_loop() -> None:
    model, batch, expected = loop_model(settings_of(HiddenRelations(((1.0, cosine_relation),)))), step_batch(), 0.0
    assert batch.targets is not None
    states = model.student(batch.inputs, hidden_states=True).hidden_states
    for (teacher, layer), target in batch.targets.hidden.items():
        rows = [(scaled(mine), scaled(theirs)) for mine, theirs in vectors(states[layer], target, teacher, "mean")]
        errors = [
            (sum(a * b for a, b in zip(p[0], q[0], strict=True)) - sum(a * b for a, b in zip(p[1], q[1], strict=True)))
            ** 2
            for p, q in itertools.permutations(rows, 2)
        ]
        expected += sum(errors) / len(errors) / len(PAIRS)
    assert step_loss(model, batch)[0] == pytest.approx(expected, rel=1e-6)


def test_rows_that_are_equal_have_no_gradient_without_bound() -> None:
    from kdcache.methods.losses import angle_relation, distance_relation

    student = torch.ones(4, 3, requires_grad=True)
    for relation in (distance_relation, angle_relation):
        relation(student, torch.randn(4, 2), torch.ones(4)).backward()
    assert student.grad is not None
    assert bool(student.grad.abs().max() < 10)


def per_text(batch: Batch, values: torch.Tensor, tokens: str) -> Hidden:
    mask = batch.inputs["attention_mask"]
    if tokens == "first":
        return Hidden(values, None, None, None, None, torch.arange(ROWS) * LENGTH + mask.argmax(dim=1))
    positions = torch.nonzero(mask.flatten()).flatten()
    return Hidden(values, None, None, None, None, positions, bags=torch.cumsum(mask.sum(1), 0) - mask.sum(1))


@pytest.mark.parametrize(("tokens", "feature"), [("first", "first"), ("pooled", "mean")])
def test_targets_that_are_stored_per_text_are_taken_as_they_are(tokens: str, feature: Feature) -> None:
    batch, values = step_batch(), torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(2))
    mask, states = batch.inputs["attention_mask"], torch.randn(ROWS, LENGTH, 4, dtype=torch.float64)
    target = per_text(batch, values, tokens)
    found, stored = (select_vectors(target, states, mask, kind) for kind in (feature, "stored"))
    assert torch.equal(found.teacher, values)
    assert torch.equal(stored.teacher, values)
    assert torch.allclose(found.student.float(), stored.student.float(), atol=1e-6)
    assert found.valid is None or bool(found.valid.all())
    row = 2  # padded on the left
    expected = states[row, 2] if tokens == "first" else states[row, 2:].mean(dim=0)
    assert torch.allclose(found.student[row].double(), expected, atol=1e-6)
