"""What the processes of a training add up in each step: gradients, the loss and its terms.

A process may have no gradient for a parameter that another one has: its share of a short step may be empty. AdamW skips
a parameter without a gradient, and does not skip one whose gradient is zero. So the processes first agree on which
parameters have a gradient anywhere, and a parameter without one stays so. The names of the terms are compared in the
same exchange, because sums need the same order everywhere.

Of a matrix of word embeddings, a step reads a few hundred of 30,000 rows. The processes agree on the rows that any of
them read, and add up these alone.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdcache.training.processes import Processes
    from kdcache.training.row_gradients import RowGradients


class StepSums:
    """Adds up gradients and losses over ``processes``; one object per training.

    ``device``: where the losses are. ``rows``: what knows which rows of word embeddings have gradients.
    """

    def __init__(
        self,
        processes: Processes,
        parameters: Sequence[Tensor],
        device: torch.device,
        rows: RowGradients | None = None,
    ) -> None:
        self._processes, self._parameters, self._device, self._rows = processes, parameters, device, rows

    def add(self, values: Mapping[str, float | Tensor], *, due: bool) -> tuple[dict[str, float | Tensor], bool]:
        """Replace gradients by their sums; returns the sums of ``values`` and whether ``due`` holds in any process."""
        names = list(values)
        signature = zlib.crc32("\n".join(names).encode())
        present = [int(parameter.grad is not None) for parameter in self._parameters]
        changed = {} if self._rows is None else self._rows.changed()
        marks = [_marks(weight, ids) for weight, ids in changed.items()]
        own = [int(due), signature, -signature, *present, *itertools.chain(*marks)]
        is_due, highest, lowest, *others = self._processes.largest(own)
        anywhere, others = others[: len(present)], others[len(present) :]
        read = {}
        for weight in changed:
            read[weight], others = _rows_of(others[: len(weight) + 1]), others[len(weight) + 1 :]
        if highest != -lowest:
            names = list(dict.fromkeys(name for own in self._processes.gathered(names) for name in own))
        gradients, parts = [], []
        for parameter, needed in zip(self._parameters, anywhere, strict=True):
            if needed and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is None:
                continue
            ids = read.get(parameter)
            gradients.append(parameter.grad if ids is None else parameter.grad[ids])
            if ids is not None:
                parts.append((parameter.grad, ids, gradients[-1]))
        terms = torch.stack([self._scalar(values.get(name, 0.0)) for name in names])
        self._processes.add([*gradients, terms])
        for gradient, ids, sums in parts:
            gradient[ids] = sums
        return dict(zip(names, terms.unbind(), strict=True)), bool(is_due)

    def _scalar(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self._device, torch.float32)
        return torch.full((), value, dtype=torch.float32, device=self._device)  # no copy, which would wait


def _marks(weight: Tensor, ids: Tensor | None) -> list[int]:
    """1 at each of ``ids``, of all rows of ``weight``; before them 1 if ``ids`` is None and all may have changed."""
    marks = torch.zeros(len(weight) + 1, dtype=torch.int64)
    marks[0 if ids is None else ids + 1] = 1
    found: list[int] = marks.tolist()
    return found


def _rows_of(marks: list[int]) -> Tensor | None:
    """The ids [n] of ``_marks``."""
    return None if marks[0] else torch.tensor(marks[1:]).nonzero().flatten()
