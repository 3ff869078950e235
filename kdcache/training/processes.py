"""Training in several processes: who they are, sums over all of them, and how they end together.

    torchrun --nproc-per-node 2 -m kdcache distill RECIPE

Processes are started by torchrun or ``accelerate launch``, which set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*. Each
one holds the whole model and computes the losses of its share of every step. Gradients are added up on the devices
(NCCL on GPUs), everything else on the hosts (gloo), so that no host waits for a device. The first process writes files
and shows progress.

An error in one process ends all. The processes count their failures in the store of the process group: the first one
gives its message and the exit code, the others end with the same code and say nothing. Who waits for a process that
ended notices at once, because its connection is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from kdcache.errors import LostProcessError, MismatchError, RecipeError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_START = timedelta(minutes=10)  # until all processes must have joined
_ANSWER = timedelta(minutes=30)  # others wait so long while the first one evaluates and writes
_REASON_SECONDS = 3.0  # to wait for the message of a process that ended
_FAREWELL_SECONDS = 20.0  # to wait for the others to end too: the store may be in this process
_BUCKET = 1 << 25  # elements that are summed at once
_FAILED, _CODE, _GONE = "kdcache/failed", "kdcache/code", "kdcache/gone"


@dataclass(frozen=True)
class Processes:
    """The processes of a training, and which one this is. With ``world`` 1 nothing is sent to anybody."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The share of this process in ``rows`` consecutive rows; it may be empty."""
        return slice(self.rank * rows // self.world, (self.rank + 1) * rows // self.world)

    def sums(self, values: Sequence[int]) -> list[int]:
        """The sum of each value over all processes, which must give equally many."""
        return self._reduced(values, "SUM")

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all processes, which must give equally many."""
        return self._reduced(values, "MAX")

    def _reduced(self, values: Sequence[int], operation: str) -> list[int]:
        if self.world == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.int64)
        with _together():
            dist.all_reduce(numbers, getattr(dist.ReduceOp, operation), group=_group().hosts)
        return cast("list[int]", numbers.tolist())

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes. They must have the same shapes, dtypes and order there."""
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _together():
                dist.all_reduce(flat, group=_group().hosts if flat.device.type == "cpu" else None)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(own) for part, own in zip(parts, bucket, strict=True)])

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Give each tensor the values that it has in the first process."""
        if self.world == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            with _together():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=0, group=_group().hosts if whole.device.type == "cpu" else None)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(whole)

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process; the others wait for it and do not call theirs."""
        if self.world == 1:
            return make()
        import torch
        import torch.distributed as dist

        made: list[Any] = [make() if self.first else None]
        with _together():
            dist.broadcast_object_list(made, src=0, group=_group().hosts, device=torch.device("cpu"))
        return cast("T", made[0])

    def gathered(self, value: T) -> list[T]:
        """The ``value`` of every process, by rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(found, value, group=_group().hosts)
        return cast("list[T]", found)


ALONE = Processes()


@dataclass(frozen=True)
class _Group:
    """What the processes share. ``hosts`` is the gloo group; ``store`` outlives a process that fails."""

    processes: Processes
    hosts: Any
    store: Any


_joined: _Group | None = None


def current() -> Processes:
    """The processes that this one has joined; itself alone before ``join``."""
    return ALONE if _joined is None else _joined.processes


def asked() -> int:
    """How many processes torchrun or accelerate started."""
    world, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    return max(int(world), 1) if world.isdecimal() and rank.isdecimal() else 1


def check_alone(command: str) -> None:
    """RecipeError if ``command`` was started in several processes."""
    if asked() > 1:
        raise RecipeError(
            f"{command} runs in one process; it was started in {asked()}",
            "Start only kdcache cofinetune and kdcache distill with torchrun, and the other stages without it.",
        )


def join() -> Processes:
    """Find the other processes, if torchrun or accelerate started several; called again, the same.

    On GPUs, this process uses the one of its LOCAL_RANK from here on. Raises LostProcessError.
    """
    global _joined
    if _joined is None and asked() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings show the stack of a connection that ends
        _joined = _join()
        atexit.register(_leave)
    return current()


def _join() -> _Group:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    on_gpus = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    try:
        store, rank, world = next(rendezvous("env://", timeout=_START))
        if on_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        own = torch.distributed.distributed_c10d.PrefixStore("kdcache-group", store)
        backend = "nccl" if on_gpus else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=_ANSWER)
        hosts = dist.new_group(backend="gloo", timeout=_ANSWER) if on_gpus else dist.group.WORLD
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise LostProcessError(
            f"the {asked()} processes of this training did not find each other at {where}: {first_line(error)}",
            "Start all of them with torchrun, and let the machines reach each other at that address.",
        ) from error
    return _Group(Processes(rank, world), hosts, store)


def start(processes: Processes, inputs: Mapping[str, Any], step: int, weights: Iterable[Tensor]) -> None:
    """Check that all processes have the same ``inputs`` and continue from the same ``step``; give them equal weights.

    Raises MismatchError, naming what differs and the machine.
    """
    if processes.world == 1:
        return
    mine = {"the step to continue from": step, **inputs}
    for rank, (theirs, machine) in enumerate(processes.gathered((mine, socket.gethostname()))):
        for key in dict.fromkeys((*mine, *theirs)):
            if theirs.get(key) != mine.get(key):
                raise MismatchError(
                    f"the processes of this training differ in '{key}': {_short(theirs.get(key))} in process {rank} on "
                    f"'{machine}', {_short(mine.get(key))} in process {processes.rank}",
                    "Give all of them the same recipe, data, cache and versions, and a run directory that they share.",
                )
    processes.copy_from_first(list(weights))


def ending(code: int, *, lost: bool) -> tuple[bool, int]:
    """Whether this process, which fails, says why, and the exit code of all processes. ``close`` follows.

    ``lost``: it only noticed that another one is gone. That one may have a message.
    """
    group = _joined
    if group is None:
        return True, code
    try:
        until = time.monotonic() + _REASON_SECONDS
        while lost and not group.store.check([_FAILED]) and time.monotonic() < until:
            time.sleep(0.02)
        if group.store.add(_FAILED, 1) == 1:
            group.store.set(_CODE, str(code))
            return True, code
        group.store.wait([_CODE], timedelta(seconds=_REASON_SECONDS))
        return False, int(group.store.get(_CODE))
    except RuntimeError:  # the store was in the first process, which ended without waiting for the others
        return not lost or group.processes.rank == 1, code


def close(*, spoke: bool, lost: bool) -> None:
    """Wake the processes that wait for this one.

    The one that ``spoke`` stays until the others have gone, and so does the first, which may hold the store.
    """
    global _joined
    group, _joined = _joined, None
    if group is None:
        return
    atexit.unregister(_leave)  # NCCL would wait for sums that the others never join
    processes, store = group.processes, group.store
    with contextlib.suppress(RuntimeError):
        import torch.distributed as dist

        dist.destroy_process_group(group.hosts)
        del group  # the connections are closed with the last reference
        gone = store.add(_GONE, 1)
        until = time.monotonic() + _FAREWELL_SECONDS
        stays = spoke or processes.first
        while stays and gone < processes.world - lost and time.monotonic() < until:
            time.sleep(0.02)
            gone = store.add(_GONE, 0)


def _leave() -> None:
    import torch.distributed as dist

    with contextlib.suppress(Exception):  # it may be closed already; the process ends either way
        dist.destroy_process_group()


def _group() -> _Group:
    assert _joined is not None, "several processes are joined before they exchange anything"
    return _joined


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Turn errors of the connection into LostProcessError."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = "did not answer in time" if "timed out" in str(error).lower() else "ended without a message"
        raise LostProcessError(
            f"another process of this training {reason}",
            "Was it killed, for lack of memory perhaps, or is its machine gone? The same command continues from the "
            "last checkpoint.",
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one device and dtype, in order, at most ``_BUCKET`` elements together where one has not more."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in kind:
            if bucket and size + tensor.numel() > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.numel()
        yield bucket


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
