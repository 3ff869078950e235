"""Runs a teacher with PyTorch: the reference for the other backends.

Lower precisions run under autocast: weights, layer norms and softmax stay in float32. So a dump in bf16 is as close to
float32 as the tensor cores allow. With a float32 head, logits are what float32 gives for the last hidden states.

With a precision that ends with ``+compiled``, the encoder runs as graphs of ``torch.compile``: one for each of eight
lengths, with any number of rows.

``run`` starts work and waits for nothing, apart from what the network itself waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcache.cache.spec import number_format, uncompiled
from kdcache.errors import ModelError
from kdcache.teachers.backends.base import TeacherOutput, packed, valid_places
from kdcache.teachers.head import head_modules, in_float32
from kdcache.training.compiled import compiled_forward, padded_inputs
from kdcache.training.device import default_device

if TYPE_CHECKING:
    from kdcache.teachers.teacher import Teacher

_AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend:
    """Runs on CUDA if available, else on the CPU."""

    name = "torch"

    def __init__(self, teacher: Teacher, *, precision: str, max_length: int | None = None) -> None:
        encoder = number_format(precision)
        if encoder not in _AUTOCAST:
            raise ModelError(
                f"precision '{precision}' is not known; expected float32, bf16 or fp16", "Set dump.precision."
            )
        self.precision = precision
        self.device = default_device().type
        self._dtype = _AUTOCAST[encoder]
        self._model = teacher.model.to(self.device).eval()
        self._float32 = head_modules(teacher.model) if uncompiled(precision) != encoder else ()
        self._longest = None if precision == uncompiled(precision) else max_length or teacher.max_length
        self._for_good = ExitStack()
        if self._longest is not None:  # a graph has the forward methods that were there when it was made
            self._for_good.enter_context(in_float32(self._float32, self.device))
            self._for_good.enter_context(compiled_forward(teacher.model.encoder.base_model))
            self._float32 = ()

    @property
    def record(self) -> Mapping[str, str]:
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"device": name}

    def run(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        if self._longest is not None:
            inputs = padded_inputs(self._model.encoder, inputs, self._longest)
        placed = {name: self._sent(tensor) for name, tensor in inputs.items()}
        places = self._sent(valid_places(inputs["attention_mask"]))
        with torch.inference_mode(), self._autocast(), in_float32(self._float32, self.device):
            forward = self._model(placed, hidden_states=bool(layers))
        hidden = {layer: packed(forward.hidden_states[layer], places).float() for layer in layers}
        vector = forward.pooled.float() if pooled and forward.pooled is not None else None
        return TeacherOutput(forward.logits.float(), vector, hidden)

    def _sent(self, tensor: Tensor) -> Tensor:
        if self.device != "cuda" or tensor.device.type != "cpu":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        self._for_good.close()
        if self.device == "cuda":
            self._model.cpu()
            torch.cuda.empty_cache()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device, dtype=self._dtype)
