"""A remote in a dictionary, with a clock that tests control.

remote = MemoryRemote()
remote.advance(3600)          # an hour later, on the store's clock
MemoryRemote(conditional=False)   # a store without conditional creates
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kdcache.errors import DamageError, MissingObjectError
from kdcache.share.stores.base import Entry, check_key, check_prefix

BLOCK = 1 << 20  # bytes of one block of ``read``


class MemoryRemote:
    """``objects``: key -> (bytes, time of the last write); tests may read and change it."""

    def __init__(
        self,
        *,
        conditional: bool = True,
        clock: Callable[[], float] = time.time,
        url: str = "memory://remote",
        block: int = BLOCK,
    ) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self._conditional, self._clock, self._url, self._block = conditional, clock, url, block
        self._ahead = 0.0
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        return self._url

    @property
    def where(self) -> str:
        return self._url

    @property
    def filesystem(self) -> str:
        return ""

    @property
    def conditional(self) -> bool:
        return self._conditional

    def advance(self, seconds: float) -> None:
        """Advance the store's clock."""
        self._ahead += seconds

    def now(self) -> float:
        return self._clock() + self._ahead

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        with self._lock:
            found = sorted((key, len(data), at) for key, (data, at) in self.objects.items() if key.startswith(prefix))
        return (Entry(*one) for one in found)

    def head(self, key: str) -> Entry | None:
        check_key(key)
        with self._lock:
            found = self.objects.get(key)
        return Entry(key, len(found[0]), found[1]) if found else None

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        data = self._data(key)
        end = len(data) if length is None else min(start + length, len(data))
        return (data[at : min(at + self._block, end)] for at in range(start, end, self._block))

    def read_bytes(self, key: str, limit: int) -> bytes:
        data = self._data(key)
        if len(data) > limit:
            raise DamageError(f"'{key}' on {self.url} has {len(data)} bytes, more than the {limit} it may have")
        return data

    def write(self, key: str, source: Path | bytes) -> None:
        check_key(key)
        data = source.read_bytes() if isinstance(source, Path) else bytes(source)
        with self._lock:
            self.objects[key] = (data, self.now())

    def create(self, key: str, data: bytes) -> bool:
        check_key(key)
        if self._conditional:
            with self._lock:
                return self._create(key, data)
        return self._create(key, data)

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self.objects.pop(key, None)

    def compares_and_swaps(self) -> None:
        return None

    def remove_leftovers(self, age: float) -> int:  # noqa: ARG002 - of the protocol
        return 0

    def remove_empty_folders(self, prefix: str) -> None:
        pass

    def _create(self, key: str, data: bytes) -> bool:
        there = self.objects.get(key)
        if there:
            return there[0] == data
        if not self._conditional:
            time.sleep(0.001)  # others see no object meanwhile, as on a store without conditional creates
        self.write(key, data)
        return True

    def _data(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            found = self.objects.get(key)
        if found is None:
            raise MissingObjectError(f"there is no '{key}' on {self.url}")
        return found[0]
