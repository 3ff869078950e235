"""``torch.compile`` for a network of transformers while it trains.

Texts have any length, and a compiled graph has one shape. So inputs are padded to one of eight lengths, and outputs cut
back: a training compiles at most eight graphs for each number of rows. The last batch of an epoch, which may have fewer
rows, and evaluations run as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LENGTHS = 8
_BACKEND = "inductor"


def padded_length(length: int, max_length: int) -> int:
    """The length that a batch of ``length`` tokens is padded to: a multiple of an eighth of ``max_length``."""
    step = -(-max_length // _LENGTHS)
    return max(length, min(-(-length // step) * step, max_length))


@contextlib.contextmanager
def compiled(network: nn.Module, *, rows: Collection[int], max_length: int) -> Iterator[None]:
    """While the block runs, ``network`` trains with compiled graphs; its weights and its class stay the same.

    Args:
        network: takes keyword tensors [batch, tokens] and returns an output of transformers.
        rows: batch sizes that are compiled for.
        max_length: tokens of the longest text.
    """
    eager = network.forward
    fast = torch.compile(eager, dynamic=False, backend=_BACKEND)
    padding = getattr(getattr(network, "config", None), "pad_token_id", None)
    fillers = {"input_ids": padding if isinstance(padding, int) and padding >= 0 else 0}

    @functools.wraps(eager)
    def forward(*args: Any, **inputs: Any) -> Any:
        ids = inputs.get("input_ids")
        if args or ids is None or not torch.is_grad_enabled() or not network.training or len(ids) not in rows:
            return eager(*args, **inputs)
        length = ids.shape[1]
        return _cut(fast(**_padded(inputs, padded_length(length, max_length), fillers)), length)

    limit = max(_LENGTHS * len(rows), torch._dynamo.config.recompile_limit)
    network.forward = forward  # of this object, not of its class
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            yield
    finally:
        del network.forward


def _padded(inputs: Mapping[str, Any], length: int, fillers: Mapping[str, int]) -> dict[str, Any]:
    return {
        name: nn.functional.pad(value, (0, length - value.shape[1]), value=fillers.get(name, 0))
        if isinstance(value, Tensor) and value.dim() == 2
        else value
        for name, value in inputs.items()
    }


def _cut(output: Any, length: int) -> Any:
    """The output without the positions that were added: those of states [batch, tokens, width]."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(each) for each in value)
        return value[:, :length] if isinstance(value, Tensor) and value.dim() == 3 else value

    make: Callable[..., Any] = type(output)
    return make(**{name: cut(value) for name, value in output.items()})
