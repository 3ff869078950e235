"""Work behind the teacher: what a device computed goes to the host, is stored and written while the next batch runs.

The thread that runs the teacher only starts work: it never waits for a result. So an accelerator has the next forward
pass in its queue, over the borders of batches and of parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
Arrays = list[list[np.ndarray]]
_ALIGNED = 16  # bytes; divisible by the size of every number


class BackgroundWriter(Generic[T]):
    """Runs actions in order in one thread; at most ``ahead`` of them wait or run. With 0 the caller runs them itself.

    ``on_done`` gets the result of each. An error of an action is raised by a later ``start``, or at the end; the
    actions after it do not run.
    """

    def __init__(self, name: str, on_done: Callable[[T], None] = lambda _: None, *, ahead: int = 1) -> None:
        self._on_done, self._ahead = on_done, ahead
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pending: deque[Future[T]] = deque()
        self._failed = False  # set in the thread, so that nothing runs after an error

    def start(self, action: Callable[[], T]) -> None:
        """Wait until fewer than ``ahead`` actions are left, then queue ``action``."""
        if not self._ahead:
            self._on_done(action())
            return
        self._settle(self._ahead - 1)
        self._pending.append(self._executor.submit(self._run, action))

    def __enter__(self) -> BackgroundWriter[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            self._executor.shutdown(wait=True)  # after an error of the caller, too, the queued actions end

    def _settle(self, left: int) -> None:
        while len(self._pending) > left:
            self._on_done(self._pending.popleft().result())

    def _run(self, action: Callable[[], T]) -> T:
        if self._failed:
            raise RuntimeError("an action before this one failed")  # which is raised first
        try:
            return action()
        except BaseException:
            self._failed = True
            raise


def fetch(groups: Sequence[Sequence[Tensor]]) -> Callable[[], Arrays]:
    """Start copying tensors from their device; the function that is returned waits for them and gives arrays.

    On an accelerator they travel as one buffer, so the host waits once. On CUDA the copy has a stream of its own:
    kernels of the next forward pass do not wait for it.
    """
    flat = [tensor for group in groups for tensor in group]
    if all(tensor.device.type == "cpu" for tensor in flat):
        return lambda: [[tensor.numpy() for tensor in group] for group in groups]
    buffer = torch.cat([_bytes(tensor) for tensor in flat])
    wait = _to_host(buffer)
    kinds = [[(_numpy_type(tensor), tuple(tensor.shape)) for tensor in group] for group in groups]

    def arrays() -> Arrays:
        host, first = wait(), 0
        found: Arrays = []
        for group in kinds:
            found.append([])
            for dtype, shape in group:
                size = int(np.prod(shape)) * dtype.itemsize
                found[-1].append(host[first : first + size].view(dtype).reshape(shape))
                first += -(-size // _ALIGNED) * _ALIGNED
        return found

    return arrays


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, with zeros up to a multiple of ``_ALIGNED``."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % _ALIGNED))


def _numpy_type(tensor: Tensor) -> np.dtype[Any]:
    return np.dtype(str(tensor.dtype).removeprefix("torch."))


def _to_host(buffer: Tensor) -> Callable[[], np.ndarray]:
    if buffer.device.type != "cuda":
        return lambda: buffer.cpu().numpy()
    stream, present = _copy_stream(buffer.device), torch.cuda.current_stream(buffer.device)
    stream.wait_stream(present)
    host = torch.empty(buffer.shape, dtype=torch.uint8, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(buffer, non_blocking=True)
        copied = stream.record_event()
    buffer.record_stream(stream)  # its memory is not used again before the copy is done

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


_streams: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
