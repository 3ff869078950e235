"""DIST against its formula in a loop."""

from __future__ import annotations

import math

import pytest
import torch

from kdcache.testing.method_contract import GoldenMethod, PlainStep, Vector, mean, settings_of, softmax
from kdcache.testing.steps import ROWS, loop_model, step_batch, step_loss


def distance(a: Vector, b: Vector) -> float:
    """1 - the Pearson correlation."""
    x, y = [value - mean(a) for value in a], [value - mean(b) for value in b]
    return 1 - sum(p * q for p, q in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


class TestDist(GoldenMethod):
    method = "dist"

    def expected(self, step: PlainStep) -> dict[str, float]:
        student = [softmax(row, step.temperature) for row in step.student]
        teacher = [softmax(step.mean_probability(row), step.temperature) for row in range(ROWS)]
        inter = mean([distance(a, b) for a, b in zip(student, teacher, strict=True)])
        columns = zip(zip(*student, strict=True), zip(*teacher, strict=True), strict=True)
        intra = mean([distance(list(a), list(b)) for a, b in columns])
        return {"task": step.task, "soft": step.factor * (inter + intra)}


def test_a_batch_in_which_nothing_varies_has_a_finite_gradient() -> None:
    batch = step_batch()
    assert batch.targets is not None
    batch.targets.logits[:] = 0.0
    batch.inputs["input_ids"][:] = 7
    _, terms, gradients = step_loss(loop_model(settings_of("dist")), batch)
    assert terms["soft"] == pytest.approx(2.0)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
