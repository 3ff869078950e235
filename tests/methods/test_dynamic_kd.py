"""Dynamic KD against its formula for two teachers in a loop."""

from __future__ import annotations

import math

from kdcache.testing.method_contract import GoldenMethod, PlainStep, entropy
from kdcache.testing.steps import CLASSES, ROWS


class TestDynamicKd(GoldenMethod):
    method = "dynamic-kd"

    def expected(self, step: PlainStep) -> dict[str, float]:
        uncertainty = [entropy(step.student[row]) / math.log(CLASSES) for row in range(ROWS)]
        weaker_and_better = [[u, 1 - u] for u in uncertainty]  # b has the better score
        return {"task": step.task, "soft": step.sum_of_soft(weaker_and_better)}
