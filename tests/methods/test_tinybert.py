"""TinyBERT's two stages against their formulas in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep, mean, squared_error
from kdcache.testing.steps import ROWS, VARIANCES


class TestTinyBert(GoldenMethod):
    method = "tinybert"

    def expected(self, step: PlainStep) -> dict[str, float]:
        if step.moment.share >= 0.5:
            return {"soft": step.soft_of([step.mean_probability(row) for row in range(ROWS)])}
        hidden = {
            pair: mean(
                [squared_error(*step.projected(pair, *both)) for row in step.vectors(pair).values() for both in row]
            )
            / (1.0 if step.paper else VARIANCES[pair])
            for pair in step.targets
        }
        return {"hidden": step.per_layer(hidden)}
