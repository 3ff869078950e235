"""CA-MKD against its formula in a loop."""

from __future__ import annotations

import math

from kdcache.testing.method_contract import GoldenMethod, PlainStep, mean, squared_error
from kdcache.testing.steps import ROWS, TEACHERS, VARIANCES


class TestCaMkd(GoldenMethod):
    method = "ca-mkd"

    def expected(self, step: PlainStep) -> dict[str, float]:
        weights = []
        for row in range(ROWS):
            exponentials = [math.exp(error) for error in step.errors(row)]
            weights.append([(1 - value / sum(exponentials)) / (len(TEACHERS) - 1) for value in exponentials])
        hidden = {}
        for pair in step.targets:
            errors = [
                weights[row][pair[0]] * squared_error(*step.projected(pair, *both))
                for row, vectors in step.vectors(pair).items()
                for both in vectors
            ]
            hidden[pair] = mean(errors) / (1.0 if step.paper else VARIANCES[pair])
        assert set(hidden) == {(0, 2), (1, 2)}
        return {"task": step.task, "soft": step.sum_of_soft(weights), "hidden": step.per_layer(hidden)}
