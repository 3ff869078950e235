"""A remote that fails at random.

Every push and pull ends complete and verified, or says why and leaves nothing half.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from kdcache.cache.verify import verify
from kdcache.errors import DamageError, MismatchError, RemoteError
from kdcache.share.gc import GRACE, collect
from kdcache.share.pull import pull
from kdcache.share.push import push
from kdcache.share.refs import history
from kdcache.share.transfer import fetch_file
from kdcache.testing.faulty_remote import Faults, FaultyRemote
from kdcache.testing.memory_remote import MemoryRemote
from tests.share.worlds import World, broken_refs

T = TypeVar("T")


def again_and_again(work: Callable[[], T], check: Callable[[], None]) -> tuple[T, int]:
    """The result of ``work``, run until it does not fail, and how often it failed.

    ``check`` must hold after each failure.
    """
    for failures in range(200):
        try:
            return work(), failures
        except RemoteError as error:
            assert "on purpose" in error.message
            check()
    raise AssertionError("it never ends")


def share_and_collect(caches: dict[str, Path], target: Path, remote: FaultyRemote, world: World, workers: int) -> int:
    """Push, grow, pull and collect, each until it is done; how often one of them failed."""

    def whole() -> None:
        assert broken_refs(world.remote) == []

    _, first = again_and_again(lambda: push(remote, caches["one"], "sst2", timing=world.timing, workers=workers), whole)
    report, second = again_and_again(
        lambda: push(remote, caches["two"], "sst2", timing=world.timing, workers=workers), whole
    )
    assert report.reference == "sst2@2"
    _, third = again_and_again(lambda: pull(remote, "sst2", target, workers=workers), whole)
    assert verify(target) == []
    world.seconds += 2 * GRACE
    _, fourth = again_and_again(lambda: collect(remote, delete=True, timing=world.timing), whole)
    whole()
    assert [ref.number for ref in history(world.remote, "sst2")] == [1, 2]
    return first + second + third + fourth


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_push_pull_and_gc_on_a_store_that_fails(caches: dict[str, Path], tmp_path: Path, rate: float) -> None:
    failures = struck = 0
    for seed in range(12):
        world = World()
        remote = FaultyRemote(world.remote, replace(Faults.of_all(rate), delay=0.0), seed=seed)
        failures += share_and_collect(caches, tmp_path / "c", remote, world, workers=1 + seed % 4)
        shutil.rmtree(tmp_path / "c")
        struck += remote.struck.total()
    assert struck > 1000 * rate
    assert failures > 100 * rate


def test_bodies_that_break_off_are_continued_and_not_begun_again(tmp_path: Path) -> None:
    import hashlib

    from kdcache.files import FileDigest
    from kdcache.share.keys import file_key

    data = bytes(range(256)) * 4096
    digest = FileDigest(len(data), hashlib.sha256(data).hexdigest())
    store = MemoryRemote(block=1 << 16)
    store.write(file_key(digest.sha256), data)
    remote = FaultyRemote(store, Faults(truncated=0.7), seed=5)
    for number in range(10):
        fetch_file(remote, digest, tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == data
    assert remote.struck["truncated"] > 10
    assert remote.down["read"] == 10 * len(data)


def test_an_object_that_is_too_short_or_too_long_is_damage_and_not_a_broken_connection(tmp_path: Path) -> None:
    from kdcache.files import digest_bytes
    from kdcache.share.keys import file_key

    digest = digest_bytes(b"x" * 1000)
    for wrong in (b"", b"x" * 999, b"x" * 1001, b"x" * (3 << 20)):
        remote = MemoryRemote()
        remote.write(file_key(digest.sha256), wrong)
        with pytest.raises(DamageError, match=r"bytes, expected 1000|more than 1000 bytes"):
            fetch_file(remote, digest, tmp_path / "file")
    with pytest.raises(DamageError, match="is missing on memory"):
        fetch_file(MemoryRemote(), digest, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_fork_is_told_and_ends_with_the_next_push(caches: dict[str, Path], tmp_path: Path) -> None:
    """On a store that does not decide creates, two pushes at once.

    Both versions can be had, and neither is taken for the newest.
    """
    store = MemoryRemote(conditional=False)

    class Late(MemoryRemote):
        """Its owner reads the history, and is late to write."""

        def create(self, key: str, data: bytes) -> bool:
            if not any(one.startswith("refs/") for one in self.objects):
                push(store, caches["other"], "sst2")
            return super().create(key, data)

    late = Late(conditional=False)
    late.objects = store.objects
    push(late, caches["one"], "sst2")
    with pytest.raises(MismatchError, match="made twice") as caught:
        pull(store, "sst2", tmp_path / "c")
    for choice in (one.strip("(),;") for one in caught.value.hint.split() if "@" in one):
        pull(store, choice, tmp_path / choice)
        assert verify(tmp_path / choice) == []
    assert broken_refs(store) == []
    assert push(store, caches["two"], "sst2").reference == "sst2@2"
    assert pull(store, "sst2", tmp_path / "c").reference == "sst2@2"
