"""Read-ahead: a few threads decode parts, one more puts batches together, the consumer takes them from a queue.

The result does not depend on thread scheduling: one thread at a time makes the batches, in order. An error in a thread
is raised unchanged in the consumer. When the consumer stops, for whatever reason, the threads end.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from kdcache.cores import usable_cores
from kdcache.loading.order import blocks

READERS = 2  # threads that put decoded parts together
MOST_LAYER_READERS = (
    8  # threads that read, check and decode layers: one decodes about 1.2 GB/s, sha256 taking most of it
)
READ_AHEAD = 2  # parts beyond those that the current batch needs
BUNDLES_AHEAD = 2
BUNDLE_BYTES, BUNDLE_STEPS = 2 << 20, 8  # at most per queue item: passing one costs as much as a small batch
STEPS_TOGETHER = 32  # steps whose rows are looked up at once
DECIDED_EVERY = 16  # items after which it is decided where the next ones are made
_TRIED, _WORKS = 2.0, 0.5  # time of the consumer relative to making: up to which its own thread is tried, and enough

T = TypeVar("T")


class Sized(Protocol):
    """An object that counts towards a bound on memory."""

    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=Sized)


class PartCache(Generic[S]):
    """An LRU cache of decoded parts, bounded by ``limit`` bytes, kept between epochs. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
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
            while self._bytes > self.limit and self._parts:
                self._bytes -= self._parts.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class PartLifetimes:
    """First and last step that need each part of an epoch; ``order`` lists the parts by first use."""

    order: tuple[int, ...]
    first: Mapping[int, int]
    last: Mapping[int, int]

    @classmethod
    def of(cls, parts: np.ndarray, steps: np.ndarray) -> PartLifetimes:
        """From the part and the step of every row of an epoch; steps ascend."""
        first, last = np.full(int(parts.max(initial=-1)) + 1, -1), np.empty(int(parts.max(initial=-1)) + 1, np.int64)
        for some in blocks(len(parts)):
            last[parts[some]] = steps[some]  # for repeated indices numpy keeps the last value
            new = np.flatnonzero(first[parts[some]] < 0)[::-1]
            first[parts[some][new]] = steps[some][new]
        numbers = np.flatnonzero(first >= 0)
        order = numbers[np.argsort(first[numbers], kind="stable")].tolist()
        return cls(
            tuple(order),
            dict(zip(order, first[order].tolist(), strict=True)),
            dict(zip(order, last[order].tolist(), strict=True)),
        )


def layer_readers() -> int:
    """How many threads read layers: one per core that this process may use, within bounds."""
    return min(max(usable_cores(), READERS), MOST_LAYER_READERS)


class PartWindow(Generic[S]):
    """The decoded parts that the current steps of an epoch need; one thread uses it, ``READERS`` others decode."""

    def __init__(self, decode: Callable[[int], S], part_cache: PartCache[S], lifetimes: PartLifetimes) -> None:
        self._decode = decode
        self._part_cache = part_cache
        self._lifetimes = lifetimes
        self._next = 0  # into lifetimes.order
        self._reading: dict[int, Future[S]] = {}
        self._decoded: dict[int, S] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kdcache-read")

    def parts(self, steps: range, needed: Sequence[int]) -> list[S]:
        """The decoded parts of ``needed`` in ``steps``, which must not go backwards."""
        for part in [part for part in self._decoded if self._lifetimes.last[part] < steps[0]]:
            del self._decoded[part]
        self._read_ahead(steps[-1])
        for part in self._reading.keys() & set(needed):
            self._decoded[part] = self._reading.pop(part).result()
        return [self._decoded[part] for part in needed]

    def close(self) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, step: int) -> None:
        order, first = self._lifetimes.order, self._lifetimes.first
        while self._next < len(order):
            beyond = sum(first[part] > step for part in (*self._decoded, *self._reading))
            if first[order[self._next]] > step and beyond >= READ_AHEAD:
                return
            self._start(order[self._next])
            self._next += 1

    def _start(self, index: int) -> None:
        kept = self._part_cache.get(index)
        if kept is None:
            self._reading[index] = self._readers.submit(self._read, index)
        else:
            self._decoded[index] = kept

    def _read(self, index: int) -> S:
        part = self._decode(index)
        self._part_cache.put(index, part)
        return part


def runs_of_steps(first: int, end: int) -> Iterator[range]:
    """Runs of consecutive steps: 1, 2, 4 ... 32, 32 ...; short at first, so that the first batch comes early."""
    length = 1
    while first < end:
        yield range(first, min(first + length, end))
        first, length = first + length, min(2 * length, STEPS_TOGETHER)


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


