"""RKD through the trained module against the paper's equations in a loop."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from kdcache.distill.objective import objective_settings
from kdcache.errors import RecipeError
from kdcache.methods.base import Pair
from kdcache.methods.parts.layer_map import TeacherLayers
from kdcache.methods.rkd import METHOD
from kdcache.recipe import DistillSection, WeightsSection
from kdcache.testing.steps import COVERED, LABELS, ROWS, TEACHERS, loop_model, step_batch, step_loss

LAST_PAIRS: dict[Pair, int] = {(0, 2): 4, (1, 2): 3}  # widths may differ from the student's and from each other
Vector = list[float]


def mean(rows: list[Vector]) -> Vector:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def distances(rows: list[Vector]) -> dict[tuple[int, int], float]:
    """Of every ordered pair, divided by their mean."""
    found = {(i, j): math.dist(rows[i], rows[j]) for i, j in itertools.permutations(range(len(rows)), 2)}
    mu = sum(found.values()) / len(found)
    return {pair: value / mu for pair, value in found.items()}


def angles(rows: list[Vector]) -> dict[tuple[int, int, int], float]:
    """Cosine of the angle at j, of every ordered triple of different rows."""

    def direction(i: int, j: int) -> Vector:
        return [(a - b) / math.dist(rows[i], rows[j]) for a, b in zip(rows[i], rows[j], strict=True)]

    triples = itertools.permutations(range(len(rows)), 3)
    return {(i, j, k): sum(a * b for a, b in zip(direction(i, j), direction(k, j), strict=True)) for i, j, k in triples}


@pytest.mark.parametrize("paper", [True, False])
def test_the_loss_is_that_of_the_paper(paper: bool) -> None:
    section = DistillSection(method="rkd", paper=paper, weights=WeightsSection(hidden=0.04))
    model, batch = loop_model(objective_settings(section), LAST_PAIRS), step_batch(LAST_PAIRS)
    assert batch.targets is not None
    output = model.student(batch.inputs, hidden_states=True)
    logits = output.logits.log_softmax(dim=-1).tolist()
    labelled = [row for row in range(ROWS) if LABELS[row] >= 0]
    task = -sum(logits[row][LABELS[row]] for row in labelled) / len(labelled)

    d_losses, a_losses = [], []
    for teacher in range(len(TEACHERS)):
        covered, told = COVERED[teacher], iter(batch.targets.hidden[teacher, 2].values.tolist())
        theirs = [mean([next(told) for _ in tokens]) for tokens in covered if tokens]
        states = output.hidden_states[2].tolist()
        mine = [mean([states[row][token] for token in tokens]) for row, tokens in enumerate(covered) if tokens]
        for function, losses in ((distances, d_losses), (angles, a_losses)):
            ours, expected = function(mine), function(theirs)
            losses.append(sum(huber(ours[key], expected[key]) for key in expected) / len(expected))
    summed = sum(25 * d + 50 * a for d, a in zip(d_losses, a_losses, strict=True))

    loss, terms, gradients = step_loss(model, batch)
    hidden = summed if paper else summed / len(TEACHERS)
    assert terms["task"] == pytest.approx(task, rel=1e-12)
    assert terms["hidden"] == pytest.approx(hidden, rel=1e-6)  # targets are float32
    metric_learning = task + (sum(d_losses) + 2 * sum(a_losses)) / len(TEACHERS)
    assert loss == pytest.approx(task + hidden if paper else metric_learning, rel=1e-6)
    assert not model.owned
    assert bool(gradients["student.first"].any())


def test_a_student_with_the_teachers_relations_has_no_loss_however_it_is_turned_and_scaled() -> None:
    batch, pairs = step_batch(), {(0, 2): 4}
    model = loop_model(objective_settings(DistillSection(method="rkd")), pairs)
    assert batch.targets is not None
    target = batch.targets.hidden[0, 2]
    states = model.student(batch.inputs, hidden_states=True).hidden_states[2].flatten(0, 1)[target.positions].detach()
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    values = (3.0 * states @ turn + 5.0).float()
    told = replace(batch.targets, hidden={(0, 2): replace(target, values=values)})
    _, terms, _ = step_loss(model, replace(batch, targets=told))
    assert terms["hidden"] == pytest.approx(0.0, abs=1e-8)


def test_the_last_layers_are_compared_and_micro_batches_are_refused() -> None:
    assert METHOD.layer_map is not None
    assert METHOD.layer_map.layers({"bert": TeacherLayers(12, ())}, 3) == {"bert": (None, None, 12)}
    with pytest.raises(RecipeError, match="method 'rkd' compares the rows of a batch") as caught:
        objective_settings(DistillSection(method="rkd", accumulation=2))
    assert "distill.accumulation = 1" in caught.value.hint
