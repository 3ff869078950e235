"""Threads in the place of the processes of a training, for tests of what they exchange."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdcache.training.processes import Processes

T = TypeVar("T")


class Meeting:
    """Where threads in the place of processes exchange values."""

    def __init__(self, world: int, seconds: float) -> None:
        self.values: list[Any] = [None] * world
        self._barrier = threading.Barrier(world, timeout=seconds)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self._barrier.wait()
        found = list(self.values)
        self._barrier.wait()
        return found


@dataclass(frozen=True)
class Thread(Processes):
    meeting: Meeting | None = None

    def gathered(self, value: T) -> list[T]:
        assert self.meeting is not None
        return self.meeting.exchange(self.rank, value)

    def from_first(self, make: Callable[[], T]) -> T:
        return self.gathered(make() if self.first else None)[0]

    def largest(self, values: Sequence[int]) -> list[int]:
        return np.stack(self.gathered(np.array(values))).max(axis=0).tolist()  # type: ignore[no-any-return]

    def add(self, tensors: Sequence[Tensor]) -> None:
        every = self.gathered([tensor.clone() for tensor in tensors])
        for tensor, *others in zip(tensors, *every, strict=True):
            tensor.copy_(torch.stack(others).sum(dim=0))


def in_threads(world: int, action: Callable[[Processes], Any], seconds: float = 20) -> list[Any]:
    """What ``action`` returns in each of ``world`` threads; one that waits longer than ``seconds`` for others fails."""
    meeting = Meeting(world, seconds)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(action, [Thread(rank, world, meeting) for rank in range(world)]))
