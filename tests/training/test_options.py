"""Options of the arithmetic: TF32, compiled graphs, the fused optimizer, fp16 with its scaler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from kdcache.recipe import CofinetuneSection, DistillSection
from kdcache.recipe.training import ARITHMETIC
from kdcache.testing.tiny import make_model
from kdcache.training import compiled as module
from kdcache.training import device, loop
from kdcache.training.compiled import compiled, padded_length
from kdcache.training.optim import adamw
from kdcache.training.settings import LoopSettings
from tests.training.test_loop import SETTINGS, Regression, run, weights


def test_options_are_not_given_by_default_and_reach_the_loop() -> None:
    for section in (DistillSection(), CofinetuneSection()):
        assert {getattr(section, key) for key in ARITHMETIC} == {None}
        settings = LoopSettings.from_section(section.model_copy(update=dict.fromkeys(ARITHMETIC, False)), {})
        assert {getattr(settings, key) for key in ARITHMETIC} == {False}


@pytest.mark.parametrize(("tf32", "inside"), [(True, "high"), (False, "highest"), (None, "medium")])
def test_tf32_holds_for_the_training_only(tf32: bool | None, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = ["medium"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision[0])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: precision.__setitem__(0, value))
    monkeypatch.setattr(device, "default_device", lambda: torch.device("cuda"))
    with device.float32_products(tf32):
        assert precision == [inside]
    assert precision == ["medium"]
    monkeypatch.setattr(device, "default_device", lambda: torch.device("cpu"))
    with device.float32_products(tf32):
        assert precision == ["medium"]


def test_the_fused_kernel_can_be_left_out() -> None:
    named = list(torch.nn.Linear(2, 2).named_parameters())
    assert [adamw(named, 0.1, 0.0, fused=fused).defaults["fused"] for fused in (None, True, False)] == [
        True,
        True,
        False,
    ]


def test_lengths_are_padded_to_eight() -> None:
    for longest in (1, 5, 8, 30, 128, 512):
        found = {padded_length(length, longest) for length in range(1, longest + 1)}
        assert len(found) <= 8
        assert max(found) == longest
        assert all(padded_length(length, longest) >= length for length in range(1, longest + 1))
    assert padded_length(130, 128) == 130


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForSequenceClassification

    path = make_model(tmp_path_factory.mktemp("compiled") / "roberta", "roberta", depth=2)
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, attn_implementation="sdpa")


def batch(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = (torch.arange(length) < torch.arange(length, length - rows, -1).clamp(min=2)[:, None]).long()
    ids = torch.randint(5, 50, (rows, length), generator=generator)
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def test_a_compiled_network_gives_the_same_outputs_and_gradients(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.append(
            max(
                (
                    tuple(each.shape)
                    for each in inputs
                    if isinstance(each, Tensor) and each.dim() == 2 and each.dtype == torch.int64
                ),
                default=(),
            )
        )
        return graph.forward

    monkeypatch.setattr(module, "_BACKEND", counted)
    network.train()
    for part in network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    found = {}
    for name, context in (("eager", nullcontext()), ("compiled", compiled(network, rows={4}, max_length=32))):
        with context:
            for rows, length in ((4, 9), (4, 10), (4, 12), (4, 21), (3, 9), (4, 32)):
                network.zero_grad()
                inputs = batch(rows, length)
                output = network(**inputs, output_hidden_states=True, return_dict=True)
                valid = inputs["attention_mask"].bool()
                states = torch.stack(output.hidden_states)[:, valid]
                (output.logits.square().sum() + states.square().mean()).backward()
                gradient = torch.cat([parameter.grad.reshape(-1) for parameter in network.parameters()])
                found[name, rows, length] = (output.logits.detach(), states.detach(), gradient)
    assert "forward" not in vars(network)
    for (name, rows, length), expected in found.items():
        if name == "eager":
            torch.testing.assert_close(found["compiled", rows, length], expected, atol=1e-5, rtol=1e-4)
    assert {shape for shape in shapes if len(shape) == 2 and shape[0] == 4} <= {(4, 12), (4, 24), (4, 32)}
    assert len(shapes) <= 3 * 8  # of three lengths, whatever number of graphs each has; the three rows ran as they are


class _Scaled(Accelerator):
    """Trains as on a GPU in fp16: losses are scaled, and steps with infinite gradients are skipped."""

    made: list[torch.amp.GradScaler] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(mixed_precision="no")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=4)
        self.made.append(self.scaler)


class _Overflows(Regression):
    """Two steps have infinite gradients at the scale of the time."""

    def losses(self, batch: Any) -> Iterator[Any]:
        for loss, terms in super().losses(batch):
            large = 1e38 if self.seen % 5 == 2 else 1.0
            hooked = loss * 1.0
            if hooked.requires_grad:
                hooked.register_hook(lambda gradient, large=large: gradient * large)
            yield hooked, terms


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[torch.amp.GradScaler]:
    monkeypatch.setattr(loop, "make_accelerator", lambda _precision: _Scaled())
    _Scaled.made.clear()
    return _Scaled.made


@pytest.mark.parametrize("die_at", [4, 7, 11, 13])
def test_fp16_resumes_with_its_scaler(die_at: int, scaled: list[torch.amp.GradScaler], tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=3, checkpoint_steps=1)
    undisturbed, resumed = _Overflows(), _Overflows()
    run(undisturbed, tmp_path / "whole", settings)
    expected = scaled[-1].state_dict()
    assert expected["scale"] == 2.0**13
    with pytest.raises(KeyboardInterrupt):
        run(_Overflows(die_at=die_at), tmp_path / "cut", settings)
    resumed.seen = die_at
    run(resumed, tmp_path / "cut", settings)
    assert scaled[-1].state_dict() == expected
    assert weights(resumed) == weights(undisturbed)
