"""Reading ahead: parts are decoded by a few threads, batches are put together by one more, the consumer only takes them.

What comes out does not depend on how the threads are scheduled: one thread makes the batches, in order. An error in any of
them reaches the consumer as it was raised, and when the consumer stops, for whatever reason, the threads end with it.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

READERS = 2  # threads that read and decode parts
READ_AHEAD = 2  # parts beyond those that the current batch needs
BATCHES_AHEAD = 4
STEPS_TOGETHER = 8  # steps whose batches are put together at once

T = TypeVar("T")


class Sized(Protocol):
    """What counts towards the bound on memory."""

    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=Sized)


class Shelf(Generic[S]):
    """Decoded parts kept between epochs, least recently used out first, within ``limit`` bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: OrderedDict[int, S] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, index: int) -> S | None:
        with self._lock:
            if index in self._parts:
                self._parts.move_to_end(index)
            return self._parts.get(index)

    def put(self, index: int, part: S) -> None:
        with self._lock:
            replaced = self._parts.pop(index, None)
            self._bytes += part.nbytes - (0 if replaced is None else replaced.nbytes)
            self._parts[index] = part
            while self._bytes > self._limit and self._parts:
                self._bytes -= self._parts.popitem(last=False)[1].nbytes

    def has_room(self) -> bool:
        return self._bytes < self._limit


@dataclass(frozen=True)
class Timetable:
    """Which parts an epoch needs from which step to which: ``order`` by first use, ``first`` and ``last`` step per part."""

    order: tuple[int, ...]
    first: Mapping[int, int]
    last: Mapping[int, int]

    @classmethod
    def of(cls, parts: np.ndarray, steps: np.ndarray) -> Timetable:
        """From the part and the step of every row of an epoch, steps ascending."""
        numbers, first = np.unique(parts, return_index=True)
        last = len(parts) - 1 - np.unique(parts[::-1], return_index=True)[1]
        return cls(
            tuple(numbers[np.argsort(first)].tolist()),
            dict(zip(numbers.tolist(), steps[first].tolist(), strict=True)),
            dict(zip(numbers.tolist(), steps[last].tolist(), strict=True)),
        )


class PartWindow(Generic[S]):
    """The parts in hand while one epoch is walked through; used by one thread, which lets ``READERS`` others decode."""

    def __init__(self, decode: Callable[[int], S], shelf: Shelf[S], timetable: Timetable) -> None:
        self._decode = decode
        self._shelf = shelf
        self._timetable = timetable
        self._next = 0  # into timetable.order
        self._in_hand: dict[int, Future[S]] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kdcache-read")

    def parts(self, steps: range, needed: Sequence[int]) -> list[S]:
        """The decoded parts of ``needed`` in ``steps``, which must not go backwards."""
        for part in [part for part in self._in_hand if self._timetable.last[part] < steps[0]]:
            del self._in_hand[part]
        self._read_ahead(steps[-1])
        return [self._in_hand[part].result() for part in needed]

    def close(self) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, step: int) -> None:
        order, first = self._timetable.order, self._timetable.first
        while self._next < len(order):
            beyond = sum(first[part] > step for part in self._in_hand)
            if first[order[self._next]] > step and (beyond >= READ_AHEAD or (beyond and not self._shelf.has_room())):
                return
            self._in_hand[order[self._next]] = self._readers.submit(self._read, order[self._next])
            self._next += 1

    def _read(self, index: int) -> S:
        part = self._shelf.get(index)
        if part is None:
            part = self._decode(index)
            self._shelf.put(index, part)
        return part


def runs_of_steps(first: int, end: int) -> Iterator[range]:
    """Runs of consecutive steps, short at first so that the first batch is not kept waiting: 1, 2, 4, 8, 8 ..."""
    length = 1
    while first < end:
        yield range(first, min(first + length, end))
        first, length = first + length, min(2 * length, STEPS_TOGETHER)


class _StoppedError(Exception):
    """The consumer has gone."""


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


def in_background(items: Callable[[], Iterator[T]], ahead: int = BATCHES_AHEAD) -> Iterator[T]:
    """Run an iterator in a thread, at most ``ahead`` items before the consumer.

    What it raises is raised here. Closing this generator (a ``break``, an exception, Ctrl-C) ends the thread and closes
    ``items`` before it returns.
    """
    shelf: queue.Queue[T | _Failed | _End] = queue.Queue(maxsize=ahead)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, shelf, stop), name="kdcache-batches", daemon=True)
    thread.start()
    try:
        while not isinstance(item := shelf.get(), _End):
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            _drain(shelf)
            thread.join(0.01)


def _produce(items: Callable[[], Iterator[T]], shelf: queue.Queue[T | _Failed | _End], stop: threading.Event) -> None:
    def put(item: T | _Failed | _End) -> None:
        while not stop.is_set():
            try:
                return shelf.put(item, timeout=0.1)
            except queue.Full:
                continue
        raise _StoppedError

    try:
        iterator = items()
        try:
            for item in iterator:
                put(item)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        put(_End())
    except _StoppedError:
        return
    except BaseException as error:  # whatever it is belongs to the consumer
        try:
            put(_Failed(error))
        except _StoppedError:
            return


def _drain(shelf: queue.Queue[T]) -> None:
    try:
        while True:
            shelf.get_nowait()
    except queue.Empty:
        return
