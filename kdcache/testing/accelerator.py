"""A fake accelerator for machines without one: its tensors report another device and cannot be mixed with CPU tensors.

    with fake_accelerator() as device:
        train(...)            # the model moves to ``device``; inputs that stay on the CPU raise an error

The device is called ``lazy``, a name that every build of torch knows and nothing here uses. Values are on the CPU,
where each operation is computed. So a training on it gives the weights of the CPU, and ``float()`` works.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("lazy")
_ATEN = torch.ops.aten
_MAY_MIX = {_ATEN.copy_.default, _ATEN._to_copy.default}  # between devices
_MAY_INDEX = {
    _ATEN.index.Tensor,
    _ATEN.index_put_.default,
    _ATEN.index_put.default,
    _ATEN._index_put_impl_.default,
}  # by the CPU


_reads: list[str] = []
_transfers: list[int] = []


@contextlib.contextmanager
def recorded_transfers() -> Iterator[list[int]]:
    """Bytes of each copy from the host to the accelerator in the block, in any thread."""
    first = len(_transfers)
    recorded: list[int] = []
    try:
        yield recorded
    finally:
        recorded += _transfers[first:]


@contextlib.contextmanager
def recorded_reads() -> Iterator[list[str]]:
    """The names of operations in the block that copy values of the accelerator to the host, which waits for them.

    That includes those whose result has as many rows as a mask on the accelerator has true values.
    """
    first = len(_reads)
    recorded: list[str] = []
    try:
        yield recorded
    finally:
        recorded += _reads[first:]


class Elsewhere(torch.Tensor):
    """A tensor of the accelerator; ``inside`` has its values, on the CPU."""

    inside: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.inside = values
        return made

    def __init__(self, values: Tensor) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inside!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inside.detach().__reduce_ex__(protocol)  # saved like tensors of a GPU

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Also handles operations that make tensors on the device or move them there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def fake_accelerator() -> Iterator[torch.device]:
    """Make the device the default of accelerate and of ``default_device`` while the block runs."""
    from accelerate import Accelerator

    from kdcache.training import device

    with contextlib.ExitStack() as patches:
        real = device.default_device
        _exchange(real, _device)
        patches.callback(_exchange, _device, real)  # also in modules that are imported while the block runs
        patches.enter_context(mock.patch.object(Accelerator, "device", DEVICE))
        patches.enter_context(
            mock.patch.object(torch, "inference_mode", torch.no_grad)
        )  # its tensors cannot be wrapped
        patches.enter_context(mock.patch.object(threading.Thread, "run", _with_mode(threading.Thread.run)))
        patches.enter_context(_Mode())  # type: ignore[no-untyped-call]
        yield DEVICE


def _with_mode(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    def started(thread: threading.Thread) -> None:
        with _Mode():  # type: ignore[no-untyped-call]  # each thread has its own
            run(thread)

    return started


def _device() -> torch.device:
    return DEVICE


def _exchange(old: Callable[[], torch.device], new: Callable[[], torch.device]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("kdcache.") and getattr(module, "default_device", None) is old:
            module.default_device = new  # type: ignore[attr-defined]


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    if func is _ATEN._fused_sdp_choice.default:
        return 0  # the plain kernel: CPU kernels accept only tensors that report the CPU
    flat, spec = tree_flatten((args, dict(kwargs)))
    there = [one for one in flat if isinstance(one, Elsewhere)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if there and func not in _MAY_MIX:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        strangers = [one for one in flat if isinstance(one, Tensor) and not isinstance(one, Elsewhere) and one.dim()]
        if strangers and not (func in _MAY_INDEX and isinstance(first, Elsewhere)):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found the accelerator and the CPU"
            )
    real_args, real_kwargs = tree_unflatten([one.inside if isinstance(one, Elsewhere) else one for one in flat], spec)
    if asked is not None:
        real_kwargs["device"] = torch.device("cpu") if asked == DEVICE else asked
    result = func(*real_args, **real_kwargs)
    _transfers.extend(_sent(func, flat, goes_there=bool(there) if asked is None else asked == DEVICE))
    if _counts_on_device(func, args):
        _reads.append(str(func))
    if func is _ATEN.copy_.default:
        if there and not isinstance(args[0], Elsewhere):
            _reads.append(str(func))
        return args[0]
    goes_there = asked == DEVICE if asked is not None else bool(there)
    if there and (not goes_there or not isinstance(result, Tensor | tuple | list | None)):
        _reads.append(str(func))
    if not goes_there:
        return result
    known = {id(one.inside): one for one in there}

    def placed(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return known[id(one)] if id(one) in known else Elsewhere(one)  # an operation in place returns its input

    return tree_map(placed, result)


def _counts_on_device(func: Any, args: Any) -> bool:
    """Whether the size of the result depends on values of the accelerator."""
    if func in (_ATEN.nonzero.default, _ATEN.masked_select.default):
        return any(isinstance(one, Elsewhere) for one in args)
    masks = args[1] if func is _ATEN.index.Tensor else ()
    return any(isinstance(one, Elsewhere) and one.dtype == torch.bool for one in masks)


def _sent(func: Any, flat: Sequence[Any], *, goes_there: bool) -> list[int]:
    """Bytes of the tensors of the host that an operation copies to the accelerator; numbers go with the operation."""
    if not goes_there or func not in _MAY_MIX | _MAY_INDEX:
        return []
    return [
        one.nbytes
        for one in flat
        if isinstance(one, Tensor) and not isinstance(one, Elsewhere) and (one.dim() or func not in _MAY_INDEX)
    ]
