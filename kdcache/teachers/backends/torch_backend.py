"""Runs a teacher with PyTorch: the reference for the other backends.

Lower precisions run under autocast: weights, layer norms and softmax stay in float32. So a dump in bf16 is as close to
float32 as the tensor cores allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcache.errors import ModelError
from kdcache.teachers.backends.base import TeacherOutput
from kdcache.training.device import default_device

if TYPE_CHECKING:
    from kdcache.teachers.teacher import Teacher

_AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend:
    """Runs on CUDA if available, else on the CPU."""

    name = "torch"

    def __init__(self, teacher: Teacher, *, precision: str) -> None:
        if precision not in _AUTOCAST:
            raise ModelError(
                f"precision '{precision}' is not known; expected float32, bf16 or fp16", "Set dump.precision."
            )
        self.precision = precision
        self.device = default_device().type
        self._dtype = _AUTOCAST[precision]
        self._model = teacher.model.to(self.device).eval()

    @property
    def record(self) -> Mapping[str, str]:
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"device": name}

    def run(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        placed = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        with torch.inference_mode(), self._autocast():
            forward = self._model(placed, hidden_states=bool(layers))
        valid = placed["attention_mask"].bool()
        hidden = {layer: forward.hidden_states[layer][valid].float() for layer in layers}
        vector = forward.pooled.float() if pooled and forward.pooled is not None else None
        return TeacherOutput(forward.logits.float(), vector, hidden)

    def close(self) -> None:
        if self.device == "cuda":
            self._model.cpu()
            torch.cuda.empty_cache()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device, dtype=self._dtype)
