"""``torch.compile`` for a network of transformers, while it trains and while it teaches.

Texts have any length, and a compiled graph has one shape. So inputs are padded to one of eight lengths, and outputs cut
back: a training compiles at most eight graphs for each number of rows. The last batch of an epoch, which may have fewer
rows, and evaluations run as they are.

The batches of a dump have a number of tokens and so any number of rows. A graph of a teacher takes any number from two
on; a single text runs as it is, because torch would make further graphs for it.
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

    @functools.wraps(eager)
    def forward(*args: Any, **inputs: Any) -> Any:
        ids = inputs.get("input_ids")
        if args or ids is None or not torch.is_grad_enabled() or not network.training or len(ids) not in rows:
            return eager(*args, **inputs)
        return _cut(fast(**padded_inputs(network, inputs, max_length)), ids.shape[1])

    limit = max(_LENGTHS * len(rows), torch._dynamo.config.recompile_limit)
    network.forward = forward  # of this object, not of its class
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            yield
    finally:
        del network.forward


@contextlib.contextmanager
def compiled_forward(network: nn.Module) -> Iterator[None]:
    """While the block runs, forward passes of ``network`` without gradients are compiled graphs of their length.

    Inputs come from ``padded_inputs``, so that there are few lengths.
    """
    eager = network.forward
    fast = torch.compile(eager, dynamic=False, backend=_BACKEND)

    @functools.wraps(eager)
    def forward(*args: Any, **inputs: Any) -> Any:
        tensors = [value for value in (*args, *inputs.values()) if isinstance(value, Tensor) and value.dim() > 1]
        if not tensors or len(tensors[0]) == 1 or torch.is_grad_enabled():
            return eager(*args, **inputs)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fast(*args, **inputs)

    network.forward = forward  # of this object, not of its class
    try:
        with torch._dynamo.config.patch(recompile_limit=max(4 * _LENGTHS, torch._dynamo.config.recompile_limit)):
            yield
    finally:
        del network.forward


def padded_inputs(network: nn.Module, inputs: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """``inputs`` [rows, tokens] of ``network`` at their ``padded_length``."""
    padding = getattr(getattr(network, "config", None), "pad_token_id", None)
    fillers = {"input_ids": padding if isinstance(padding, int) and padding >= 0 else 0}
    length = padded_length(inputs["input_ids"].shape[1], max_length)
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
