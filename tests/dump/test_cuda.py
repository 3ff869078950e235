"""The dump on a GPU: whatever waits for the device, but for the one copy of a batch, is an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.codecs.base import TokenSelection
from kdcache.codecs.registry import format_of
from kdcache.dump.engine import PartRun, layer_encoders, run_part, store_thread
from kdcache.teachers.backends import TeacherOutput
from tests.codecs.test_of_0_1_0 import FORMS, Numbers, basis, exact_teacher, exact_texts

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]


class NumbersOnTheGpu(Numbers):
    device = "cuda"

    def run(self, inputs: dict[str, torch.Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        output = super().run(inputs, layers, pooled)
        hidden = {layer: self._sent(states) for layer, states in output.hidden.items()}
        return TeacherOutput(self._sent(output.logits), None, hidden)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to("cuda", non_blocking=True)


@pytest.mark.parametrize("tokens", ["all", "first", "pooled"])
def test_batches_are_stored_without_a_wait(tokens: TokenSelection) -> None:
    forms = [replace(form, tokens=tokens) for form in FORMS.values() if not format_of(form).searches]
    layers = dict(enumerate(forms))
    teacher, bases, batches = (
        exact_teacher(layers),
        {layer: basis(spec) for layer, spec in layers.items()},
        exact_texts(),
    )
    _, expected = run_part(batches, Numbers(), teacher, tuple(layers), bases, lambda _: None)
    run_part(batches, NumbersOnTheGpu(), teacher, tuple(layers), bases, lambda _: None)  # kernels are loaded now
    part = PartRun(batches, NumbersOnTheGpu(), teacher, tuple(layers), layer_encoders(teacher, layers, bases, "cuda"))
    try:
        torch.cuda.set_sync_debug_mode("error")
        with store_thread(teacher, "cuda") as store:
            part.run(store, lambda _: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _, hidden = part.results()
    for layer, block in expected.items():
        np.testing.assert_array_equal(hidden[layer].values, block.values)
