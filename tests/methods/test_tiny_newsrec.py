"""Tiny-NewsRec against its formula in a loop."""

from __future__ import annotations

import math

from kdcache.testing.method_contract import GoldenMethod, PlainStep, mean, squared_error
from kdcache.testing.steps import CLASSES, ROWS, VARIANCES


class TestTinyNewsRec(GoldenMethod):
    method = "tiny-newsrec"

    def expected(self, step: PlainStep) -> dict[str, float]:
        shares, targets = [], []
        for row in range(ROWS):
            exponentials = [math.exp(-error) for error in step.errors(row)]
            shares.append([value / sum(exponentials) for value in exponentials])
            targets.append([
                sum(share * logits[row][c] for share, logits in zip(shares[row], step.teachers, strict=True))
                for c in range(CLASSES)
            ])  # fmt: skip
        hidden = {}
        for pair in step.targets:
            errors = [
                shares[row][pair[0]] * squared_error(*step.projected(pair, *both))
                for row, vectors in step.vectors(pair, "mean").items()
                for both in vectors
            ]
            hidden[pair] = mean(errors) / (1.0 if step.paper else VARIANCES[pair])
        assert set(hidden) == {(0, 2), (1, 2)}
        return {"task": step.task, "soft": step.soft_of(targets), "hidden": step.per_layer(hidden)}
