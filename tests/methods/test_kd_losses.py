"""The mean of the soft losses against its formula in a loop, and against ``kd``."""

from __future__ import annotations

import pytest
import torch

from kdcache.testing.method_contract import GoldenMethod, PlainStep, settings_of
from kdcache.testing.steps import ROWS, TEACHERS, loop_model, step_batch, step_loss


class TestKdLosses(GoldenMethod):
    method = "kd-losses"

    def expected(self, step: PlainStep) -> dict[str, float]:
        return {"task": step.task, "soft": step.sum_of_soft([[1 / len(TEACHERS)] * len(TEACHERS)] * ROWS)}


def test_loss_and_gradient_are_those_of_the_mean_probability() -> None:
    loss, terms, gradients = step_loss(loop_model(settings_of("kd-losses", temperature=2.0)), step_batch())
    same, _, others = step_loss(loop_model(settings_of("kd", temperature=2.0)), step_batch())
    assert loss == pytest.approx(same, rel=1e-12)
    assert all(torch.allclose(gradients[name], others[name], rtol=1e-10) for name in others)
    assert {f"soft/{name}" for name in TEACHERS} <= set(terms)
