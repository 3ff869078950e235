"""SKDBERT by the rank of the teachers against its formula in a loop."""

from __future__ import annotations

from kdcache.methods.base import Moment
from kdcache.methods.registry import find_method
from kdcache.testing.method_contract import GoldenMethod, PlainStep, plain_setup
from kdcache.testing.steps import ROWS


class TestSkdbertTeacher(GoldenMethod):
    method = "skdbert-teacher"

    def expected(self, step: PlainStep) -> dict[str, float]:
        assert sorted(step.factors) == [0.0, 1.0]
        return {"task": step.task, "soft": step.sum_of_soft([step.factors] * ROWS)}


def test_the_better_teacher_is_drawn_twice_as_often() -> None:
    choose = find_method("skdbert-teacher").bound_teachers(plain_setup())
    drawn = [choose(Moment(step, 600), 2) for step in range(600)]
    assert abs(drawn.count((0.0, 1.0)) / 600 - 2 / 3) < 0.06
