"""PKD through the trained module against the paper's equations in a loop."""

from __future__ import annotations

import math

import pytest

from kdcache.distill.objective import objective_settings
from kdcache.errors import RecipeError
from kdcache.methods.base import Pair
from kdcache.methods.parts.layer_map import TeacherLayers
from kdcache.methods.pkd import METHOD
from kdcache.recipe import DistillSection
from kdcache.testing.steps import CLASSES, COVERED, LABELS, MASK, ROWS, TEACHERS, loop_model, step_batch, step_loss

SKIP: dict[Pair, int] = {(0, 1): 4, (1, 1): 4}  # of two student layers, the first has a partner
T = 3.0


def scaled(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(value**2 for value in vector))
    return [value / length for value in vector]


def softmax(values: list[float], temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in values]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("paper", [True, False])
def test_the_loss_is_that_of_the_paper(paper: bool, pieces: int) -> None:
    model = loop_model(objective_settings(DistillSection(method="pkd", paper=paper, temperature=T)), SKIP)
    batch = step_batch(SKIP)
    assert batch.targets is not None
    output = model.student(batch.inputs, hidden_states=True)
    logits, told = output.logits.tolist(), batch.targets.logits.tolist()

    labelled = [row for row in range(ROWS) if LABELS[row] >= 0]
    task = -sum(math.log(softmax(logits[row])[LABELS[row]]) for row in labelled) / len(labelled)
    soft = 0.0
    for row in range(ROWS):
        each = [softmax(told[teacher][row], T) for teacher in range(len(TEACHERS))]
        p = [sum(one[place] for one in each) / len(each) for place in range(CLASSES)]
        q = softmax(logits[row], T)
        soft -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / ROWS

    patience = []
    for teacher in range(len(TEACHERS)):
        target = dict(zip(
            ((row, token) for row in range(ROWS) for token in COVERED[teacher][row]),
            batch.targets.hidden[teacher, 1].values.tolist(), strict=True,
        ))  # fmt: skip
        firsts = [(row, MASK[row].index(1)) for row in range(ROWS) if (row, MASK[row].index(1)) in target]
        assert 0 < len(firsts) < ROWS
        distances = []
        for row, token in firsts:
            mine = scaled(output.hidden_states[1][row, token].tolist())
            if not paper:  # W on the student's side
                matrix = model.projections.matrices["layer1"][4 * teacher : 4 * teacher + 4].tolist()
                mine = [sum(a * b for a, b in zip(line, mine, strict=True)) for line in matrix]
            theirs = scaled(target[row, token])
            distances.append(sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True)))
        patience.append(sum(distances) / len(distances))

    loss, terms, _ = step_loss(model, batch, pieces)
    hidden = sum(patience) / (1 if paper else len(patience))
    assert terms["task"] == pytest.approx(task, rel=1e-12)
    assert terms["soft"] == pytest.approx(soft, rel=1e-12)
    assert terms["hidden"] == pytest.approx(hidden, rel=1e-6)  # targets are float32
    assert loss == pytest.approx(task + soft + (1.0 if paper else 0.1) * hidden, rel=1e-6)
    assert ("projections" in model.owned) == (not paper)


def test_layers_are_those_of_pkd_skip() -> None:
    assert METHOD.layer_map is not None
    assert METHOD.layer_map.layers({"bert": TeacherLayers(12, ())}, 6) == {"bert": (2, 4, 6, 8, 10, None)}


def test_the_paper_has_no_projection_for_unequal_widths() -> None:
    with pytest.raises(RecipeError, match="have 3 dimensions, the student has 4, and no projection"):
        loop_model(objective_settings(DistillSection(method="pkd", paper=True)), {(0, 1): 3})
