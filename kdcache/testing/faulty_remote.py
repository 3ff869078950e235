"""A wrapper of a remote that fails at random or from the n-th request on, and that counts requests.

    FaultyRemote(remote)                                # only counts
    FaultyRemote(remote, Faults(error=0.01), seed=3)    # one request in a hundred fails and has no effect
    FaultyRemote(remote, die_at=17)                     # request 17 and all later ones raise ``Died``

A request is one call of the seam. With several threads, requests are numbered in the order in which they begin. A fault
depends only on the seed and the number of the request, so a run with one thread is repeatable.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kdcache.errors import RemoteError
from kdcache.testing.faults import Died

if TYPE_CHECKING:
    from kdcache.share.stores.base import Entry, Remote

T = TypeVar("T")
_WRITES = ("write", "create", "delete")
_READS = ("read", "read_bytes")


@dataclass(frozen=True)
class Faults:
    """Probability of each fault per request; a request has at most one."""

    error: float = 0.0  # the call fails and has no effect
    timeout: float = 0.0  # the same after ``delay`` seconds
    truncated: float = 0.0  # a body ends early: without or with an error, at random
    slow: float = 0.0  # the call works, after ``delay`` seconds
    lost: float = 0.0  # the call has its effect and fails: its response is lost
    delay: float = 0.002

    @classmethod
    def of_all(cls, rate: float) -> Faults:
        """All kinds of faults equally often, with probability ``rate`` in total."""
        share = rate / 5
        return cls(error=share, timeout=share, truncated=share, slow=share, lost=share)


class FaultyRemote:
    """Counters.

    ``requests`` by method, ``up`` and ``down`` in bytes by method, ``struck`` by kind of fault, ``log`` of "method
    key".
    """

    def __init__(
        self, remote: Remote, faults: Faults | None = None, *, seed: int = 0, die_at: int | None = None
    ) -> None:
        self.remote = remote
        self.requests: Counter[str] = Counter()
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.log: list[str] = []
        self._faults, self._seed, self._die_at = faults or Faults(), seed, die_at
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self.remote.url

    @property
    def where(self) -> str:
        return self.remote.where

    @property
    def filesystem(self) -> str:
        return self.remote.filesystem

    @property
    def conditional(self) -> bool:
        return self.remote.conditional

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._call("list", prefix, lambda _: iter(list(self.remote.list(prefix))))

    def head(self, key: str) -> Entry | None:
        return self._call("head", key, lambda _: self.remote.head(key))

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        return self._call(
            "read", key, lambda cut: self._body(key, self.remote.read(key, start=start, length=length), cut)
        )

    def read_bytes(self, key: str, limit: int) -> bytes:
        def read(cut: random.Random | None) -> bytes:
            data = self.remote.read_bytes(key, limit)
            self._count(self.down, "read_bytes", len(data))
            if cut is not None:
                raise RemoteError(f"'{key}' broke off after {len(data) // 2} bytes (on purpose)")
            return data

        return self._call("read_bytes", key, read)

    def write(self, key: str, source: Path | bytes) -> None:
        def write(_: object) -> None:
            self.remote.write(key, source)
            self._count(self.up, "write", source.stat().st_size if isinstance(source, Path) else len(source))

        self._call("write", key, write)

    def create(self, key: str, data: bytes) -> bool:
        def create(_: object) -> bool:
            self._count(self.up, "create", len(data))
            return self.remote.create(key, data)

        return self._call("create", key, create)

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda _: self.remote.delete(key))

    def now(self) -> float:
        return self._call("now", "", lambda _: self.remote.now())

    def compares_and_swaps(self) -> bool | None:
        return self.remote.compares_and_swaps()

    def remove_leftovers(self, age: float) -> int:
        return self.remote.remove_leftovers(age)

    def remove_empty_folders(self, prefix: str) -> None:
        self.remote.remove_empty_folders(prefix)

    def _call(self, method: str, key: str, action: Callable[[random.Random | None], T]) -> T:
        """Count, die, or fail; ``action`` gets a random generator if its body must end early."""
        with self._lock:
            self.requests[method] += 1
            self.log.append(f"{method} {key}".rstrip())
            number = self.requests.total()
            dice = random.Random(f"{self._seed} {number}")
            fault = self._draw(method, dice)
            self.struck[fault] += 1 if fault else 0
        if self._die_at is not None and number >= self._die_at:
            if number == self._die_at and method in _WRITES and dice.random() < 0.5:
                action(None)  # the call may have had its effect: the process died before the response
            raise Died
        if fault in ("timeout", "slow"):
            time.sleep(self._faults.delay)
        if fault in ("error", "timeout"):
            raise self._failure(fault, method, key)
        done = action(dice if fault == "truncated" else None)
        if fault == "lost":
            raise self._failure(fault, method, key)
        return done

    def _draw(self, method: str, dice: random.Random) -> str:
        """The kind of fault, or empty. Only bodies are truncated, and only responses to writes are lost."""
        at = dice.random()
        for field in fields(Faults):
            if field.name == "delay":
                continue
            at -= getattr(self._faults, field.name)
            if at < 0:
                fits = (field.name != "truncated" or method in _READS) and (field.name != "lost" or method in _WRITES)
                return field.name if fits else "error"
        return ""

    def _body(self, key: str, blocks: Iterator[bytes], cut: random.Random | None) -> Iterator[bytes]:
        for block in blocks:
            if cut is not None and cut.random() < 0.5:
                kept = block[: cut.randrange(len(block))]
                self._count(self.down, "read", len(kept))
                if kept:
                    yield kept
                if cut.random() < 0.5:
                    raise RemoteError(f"'{key}' broke off (on purpose)")
                return
            self._count(self.down, "read", len(block))
            yield block

    def _count(self, counter: Counter[str], method: str, count: int) -> None:
        with self._lock:
            counter[method] += count

    @staticmethod
    def _failure(fault: str, method: str, key: str) -> RemoteError:
        said = {"error": "status 500", "timeout": "no answer in time", "lost": "the connection broke"}[fault]
        return RemoteError(f"cannot {method} '{key}': {said} (on purpose)")
