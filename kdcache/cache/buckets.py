"""Finds many ids among many others in bounded memory: both sides are divided by the first bits of their ids.

A search in memory needs 24 bytes of a row of one side. Here each side goes into a file, divided into buckets, and the
buckets are joined in memory, two at a time. The files have no names: they lie in ``directory`` and are gone when they
are closed, also where the process is killed.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from kdcache.cache.ids import ID_BYTES, Take, gather_ids, match

LARGE = 2_000_000  # rows above which ids are searched through buckets, and what was found is kept
_ROWS = 1 << 20  # of a bucket, at most on average: 125 MB while it is joined
_MOST_BITS = 10
_THREADS = 2  # one for each side, then one for each bucket that is joined

Blocks = Iterable[tuple[np.ndarray, np.ndarray]]  # ids uint8 [m, 16] and a value of each, int64 [m], at most a few MB


class NoRoomError(Exception):
    """A temporary file cannot be written or read."""


def numbered(blocks: Iterable[np.ndarray]) -> Blocks:
    """Ids with their numbers, from 0."""
    first = 0
    for ids in blocks:
        yield ids, np.arange(first, first + len(ids))
        first += len(ids)


def match_in_buckets(known: Blocks, query: Blocks, rows: int, directory: Path, take: Take) -> None:
    """``take`` gets values of ``query`` and the value of the first row of ``known`` that has the id of each.

    It is called several times and from two threads; each row of ``query`` comes once, a row without an id in ``known``
    never.

    Args:
        known: the ids that are searched, block by block; read in a thread of its own.
        query: the ids that are looked for, block by block; read in another one.
        rows: of the larger side, about; the number of buckets depends on it.
        directory: for the files, 24 bytes of a row of both sides.
        take: gets two arrays int64 [m].

    Raises:
        NoRoomError: ``directory`` takes no files, or no more.
    """
    bits = min(max(0, (rows // _ROWS).bit_length()), _MOST_BITS)
    stop = threading.Event()  # at an error in the other thread, and where the user interrupts

    def divide(buckets: _Buckets, blocks: Blocks) -> None:
        try:
            for ids, values in blocks:
                if stop.is_set():
                    break
                buckets.add(ids, values)
        except BaseException:
            stop.set()
            raise

    def join(number: int) -> None:
        if not stop.is_set():
            _match_bucket(first.read(number), second.read(number), take)

    with (
        _Buckets(directory, bits) as first,
        _Buckets(directory, bits) as second,
        ThreadPoolExecutor(_THREADS, "kdcache-buckets") as pool,
    ):
        try:
            list(pool.map(divide, (first, second), (known, query)))
            list(pool.map(join, range(1 << bits)))
        finally:
            stop.set()


def _match_bucket(known: tuple[np.ndarray, np.ndarray], query: tuple[np.ndarray, np.ndarray], take: Take) -> None:
    (ids, values), (sought, asked) = known, query
    rows = np.full(len(sought), -1, np.int32)  # of ``known``

    def note(mine: np.ndarray, found: np.ndarray) -> None:
        rows[mine] = found

    match(ids, [sought], note)
    there = rows >= 0
    take(asked[there], values[rows[there]])  # in the order of the queries, so that writes walk through memory


class _Buckets:
    """Ids and values in a file without a name; the rows of a bucket keep their order."""

    def __init__(self, directory: Path, bits: int) -> None:
        self._bits = bits
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise NoRoomError(str(error)) from error
        self._end = 0
        self._blocks: list[tuple[int, np.ndarray]] = []  # position in the file, and where each bucket begins

    def __enter__(self) -> _Buckets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, ids: np.ndarray, values: np.ndarray) -> None:
        number = (ids[:, 0].astype(np.uint16) << np.uint16(8) | ids[:, 1]) >> np.uint16(16 - self._bits)
        order = np.argsort(number, kind="stable")  # by digits
        counts = np.bincount(number, minlength=1 << self._bits)
        self._blocks.append((self._end, np.concatenate([[0], np.cumsum(counts)])))
        self._write(gather_ids(ids, order))
        self._write(values.astype(np.int64, copy=False)[order])

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint8 [m, 16] and values int64 [m] of a bucket."""
        edges = [(at, int(starts[-1]), int(starts[number]), int(starts[number + 1])) for at, starts in self._blocks]
        rows = sum(end - start for _, _, start, end in edges)
        ids, values, place = np.empty((rows, ID_BYTES), np.uint8), np.empty(rows, np.int64), 0
        for at, length, start, end in edges:
            upto = place + end - start
            self._read(ids[place:upto], at + ID_BYTES * start)
            self._read(values[place:upto], at + ID_BYTES * length + 8 * start)
            place = upto
        return ids, values

    def _write(self, array: np.ndarray) -> None:
        view = array.reshape(-1).view(np.uint8).data
        while len(view):
            try:
                count = self._file.write(view) or 0
            except OSError as error:
                raise NoRoomError(str(error)) from error
            self._end, view = self._end + count, view[count:]

    def _read(self, array: np.ndarray, position: int) -> None:
        view = array.reshape(-1).view(np.uint8).data
        while len(view):
            try:
                count = os.preadv(self._file.fileno(), [view], position)
            except OSError as error:
                raise NoRoomError(str(error)) from error
            if not count:
                raise NoRoomError("a temporary file ends too early")
            position, view = position + count, view[count:]
