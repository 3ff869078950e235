"""What tests of the protocol share: a remote whose clock they move, and the question whether what is published is complete."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from kdcache.cache.files import digest_bytes
from kdcache.cache.manifest import parse_manifest
from kdcache.share import layout
from kdcache.share.intents import Pace
from kdcache.share.refs import all_histories, live
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
    def pace(self) -> Pace:
        return Pace(clock=lambda: self.seconds, sleep=self.sleep, background=False)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def broken_refs(remote: MemoryRemote) -> list[str]:
    """What is wrong with published versions, looked at without the code under test: empty where each is complete."""
    wrong = []
    for name, refs in all_histories(remote).items():
        for ref in live(refs):
            found = remote.objects.get(layout.manifest_key(ref.manifest))
            if found is None or hashlib.sha256(found[0]).hexdigest() != ref.manifest:
                wrong.append(f"{name}@{ref.number}: manifest")
                continue
            for path, digest in parse_manifest(found[0], ref.key).contents.files.items():
                there = remote.objects.get(layout.file_key(digest.sha256))
                if there is None or digest_bytes(there[0]) != digest:
                    wrong.append(f"{name}@{ref.number}: {path}")
    return wrong
