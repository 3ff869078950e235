"""Weights by the teachers' entropies against their formula in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep, entropy
from kdcache.testing.steps import ROWS, TEACHERS


class TestEntropyKd(GoldenMethod):
    method = "entropy-kd"

    def expected(self, step: PlainStep) -> dict[str, float]:
        weights = []
        for row in range(ROWS):
            entropies = [entropy(logits[row]) for logits in step.teachers]
            weights.append([(1 - own / sum(entropies)) / (len(TEACHERS) - 1) for own in entropies])
        return {"task": step.task, "soft": step.sum_of_soft(weights)}
