"""Gradients of word embeddings on a CPU, row by row.

A micro-batch reads a few hundred of 30,000 rows, but torch's gradient has all of them: each backward pass fills and
adds a matrix of zeros, which is 4 to 8 % of a small student's step. Here each micro-batch gives the rows that it read,
and the dense gradient is made once per optimizer step. Sums are made in the same order by the same kernel, so every bit
is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_MIN_ROWS = 1024  # smaller matrices cost nothing


class RowGradients:
    """Collects the gradients of a model's word embeddings until ``close``; its weights and classes stay the same."""

    def __init__(self, model: nn.Module) -> None:
        self._lookups = [
            _Lookup(module) for module in model.modules() if isinstance(module, nn.Embedding) and _fits(module)
        ]

    def gather(self) -> None:
        """Make the dense gradients of the backward passes since the last call."""
        for lookup in self._lookups:
            lookup.gather()

    def changed(self) -> dict[Tensor, Tensor | None]:
        """For each matrix: ids [n] of the rows that the last ``gather`` may have changed from zero; None: all."""
        return {lookup.weight: lookup.changed for lookup in self._lookups}

    def close(self) -> None:
        """The embeddings are as they were."""
        for lookup in self._lookups:
            lookup.close()


def _fits(module: nn.Embedding) -> bool:
    if type(module) is not nn.Embedding or module.num_embeddings < _MIN_ROWS or not module.weight.requires_grad:
        return False
    usual = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return usual and "forward" not in vars(module) and module.weight.device.type == "cpu"


class _Lookup:
    """An embedding whose backward pass keeps the rows that were read."""

    def __init__(self, module: nn.Embedding) -> None:
        self._module = module
        self._rows: list[tuple[Tensor, Tensor]] = []  # distinct ids [n], their gradients [n, width]
        self.weight = module.weight
        self.changed: Tensor | None = None
        plain: Callable[[Tensor], Tensor] = module.forward

        def forward(input: Tensor) -> Tensor:  # noqa: A002 - the name of torch
            if not torch.is_grad_enabled():
                return plain(input)
            looked_up: Tensor = _ByRow.apply(module.weight, input, self)  # type: ignore[no-untyped-call]
            return looked_up

        module.forward = forward  # type: ignore[method-assign]  # of this object, not of its class

    def add(self, ids: Tensor, gradient: Tensor) -> None:
        distinct, places = torch.unique(ids, return_inverse=True)
        padding = self._module.padding_idx
        at = -1 if padding is None else int(torch.searchsorted(distinct, padding))
        at = at if at < len(distinct) and (padding is None or int(distinct[at]) == padding) else -1
        rows = torch.ops.aten.embedding_dense_backward(gradient, places, len(distinct), at, False)
        self._rows.append((distinct, rows))

    def gather(self) -> None:
        rows, self._rows = self._rows, []
        weight = self.weight
        read = [torch.empty(0, dtype=torch.int64), *(ids for ids, _ in rows)]
        self.changed = torch.cat(read) if weight.grad is None else None  # a matrix that is used in another way, too
        if rows and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        for ids, gradient in rows:
            assert weight.grad is not None
            weight.grad.index_add_(0, ids, gradient)

    def close(self) -> None:
        del self._module.forward


class _ByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, lookup: _Lookup) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.lookup = lookup
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.lookup.add(*ctx.saved_tensors, gradient.contiguous())
        return None, None, None
