"""Run work on many items in a few threads: the first error stops the others, and Ctrl-C stops all.

These are daemon threads and no executor, so an interrupted program exits at once instead of waiting for a transfer of
gigabytes. Only the items in progress are in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from kdcache.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 8
_GRACE = 2.0  # seconds that threads get to finish after an error


class Stopped(BaseException):
    """Raised in a worker by ``Stop.check`` when another one failed; never reaches the caller."""


class Stop:
    """Tells workers to stop; long work calls ``check`` between two blocks."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raises ``Stopped`` if another worker failed or the program was interrupted."""
        if self._event.is_set():
            raise Stopped


def for_each(items: Iterable[T], work: Callable[[T, Stop], None], workers: int = WORKERS) -> None:
    """Call ``work(item, stop)`` for all items in ``workers`` threads (1: in this one). Raises the first error."""
    stop = Stop()
    if workers == 1:
        for item in items:
            work(item, stop)
        return
    source, guard = iter(items), threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while True:
                stop.check()
                with guard:
                    item = next(source, _END)
                if item is _END:
                    return
                work(item, stop)
        except Stopped:
            pass
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, daemon=True, name=f"kdcache-{number}") for number in range(workers)]
    for thread in threads:
        thread.start()
    _wait(threads, stop, errors)
    if errors:
        raise errors[0]


def gather(items: Iterable[T], work: Callable[[T], R], workers: int = WORKERS) -> list[R]:
    """The results of ``work`` in the order of ``items``. Raises the first error."""
    results: dict[int, R] = {}

    def run(numbered: tuple[int, T], _: Stop) -> None:
        results[numbered[0]] = work(numbered[1])

    for_each(enumerate(items), run, workers)
    return [results[number] for number in range(len(results))]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class SharedProgress:
    """A ``Progress`` that several threads may call."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._guard = progress, threading.Lock()

    def advance(self, count: int, *, bytes_done: int = 0) -> None:
        with self._guard:
            self._progress.advance(count, bytes_done=bytes_done)


_END: Any = object()


def _wait(threads: list[threading.Thread], stop: Stop, errors: list[BaseException]) -> None:
    """Wait for all threads; after an error or interruption at most ``_GRACE`` seconds."""
    try:
        while not errors and any(thread.is_alive() for thread in threads):
            next(thread for thread in threads if thread.is_alive()).join(0.1)
    finally:
        stop.set()  # no effect if all are done
        for thread in threads:
            thread.join(_GRACE / len(threads))
