"""What the objective gives a term: the batch, the student's outputs, and the weights of the teachers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.distill.objective import ObjectiveSettings
from kdcache.loading.targets import Batch
from kdcache.methods.base import Method, Moment, Needs, Setup, View
from kdcache.testing.steps import loop_model, step_batch, step_loss

if TYPE_CHECKING:
    from kdcache.methods.base import Term


class Seen:
    """A term that keeps what it was given; its loss is 0."""

    name, weight, scope = "seen", "task", "row"

    def __init__(self, weighted: bool) -> None:
        self.weighted, self.needs, self.owned = weighted, Needs(), dict[str, object]()
        self.views: list[View] = []

    def bind(self, _setup: Setup, /) -> Seen:
        return self

    def count(self, _batch: Batch, /) -> dict[tuple[int, int], int]:
        return {}

    def __call__(self, view: View, _log: dict[str, Tensor], /) -> Tensor:
        self.views.append(view)
        return view.student_logits.sum() * 0


def seen(batch: Batch, weighted: bool, **slots: Any) -> tuple[View, dict[str, float], Tensor]:
    """The input of a term, the log, and the student's logits."""
    term = Seen(weighted)
    model = loop_model(ObjectiveSettings(Method("of-the-test", "", "", (cast("Term", term),), **slots)))
    _, log, _ = step_loss(model, batch, moment=Moment(3, 10, seed=2))
    return term.views[0], log, model.student(batch.inputs).logits


def test_a_term_is_given_the_batch_as_it_is() -> None:
    batch = step_batch()
    assert batch.targets is not None
    view, log, logits = seen(batch, weighted=False)
    assert torch.equal(view.student_logits, logits)
    assert torch.equal(view.attention_mask, batch.inputs["attention_mask"])
    assert torch.equal(view.labels, batch.labels)
    assert np.array_equal(view.text_ids, batch.text_ids)
    assert torch.equal(view.teacher_logits, batch.targets.logits)
    assert view.hidden_targets.keys() == batch.targets.hidden.keys()
    assert torch.equal(view.weights, torch.ones(2, 6, dtype=torch.float64))
    assert (view.factors, view.counts.rows, view.moment) == ((1.0, 1.0), 6, Moment(3, 10, seed=2))
    assert not [name for name in log if name.startswith("weight/")]


@pytest.mark.parametrize("weighted", [False, True])
def test_without_targets_a_term_sees_empty_ones_and_equal_weights(weighted: bool) -> None:
    view, _, _ = seen(replace(step_batch(), targets=None), weighted)
    assert view.teacher_logits.shape == (2, 6, 0)
    assert view.hidden_targets == {}
    assert torch.equal(view.weights, torch.ones(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("factors", [(1.0, 1.0), (2.0, 2.0), (0.1, 0.7), (1.0, 0.0)])
def test_weights_are_those_of_the_row_times_the_factor_of_the_teacher(factors: tuple[float, float]) -> None:
    """A weighting sees both sides' logits and the labels, and the weights keep the precision of the logits."""

    def weighting(student: Tensor, teachers: Tensor, labels: Tensor, /) -> Tensor:
        return (student.square().sum(dim=-1) + labels) * teachers.sum(dim=-1)

    batch = step_batch()
    assert batch.targets is not None
    view, log, logits = seen(batch, weighted=True, weighting=weighting, teachers=lambda _moment, _count: factors)
    assert view.factors == factors
    for teacher, factor in enumerate(factors):
        for row in range(6):
            plain = (sum(z**2 for z in logits[row].tolist()) + int(batch.labels[row])) * sum(
                batch.targets.logits[teacher, row].tolist()
            )
            assert view.weights[teacher, row].item() == pytest.approx(plain * factor, rel=1e-13)
        assert log[f"weight/{'ab'[teacher]}"] == pytest.approx(view.weights[teacher].mean().item(), rel=1e-12)


def test_a_weighting_must_weigh_every_teacher() -> None:
    with pytest.raises(ValueError, match="zip"):
        seen(step_batch(), weighted=True, weighting=lambda _student, teachers, _labels: teachers[:1].sum(dim=-1))
