"""Distillation from the mean of the logits against its formula in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep, average
from kdcache.testing.steps import ROWS


class TestKdLogits(GoldenMethod):
    method = "kd-logits"

    def expected(self, step: PlainStep) -> dict[str, float]:
        mean = [average([logits[row] for logits in step.teachers]) for row in range(ROWS)]
        return {"task": step.task, "soft": step.soft_of(mean)}
