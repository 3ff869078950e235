"""Inputs follow the model to its device everywhere, and what comes of it is what the CPU makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.teacher import Teacher
from kdcache.testing.accelerator import DEVICE, fake_accelerator
from kdcache.testing.backends import BackendContract
from kdcache.testing.teachers import make_teachers
from tests.training.test_loop import Regression, run


def test_the_fake_one_refuses_what_a_real_one_refuses() -> None:
    with fake_accelerator() as device:
        layer = nn.Linear(3, 2).to(device)
        assert {parameter.device for parameter in layer.parameters()} == {DEVICE}
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(1, 3))
        inputs = torch.ones(1, 3)
        loss = layer(inputs.to(device)).square().sum()
        loss.backward()
        expected = layer.weight.detach().cpu() @ torch.ones(3) + layer.bias.detach().cpu()
        assert float(loss.detach()) == pytest.approx(float(expected.square().sum()))
        torch.testing.assert_close(layer.bias.grad.cpu(), 2 * expected)  # type: ignore[union-attr]
        torch.optim.AdamW(layer.parameters(), lr=0.1).step()
        with pytest.raises((TypeError, RuntimeError)):
            layer.weight.detach().numpy()


def test_the_loop(tmp_path: Path) -> None:
    """With a resume in the middle. Not bit-equal: AdamW has a fused kernel for the CPU."""
    here, there = Regression(), Regression()
    run(here, tmp_path / "here")
    with fake_accelerator():
        with pytest.raises(KeyboardInterrupt):
            run(Regression(die_at=7), tmp_path / "there")
        run(there, tmp_path / "there")
        assert {parameter.device for parameter in there.model.parameters()} == {DEVICE}
        found = [parameter.detach().cpu() for parameter in there.model.parameters()]
    torch.testing.assert_close(found, [parameter.detach() for parameter in here.model.parameters()])


class TestTorchElsewhere(BackendContract):
    kind = "torch"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _elsewhere(cls) -> Iterator[None]:
        with fake_accelerator():
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
        return load_teacher(
            make_teachers(tmp_path_factory.mktemp("t"), {"roberta": "roberta"}, widths={"roberta": 12}, depth=3),
            "roberta",
        )
