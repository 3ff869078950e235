"""Decoupled KD against its formula in a loop."""

from __future__ import annotations

import math

from kdcache.testing.method_contract import GoldenMethod, PlainStep, softmax
from kdcache.testing.steps import CLASSES, ROWS


class TestDkd(GoldenMethod):
    method = "dkd"

    def expected(self, step: PlainStep) -> dict[str, float]:
        soft = 0.0
        for row in range(ROWS):
            p = softmax(step.mean_probability(row), step.temperature)
            q = softmax(step.student[row], step.temperature)
            label = step.labels[row] if step.labels[row] >= 0 else p.index(max(p))
            a, b = p[label], q[label]
            target = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
            others = [(p[c] / (1 - a), q[c] / (1 - b)) for c in range(CLASSES) if c != label]
            soft += step.factor * (target + 8 * sum(x * math.log(x / y) for x, y in others)) / ROWS
        return {"task": step.task, "soft": soft}
