"""DistilBERT against its formula in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep, cosine, mean
from kdcache.testing.steps import ROWS


class TestDistilBert(GoldenMethod):
    method = "distilbert"

    def expected(self, step: PlainStep) -> dict[str, float]:
        hidden = {
            pair: mean(
                [1 - cosine(*step.projected(pair, *both)) for row in step.vectors(pair).values() for both in row]
            )
            for pair in step.targets
        }
        assert set(hidden) == {(0, 2), (1, 2)}
        soft = step.soft_of([step.mean_probability(row) for row in range(ROWS)])
        return {"task": step.task, "soft": soft, "hidden": step.per_layer(hidden)}
