"""SKDBERT with equal probabilities against its formula in a loop."""

from __future__ import annotations

from kdcache.methods.base import Moment
from kdcache.methods.registry import find_method
from kdcache.testing.method_contract import GoldenMethod, PlainStep, plain_setup
from kdcache.testing.steps import ROWS


class TestSkdbert(GoldenMethod):
    method = "skdbert"

    def expected(self, step: PlainStep) -> dict[str, float]:
        assert sorted(step.factors) == [0.0, 1.0]
        return {"task": step.task, "soft": step.sum_of_soft([step.factors] * ROWS)}


def test_each_teacher_is_drawn_equally_often() -> None:
    choose = find_method("skdbert").bound_teachers(plain_setup())
    drawn = [choose(Moment(step, 600), 3).index(1.0) for step in range(600)]
    assert all(abs(drawn.count(index) / 600 - 1 / 3) < 0.06 for index in range(3))