def bundled(items: Iterator[S]) -> Iterator[list[S]]:
    """Consecutive items in lists of bounded size; the size of the first item stands for all of its list."""
    for first in items:
        count = min(BUNDLE_STEPS, BUNDLE_BYTES // (first.nbytes + 1) + 1)
        yield [first, *itertools.islice(items, count - 1)]


def in_background(items: Callable[[], Iterator[T]], ahead: int = BUNDLES_AHEAD) -> Generator[T]:
    """Run an iterator in a thread, at most ``ahead`` items ahead of the consumer.

    Errors of the iterator are raised here. Closing this generator (a ``break``, an exception, Ctrl-C) ends the thread
    and closes the iterator before it returns.
    """
    made: queue.SimpleQueue[T | _Failed | _End] = queue.SimpleQueue()  # it needs no lock in Python
    room: queue.SimpleQueue[None] = queue.SimpleQueue()  # one entry for each item that may still be made
    for _ in range(ahead):
        room.put(None)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, made, room, stop), name="kdcache-batches", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            if isinstance(item, _Failed):
                raise item.error
            room.put(None)
            yield item
    finally:
        stop.set()
        room.put(None)
        thread.join()


def where_it_pays(items: Callable[[], Iterator[T]], balance: Balance) -> Generator[T]:
    """Run an iterator in a thread while the consumer works, and in the consumer's own thread while it does not.

    A thread makes the next items while the consumer is busy. A consumer that asks for the next one at once gains
    nothing by that, and waits longer: the two take the interpreter from each other, and what one processor core wrote
    the other has to fetch. Items and their order are the same. Errors and closing are as in ``in_background``.
    ``balance`` decides, and knows in the next epoch what was found in this one.
    """
    iterator = items()
    shared = _Shared(iterator)
    try:
        while not shared.ended:
            shared.paused = False
            if balance.in_thread:
                with contextlib.closing(in_background(lambda: shared)) as made:
                    for item in made:
                        began = perf_counter()
                        yield item
                        shared.paused = not balance.add(perf_counter() - began, shared.took)
            else:
                for item in shared:
                    began = perf_counter()
                    yield item
                    if balance.add(perf_counter() - began, shared.took):
                        break
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


_open: weakref.WeakSet[Generator[Any]] = weakref.WeakSet()


def closed_at_exit(items: Generator[T]) -> Generator[T]:
    """``items``; they are closed when the interpreter ends, before that is too late for their threads."""
    _open.add(items)
    return items


@atexit.register
def _close_open() -> None:
    for items in list(_open):
        with contextlib.suppress(ValueError):  # another thread is in it
            items.close()


class _Shared(Generic[T]):
    """An iterator that two threads use in turns: it seems to end where it is paused."""

    def __init__(self, iterator: Iterator[T]) -> None:
        self._iterator = iterator
        self.paused = self.ended = False
        self.took = 0.0  # seconds for the last item

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self.paused:
            raise StopIteration
        began = perf_counter()
        try:
            item = next(self._iterator)
        except StopIteration:
            self.ended = True
            raise
        self.took = perf_counter() - began
        return item


class Balance:
    """Whether the consumer works long enough with the items for a thread to pay, decided every few items.

    The first items are made in the consumer's own thread, where its work and making are told apart best. While a thread
    makes items, the consumer's time has its waits for the interpreter in it. So the consumer's own thread is tried
    where this time is not much longer than making, and tried less often each time that it was wrong.
    """

    def __init__(self) -> None:
        self.in_thread = False
        self._patience = DECIDED_EVERY // 2  # items that a thread makes until it is judged; doubled when one starts
        self._count, self._working, self._making = 0, 0.0, 0.0

    def add(self, working: float, making: float) -> bool:
        """Take an item into account: the seconds that the consumer and making took. Returns ``in_thread``."""
        self._count, self._working, self._making = self._count + 1, self._working + working, self._making + making
        if self._count >= (self._patience if self.in_thread else DECIDED_EVERY):
            before, limit = self.in_thread, _TRIED if self.in_thread else _WORKS
            self.in_thread = self._working > limit * self._making
            if self.in_thread and not before:
                self._patience *= 2
            self._count, self._working, self._making = 0, 0.0, 0.0
        return self.in_thread


def _produce(
    items: Callable[[], Iterator[T]],
    made: queue.SimpleQueue[T | _Failed | _End],
    room: queue.SimpleQueue[None],
    stop: threading.Event,
) -> None:
    try:
        iterator = items()
        try:
            for item in iterator:
                room.get()
                if stop.is_set():
                    return
                made.put(item)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        made.put(_End())
    except BaseException as error:  # raised again in the consumer
        made.put(_Failed(error))
