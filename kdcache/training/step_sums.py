"""What the processes of a training add up in each step: gradients, the loss and its terms.

A process may have no gradient for a parameter that another one has: its share of a short step may be empty. AdamW skips
a parameter without a gradient, and does not skip one whose gradient is zero. So the processes first agree on which
parameters have a gradient anywhere, and a parameter without one stays so. The names of the terms are compared in the
same exchange, because sums need the same order everywhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdcache.training.processes import Processes


class StepSums:
    """Adds up gradients and losses over ``processes``; one object per training.

    ``device``: where the losses are.
    """

    def __init__(self, processes: Processes, parameters: Sequence[Tensor], device: torch.device) -> None:
        self._processes, self._parameters, self._device = processes, parameters, device

    def add(self, values: Mapping[str, float | Tensor], *, due: bool) -> tuple[dict[str, float | Tensor], bool]:
        """Replace gradients by their sums; returns the sums of ``values`` and whether ``due`` holds in any process."""
        names = list(values)
        signature = zlib.crc32("\n".join(names).encode())
        present = [int(parameter.grad is not None) for parameter in self._parameters]
        *anywhere, highest, lowest, is_due = self._processes.largest([*present, signature, -signature, int(due)])
        if highest != -lowest:
            names = list(dict.fromkeys(name for own in self._processes.gathered(names) for name in own))
        gradients = []
        for parameter, needed in zip(self._parameters, anywhere, strict=True):
            if needed and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        terms = torch.stack([self._scalar(values.get(name, 0.0)) for name in names])
        self._processes.add([*gradients, terms])
        return dict(zip(names, terms.unbind(), strict=True)), bool(is_due)

    def _scalar(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self._device, torch.float32)
        return torch.full((), value, dtype=torch.float32, device=self._device)  # no copy, which would wait
