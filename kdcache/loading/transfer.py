"""Batches on their way to an accelerator: the tensors of a step in one pinned buffer, one copy, views on the device.

A step has about forty tensors on the host: inputs, labels, logits, values of each layer, scales, alignment. Copied one
by one, each costs a call, and a copy from memory that is not pinned waits for the device. Here a thread puts the bytes
of a step into one buffer and starts its copy on a stream of its own, while the step before runs. Values stay as they
are stored; decoding and alignment happen on the device.

Tensors keep their strides. The layers of a teacher lie interleaved in memory, so their bytes are copied as one block.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from kdcache.loading.prefetch import closed_at_exit, in_background

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch

_ALIGNED = 64  # bytes; divisible by the size of every number

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PackedBatches:
    """The micro-batches of a step, the bytes of their host tensors in ``buffer`` uint8 [bytes]."""

    batches: tuple[Batch, ...]
    buffer: Tensor
    places: dict[int, tuple[int, tuple[int, ...]]]  # id of a tensor of the host -> its first byte, and its strides

    def to(self, device: torch.device) -> tuple[Batch, ...]:
        """The same batches on ``device``, by one copy that the host does not wait for."""
        buffer = self.buffer.to(device, non_blocking=True)
        typed: dict[torch.dtype, Tensor] = {}

        def view(tensor: Tensor) -> Tensor:
            if id(tensor) not in self.places:
                return tensor.to(device)
            offset, strides = self.places[id(tensor)]
            if tensor.dtype not in typed:
                typed[tensor.dtype] = buffer.view(tensor.dtype)
            first = offset // tensor.element_size()
            return torch.as_strided(typed[tensor.dtype], tensor.shape, strides, first)

        return tuple(batch.mapped(view) for batch in self.batches)


def pack(batches: Sequence[Batch], *, pin: bool = False) -> PackedBatches:
    """Copy the bytes of the tensors on the host into one buffer; ``pin`` it for a GPU."""
    tensors: dict[int, Tensor] = {}
    for batch in batches:
        batch.mapped(lambda tensor: tensors.setdefault(id(tensor), tensor))
    here = {key: _aligned(tensor) for key, tensor in tensors.items() if tensor.device.type == "cpu"}
    blocks = _blocks(list(here.values()))
    places: dict[int, int] = {}  # first byte in memory -> in the buffer
    size = 0
    for first, last in blocks:
        places[first] = -(-size // _ALIGNED) * _ALIGNED + first % _ALIGNED  # numbers stay aligned
        size = places[first] + last - first
    buffer = torch.empty(-(-size // _ALIGNED) * _ALIGNED, dtype=torch.uint8, pin_memory=pin)
    for first, last in blocks:
        ctypes.memmove(buffer.data_ptr() + places[first], first, last - first)  # releases the GIL
    starts = sorted(places)
    found = {key: (_place(tensor, starts, places), tensor.stride()) for key, tensor in here.items()}
    return PackedBatches(tuple(batches), buffer, found)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one whose numbers begin at odd addresses, as a view of packed bytes may."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of memory that a tensor spans, with those between its strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _blocks(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The extents of the tensors, those that overlap joined; ascending."""
    blocks: list[tuple[int, int]] = []
    for first, last in sorted(_extent(tensor) for tensor in tensors if tensor.numel()):
        if blocks and first < blocks[-1][1]:
            blocks[-1] = blocks[-1][0], max(blocks[-1][1], last)
        else:
            blocks.append((first, last))
    return blocks


def _place(tensor: Tensor, starts: Sequence[int], places: dict[int, int]) -> int:
    """The first byte of a tensor in the buffer."""
    if not tensor.numel():
        return 0
    address = tensor.data_ptr()
    block = starts[bisect.bisect_right(starts, address) - 1]
    return places[block] + address - block


@dataclass(frozen=True, eq=False)
class _Moved(Generic[T]):
    """What belongs to a step, and its batches on the device."""

    step: T
    batches: tuple[Batch, ...]
    copied: Any = None  # the event of the copy


def on_device(
    steps: Callable[[], Iterator[tuple[T, Sequence[Batch]]]], device: torch.device, *, in_thread: bool = True
) -> Iterator[tuple[T, tuple[Batch, ...]]]:
    """Steps with their micro-batches on ``device``, copied while earlier ones are used.

    Args:
        steps: starts the iterator, with batches on the host.
        device: an accelerator.
        in_thread: whether the iterator runs in a thread. It must not where it uses the device itself, as live teachers
            do.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def moved() -> Generator[_Moved[T]]:
        with torch.cuda.device(device) if stream is not None else contextlib.nullcontext():
            for step, batches in steps():
                packed = pack(batches, pin=stream is not None)
                if stream is None:
                    yield _Moved(step, packed.to(device))
                    continue
                with torch.cuda.stream(stream):
                    there, copied = packed.to(device), stream.record_event()
                yield _Moved(step, there, copied)

    items = closed_at_exit(in_background(moved) if in_thread else moved())
    try:
        for item in items:
            if item.copied is not None:
                _wait(item, device)
            yield item.step, item.batches
    finally:
        items.close()


def _wait(item: _Moved[Any], device: torch.device) -> None:
    """The present stream waits for the copy, and its memory is not used again before that stream is done with it."""
    present = torch.cuda.current_stream(device)
    present.wait_event(item.copied)
    for batch in item.batches[:1]:
        batch.labels.record_stream(present)  # all views have the storage of the buffer
