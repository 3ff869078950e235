"""Annealing-KD's two phases against their formulas in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep, average, mean, squared_error
from kdcache.testing.steps import ROWS

RISES = {0: 0.1, 6: 1.0}  # step of 10 -> factor: ten values over the first 6.67 steps, 0.1 to 1.0


class TestAnnealingKd(GoldenMethod):
    method = "annealing-kd"

    def expected(self, step: PlainStep) -> dict[str, float]:
        if step.moment.step == 9:
            return {"task": step.task}
        factor, errors = RISES[step.moment.step], []
        for row in range(ROWS):
            target = average([logits[row] for logits in step.teachers])
            errors.append(squared_error(step.student[row], [factor * value for value in target]))
        return {"soft": mean(errors)}  # T² is not used
