"""The contract of a term, as a test class that every implementation inherits.

class TestMine(TermContract):
    @pytest.fixture
    def term(self) -> Term: ...
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from kdcache.distill.objective import ObjectiveSettings
from kdcache.methods.base import Method
from kdcache.testing.steps import LABELS, ROWS, TEACHERS, loop_model, step_batch, step_loss

if TYPE_CHECKING:
    from kdcache.loading.targets import Targets
    from kdcache.methods.base import Term


class TermContract:
    """Inherit and give the fixture ``term``. Each test computes the loss with the module that is trained."""

    @pytest.fixture
    def settings(self, term: Term) -> ObjectiveSettings:
        return ObjectiveSettings(Method("of-the-test", "", "", terms=(term,)), temperature=2.0, hidden=1.0)

    def test_it_is_a_number_with_a_gradient_for_all_that_it_trains(
        self, term: Term, settings: ObjectiveSettings
    ) -> None:
        model = loop_model(settings)
        loss, terms, gradients = step_loss(model, step_batch())
        assert math.isfinite(loss)
        assert loss == pytest.approx(terms[term.name])
        assert any(name.startswith("student.") for name in gradients)
        owned = [name for name, _ in model.named_parameters() if not name.startswith("student.")]
        assert all(name.split(".")[0] in model.owned for name in owned)
        assert all(bool(gradients[name].isfinite().all()) and bool(gradients[name].any()) for name in owned)

    def test_what_it_logs_is_under_its_name(self, term: Term, settings: ObjectiveSettings) -> None:
        _, terms, _ = step_loss(loop_model(settings), step_batch())
        weights = {f"weight/{name}" for name in TEACHERS}
        assert {name for name in terms if not name.startswith(f"{term.name}/")} - weights == {term.name}
        assert term.weighted == (weights <= set(terms))

    def test_it_says_what_it_needs(self, term: Term, settings: ObjectiveSettings) -> None:
        whole, batch = step_loss(loop_model(settings), step_batch())[:2], step_batch()
        assert batch.targets is not None
        targets = batch.targets
        if not term.needs.logits:
            targets = replace(targets, logits=targets.logits[:, :, :0])
        if not term.needs.hidden:
            targets = replace(targets, hidden={})
        labels = batch.labels if term.needs.labels else torch.full_like(batch.labels, -1)
        spared = replace(batch, targets=targets if term.needs.teachers else None, labels=labels)
        assert step_loss(loop_model(settings), spared)[:2] == whole

    def test_micro_batches_add_up_unless_it_needs_the_whole_batch(
        self, term: Term, settings: ObjectiveSettings
    ) -> None:
        model, batch = loop_model(settings), step_batch()
        loss, _, gradients = step_loss(model, batch)
        for pieces in (2, 4, ROWS) if term.scope == "row" else ():
            summed, _, parts = step_loss(model, batch, pieces)
            assert summed == pytest.approx(loss, rel=1e-6)
            assert all(torch.allclose(parts[name], gradients[name], atol=1e-6) for name in gradients)

    @pytest.mark.parametrize("what", ["no labels", "nothing covered", "one row"])
    def test_it_is_finite_on_any_batch(self, settings: ObjectiveSettings, what: str) -> None:
        batch = step_batch()
        assert batch.targets is not None
        batches = {
            "no labels": replace(batch, labels=torch.full((len(LABELS),), -1)),
            "nothing covered": replace(batch, targets=_without_covered(batch.targets)),
            "one row": batch.split(ROWS)[1],
        }
        batch = batches[what]
        loss, _, gradients = step_loss(loop_model(settings), batch)
        assert math.isfinite(loss)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())

    def test_a_teacher_that_sits_out_changes_nothing(self, term: Term, settings: ObjectiveSettings) -> None:
        alone = replace(settings, method=replace(settings.method, teachers=lambda _moment, _count: (1.0, 0.0)))
        batch = step_batch()
        assert batch.targets is not None
        loss, _, _ = step_loss(loop_model(alone), batch)
        assert step_loss(loop_model(alone), replace(batch, targets=_changed(batch.targets, 1)))[0] == pytest.approx(
            loss
        )
        if term.needs.teachers:
            assert step_loss(loop_model(alone), replace(batch, targets=_changed(batch.targets, 0)))[0] != pytest.approx(
                loss
            )


def _without_covered(targets: Targets) -> Targets:
    nothing = torch.empty(0, dtype=torch.int64)
    hidden = {
        pair: replace(found, values=found.values[:0], positions=nothing) for pair, found in targets.hidden.items()
    }
    return replace(targets, hidden=hidden)


def _changed(targets: Targets, teacher: int) -> Targets:
    """The batch with another teacher instead of ``teacher``."""
    logits = targets.logits.clone()
    logits[teacher] = logits[teacher].flip(-1)
    hidden = {
        pair: replace(found, values=found.values.flip(0) if pair[0] == teacher else found.values)
        for pair, found in targets.hidden.items()
    }
    return replace(targets, logits=logits, hidden=hidden)
