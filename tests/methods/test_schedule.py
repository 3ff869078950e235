"""Schedules, choices of teachers and layer maps: pure functions of step and epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kdcache.distill.objective import ObjectiveSettings, objective_settings
from kdcache.errors import RecipeError
from kdcache.methods.base import Method, Moment
from kdcache.methods.parts.hidden_states import HiddenRelations, HiddenStates
from kdcache.methods.parts.layer_map import EVEN, LAST, RANDOM, TeacherLayers
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.relations import cosine_relation
from kdcache.methods.parts.schedule import Annealed, SampledTeacher, Stages
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.recipe import DistillSection
from kdcache.testing.steps import loop_model, step_batch, step_loss

METHOD = Method("of-the-test", "", "", (TaskLoss(), SoftLabels(), HiddenStates()))


def terms_at(method: Method, step: int) -> tuple[float, dict[str, float]]:
    loss, terms, _ = step_loss(loop_model(ObjectiveSettings(method)), step_batch(), moment=Moment(step, 10))
    return loss, terms


def test_hidden_states_first_then_soft_labels() -> None:
    stages = Stages(((0.5, ("hidden",)), (1.0, ("task", "soft"))))
    loss, terms = terms_at(replace(METHOD, schedule=stages), 4)
    assert "soft" not in terms
    assert loss == pytest.approx(0.1 * terms["hidden"])
    loss, terms = terms_at(replace(METHOD, schedule=stages), 5)
    assert "hidden" not in terms
    assert loss == pytest.approx(terms["task"] + terms["soft"])


@pytest.mark.parametrize("ends", [(0.5,), (0.6, 0.5, 1.0), (0.0, 1.0)])
def test_stages_must_cover_the_training(ends: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending shares of the training up to 1"):
        Stages(tuple((end, ("task",)) for end in ends))


def test_weights_change_linearly() -> None:
    annealed = replace(METHOD, schedule=Annealed({"soft": (1.0, 0.0), "task": (0.0, 1.0)}))
    for step in (0, 5, 9):
        loss, terms = terms_at(annealed, step)
        soft = (1 - step / 10) * terms.get("soft", 0.0)
        assert loss == pytest.approx(step / 10 * terms["task"] + soft + 0.1 * terms["hidden"])


def test_one_teacher_is_drawn_per_step_by_its_probability() -> None:
    choose = SampledTeacher((3.0, 1.0, 0.0))
    drawn = [choose(Moment(step, seed=7), 3).index(1.0) for step in range(400)]
    assert drawn == [
        choose(Moment(step, 999, epoch=5, seed=7), 3).index(1.0) for step in range(400)
    ]  # by seed and step alone
    assert 0.68 < drawn.count(0) / 400 < 0.82
    assert drawn.count(2) == 0
    assert drawn != [choose(Moment(step, seed=8), 3).index(1.0) for step in range(400)]
    with pytest.raises(ValueError, match="3 probabilities were given for 2 teachers"):
        choose(Moment(), 2)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_drawn_teacher_is_the_only_one_that_teaches(mixed: bool) -> None:
    soft = SoftLabels(mixing=mean_probability) if mixed else SoftLabels()
    sampled = replace(METHOD, terms=(soft, HiddenStates()), teachers=SampledTeacher((0.0, 1.0)))
    _, terms = terms_at(sampled, 3)
    assert (terms["weight/a"], terms["weight/b"]) == (0.0, pytest.approx(1.0))
    assert {name for name in terms if name.startswith("hidden/")} == {"hidden/b/1", "hidden/b/2"}
    assert terms["hidden"] == pytest.approx((terms["hidden/b/1"] + terms["hidden/b/2"]) / 2)
    _, everyone = terms_at(METHOD, 3)
    if not mixed:
        assert terms["soft"] == pytest.approx(everyone["soft/b"])


TEACHER_LAYERS = {"a": TeacherLayers(12, (2, 4, 6, 8, 10, 12)), "b": TeacherLayers(4, (2, 4))}


def test_layer_maps() -> None:
    assert EVEN.layers(TEACHER_LAYERS, 3) == {"a": (4, 8, 12), "b": (1, 3, 4)}
    assert LAST.layers(TEACHER_LAYERS, 3) == {"a": (None, None, 12), "b": (None, None, 4)}
    assert RANDOM.layers(TEACHER_LAYERS, 3)["b"] == (2, 2, 4)


def test_random_layers_are_stored_ones_in_order_by_seed_and_epoch() -> None:
    epochs = [RANDOM.layers(TEACHER_LAYERS, 3, seed=1, epoch=epoch)["a"] for epoch in range(30)]
    assert all(layers == tuple(sorted(set(layers))) and set(layers) <= {2, 4, 6, 8, 10, 12} for layers in epochs)
    assert len(set(epochs)) > 5
    assert epochs[7] == RANDOM.layers(TEACHER_LAYERS, 3, seed=1, epoch=7)["a"]
    assert epochs != [RANDOM.layers(TEACHER_LAYERS, 3, seed=2, epoch=epoch)["a"] for epoch in range(30)]


def test_what_a_method_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    relations = Method("pairs", "", "", (TaskLoss(), HiddenRelations(((1.0, cosine_relation),))), layer_map=LAST)
    monkeypatch.setattr("kdcache.distill.objective.find_method", lambda _name: relations)
    assert objective_settings(DistillSection(layer_map="last")).layer_map is LAST
    with pytest.raises(
        RecipeError, match=r"'hidden' of method 'pairs' compares the rows.*distill\.accumulation = 2"
    ) as caught:
        objective_settings(DistillSection(accumulation=2))
    assert "accumulation = 1" in caught.value.hint
    with pytest.raises(RecipeError, match=r"distill\.layer_map is 'even', but method 'pairs' has its own: last"):
        objective_settings(DistillSection(layer_map="even"))
    with pytest.raises(ValueError, match="one vector per row"):
        HiddenRelations(((1.0, cosine_relation),), "tokens")
