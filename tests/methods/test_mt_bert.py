"""MT-BERT against its formula in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep, mean, squared_error
from kdcache.testing.steps import ROWS, VARIANCES


class TestMtBert(GoldenMethod):
    method = "mt-bert"

    def expected(self, step: PlainStep) -> dict[str, float]:
        weights = [[1 / (1 + error) for error in step.errors(row)] for row in range(ROWS)]
        hidden = {
            pair: mean(
                [squared_error(*step.projected(pair, *both)) for row in step.vectors(pair).values() for both in row]
            )
            / (1.0 if step.paper else VARIANCES[pair])
            for pair in step.targets
        }
        return {"task": step.task, "soft": step.sum_of_soft(weights), "hidden": step.per_layer(hidden)}
