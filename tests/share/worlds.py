"""What tests of the protocol share.

A remote whose clock they move, and the question whether what is published is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from kdcache.cache.manifest import parse_manifest
from kdcache.errors import MissingObjectError
from kdcache.files import digest_bytes
from kdcache.share import keys as layout
from kdcache.share.intents import LeaseTiming
from kdcache.share.refs import all_histories, live
from kdcache.share.stores.base import Remote
from kdcache.testing.faults import Died
from kdcache.testing.memory_remote import MemoryRemote

START = 1_800_000_000.0
DAY = 86_400.0


@dataclass
class World:
    """One clock for the store and for all who use it. Sleeping moves it; nothing renews in the background."""

    seconds: float = START
    remote: MemoryRemote = field(init=False)

    def __post_init__(self) -> None:
        self.remote = MemoryRemote(clock=lambda: self.seconds)

    @property
    def timing(self) -> LeaseTiming:
        return LeaseTiming(clock=lambda: self.seconds, sleep=self.sleep, background=False)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class Watched:
    """A remote of which every request is heard first: ``hear(method, key)`` may count, wait or raise."""

    def __init__(self, remote: Remote, hear: Callable[[str, str], None]) -> None:
        self._remote, self._hear = remote, hear

    url = property(lambda self: self._remote.url)
    conditional = property(lambda self: self._remote.conditional)

    def __getattr__(self, method: str) -> Any:
        def request(key: str = "", *arguments: Any, **options: Any) -> Any:
            self._hear(method, key)
            return getattr(self._remote, method)(*([key] if key else []), *arguments, **options)

        return request


@dataclass
class Requests:
    """Counts requests; at number ``die_at`` and at every later one the process is dead."""

    die_at: int | None = None
    log: list[tuple[str, str]] = field(default_factory=list)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, method: str, key: str) -> None:
        with self._guard:
            self.log.append((method, key))
            if self.die_at is not None and len(self.log) >= self.die_at:
                raise Died

    def keys(self, method: str, prefix: str = "") -> list[str]:
        return [key for one, key in self.log if one == method and key.startswith(prefix)]


def watched(world: World, die_at: int | None = None) -> tuple[Remote, Requests]:
    """The world's remote, and what is asked of it."""
    requests = Requests(die_at)
    return cast("Remote", Watched(world.remote, requests)), requests


def broken_refs(remote: Remote) -> list[str]:
    """What is wrong with published versions, looked at without the code under test: empty where each is complete."""

    def there(key: str) -> bytes:
        try:
            return remote.read_bytes(key, 1 << 30)
        except MissingObjectError:
            return b"missing"

    wrong = []
    for name, refs in all_histories(remote).items():
        for ref in live(refs):
            manifest = there(layout.manifest_key(ref.manifest))
            if digest_bytes(manifest).sha256 != ref.manifest:
                wrong.append(f"{name}@{ref.number}: manifest")
                continue
            for path, digest in parse_manifest(manifest, ref.key).contents.files.items():
                if digest_bytes(there(layout.file_key(digest.sha256))) != digest:
                    wrong.append(f"{name}@{ref.number}: {path}")
    return wrong
