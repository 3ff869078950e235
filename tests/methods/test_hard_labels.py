"""Hard pseudo-labels against their formula in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep, log_softmax, mean, softmax
from kdcache.testing.steps import CLASSES, ROWS


class TestHardLabels(GoldenMethod):
    method = "hard-labels"

    def expected(self, step: PlainStep) -> dict[str, float]:
        errors = []
        for row in range(ROWS):
            votes = [max(range(CLASSES), key=lambda c, one=one, row=row: one[row][c]) for one in step.teachers]
            p = softmax(step.mean_probability(row), step.temperature)
            label = max(range(CLASSES), key=lambda c, votes=votes, p=p: (votes.count(c), p[c]))
            errors.append(-log_softmax(step.student[row])[label])
        return {"task": step.task, "soft": mean(errors)}  # T² is not used
