"""Methods are found by the names of their files; the recipe's choices become settings."""

from __future__ import annotations

import pytest

from kdcache.distill.objective import objective_settings
from kdcache.errors import RecipeError
from kdcache.methods.registry import _NOT_CACHED, all_methods, find_method, method_names
from kdcache.recipe import DistillSection, WeightsSection


def test_known_methods_are_found_by_name() -> None:
    assert [find_method(name).name for name in ("mt-bert", "kd", "fine-tune")] == ["mt-bert", "kd", "fine-tune"]
    assert tuple(method.name for method in all_methods()) == method_names()
    assert [method.name for method in all_methods() if not method.uses_teachers] == ["fine-tune"]
    assert all(method.title and method.source and method.note for method in all_methods())


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match=f"no distillation method 'mt_bert'; there are: {', '.join(method_names())}$"
    ) as caught:
        find_method("mt_bert")
    assert "'mt-bert'" in caught.value.hint
    assert caught.value.exit_code == 2
    with pytest.raises(RecipeError, match="no distillation method 'MT-BERT'; there are: ") as caught:
        find_method("MT-BERT")
    assert "'mt-bert'" in caught.value.hint


def test_paper_means_plain_sums_teacher_to_student_and_all_weights_one() -> None:
    section = DistillSection(paper=True, temperature=2.0, weights=WeightsSection(task=0.5, soft=0.2, hidden=0.0))
    settings = objective_settings(section)
    assert (settings.task, settings.soft, settings.hidden) == (1.0, 1.0, 1.0)
    assert settings.direction == "teacher-to-student"
    assert settings.paper
    assert not settings.t_squared
    assert settings.temperature == 2.0


def test_default_is_balanced_with_the_weights_of_the_recipe() -> None:
    settings = objective_settings(DistillSection())
    assert not settings.paper
    assert (settings.task, settings.soft, settings.hidden) == (1.0, 1.0, 0.1)
    assert settings.direction == "student-to-teacher"


@pytest.mark.parametrize(
    ("method", "weights", "logits", "hidden"),
    [
        ("mt-bert", {}, True, True),
        ("mt-bert", {"hidden": 0.0}, True, False),
        ("mt-bert", {"soft": 0.0}, False, True),
        ("kd", {}, True, False),
        ("fine-tune", {}, False, False),
    ],
)
def test_only_what_has_a_weight_is_read(method: str, weights: dict[str, float], logits: bool, hidden: bool) -> None:
    settings = objective_settings(DistillSection(method=method, weights=WeightsSection(**weights)))
    assert (settings.needs_logits, settings.needs_hidden) == (logits, hidden)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("theseus", "runs the student's blocks between the teacher's"),
        ("gkd", "texts that the student generates"),
        ("dml", "trained together with the student"),
        ("metadistil", "trains the teacher on the student's progress"),
        ("minilm", "attention"),
    ],
)
def test_what_cannot_be_cached_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"method '{name}' cannot learn from a cache: .*{reason}") as caught:
        find_method(name)
    assert caught.value.exit_code == 2
    assert "mt-bert" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["GKD", "MiniLM", "MiniLLM", "MobileBERT", "MetaDistil", "BERT-of-Theseus", "bert_of_theseus", "on_policy"]
)
def test_what_cannot_be_cached_is_refused_with_the_reason_in_any_spelling(name: str) -> None:
    with pytest.raises(RecipeError, match=f"method '{name}' cannot learn from a cache: "):
        find_method(name)


def test_no_method_is_refused_and_registered_at_once() -> None:
    assert not set(_NOT_CACHED) & set(method_names())
