"""Distillation from the mean of the probabilities against its formula in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep
from kdcache.testing.steps import ROWS


class TestKd(GoldenMethod):
    method = "kd"

    def expected(self, step: PlainStep) -> dict[str, float]:
        return {"task": step.task, "soft": step.soft_of([step.mean_probability(row) for row in range(ROWS)])}
