"""SKDBERT by the rank of their students against its formula in a loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.distill.setup import prepare
from kdcache.errors import RecipeError
from kdcache.methods.base import Moment
from kdcache.methods.registry import find_method
from kdcache.progress import SilentProgress
from kdcache.testing.method_contract import GoldenMethod, PlainStep, plain_setup
from kdcache.testing.steps import ROWS
from tests.conftest import TinyRun


class TestSkdbertStudent(GoldenMethod):
    method = "skdbert-student"

    def expected(self, step: PlainStep) -> dict[str, float]:
        assert sorted(step.factors) == [0.0, 1.0]
        return {"task": step.task, "soft": step.sum_of_soft([step.factors] * ROWS)}


def test_the_teacher_of_the_better_student_is_drawn_twice_as_often() -> None:
    choose = find_method("skdbert-student").bound_teachers(plain_setup())
    drawn = [choose(Moment(step, 600), 2) for step in range(600)]
    assert abs(drawn.count((1.0, 0.0)) / 600 - 2 / 3) < 0.06


def test_without_scores_of_the_students_it_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.method=skdbert-student", "distill.student_scores={bert=0.8}")
    training = prepare(recipe, tiny_run.cache, tmp_path, None, progress=SilentProgress())
    with pytest.raises(RecipeError, match="student_scores has no score for teacher 'roberta'"):
        training.model()
