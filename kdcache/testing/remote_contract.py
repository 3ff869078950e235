"""The contract of a remote, as a test class that every implementation inherits.

class TestMine(RemoteContract):
    @pytest.fixture
    def remote(self) -> Remote: ...   # empty, and not shared
"""

from __future__ import annotations

import hashlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from kdcache.errors import DamageError, MissingObjectError, RemoteError

if TYPE_CHECKING:
    from kdcache.share.stores.base import Remote

T = TypeVar("T")
LARGE = 40 << 20  # bytes: several parts of a multipart upload
ODD_KEYS = [
    "", ".", "..", "../x", "a/../b", "a/..", "/etc/passwd", "a//b", "a/", "a\\b", "a\0b", "a b", "A", "C:/x",
    "a/.hidden", ".x.tmp",
    "x" * 201, "/".join(["abcdefgh"] * 80), "a\n", "é", "a?b", "a%2fb", "~/a", "a#b",
]  # fmt: skip


def at_once(count: int, action: Callable[[int], T]) -> list[T]:
    """``action(0)`` to ``action(count - 1)`` in as many threads that start together."""
    gate = threading.Barrier(count)

    def run(number: int) -> T:
        gate.wait()
        return action(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def all_bytes(remote: Remote, key: str, **options: int) -> bytes:
    """The blocks of ``read``, joined; asserts that no block is empty or large."""
    blocks = list(remote.read(key, **options))
    assert all(0 < len(block) <= 16 << 20 for block in blocks)
    return b"".join(blocks)


class RemoteContract:
    """Inherit and give the fixture ``remote``."""

    decides = True  # the store has conditional creates
    replaces_in_one_step = True  # a reader of an object that is being replaced sees the old or the new one
    lists_what_can_be_read = True  # not earlier

    @pytest.fixture
    def remote(self) -> Remote:
        raise NotImplementedError(f"{type(self).__name__} must give the fixture 'remote'")

    def test_objects_are_whole_and_replaced(self, remote: Remote, tmp_path: Path) -> None:
        for data in (b"", b"x", bytes(range(256)) * 5000):
            remote.write("files/ab/one", data)
            assert all_bytes(remote, "files/ab/one") == data
            assert remote.read_bytes("files/ab/one", len(data)) == data
            entry = remote.head("files/ab/one")
            assert entry is not None
            assert (entry.key, entry.size) == ("files/ab/one", len(data))
        source = tmp_path / "source"
        source.write_bytes(b"from a file")
        remote.write("files/ab/one", source)
        assert remote.read_bytes("files/ab/one", 99) == b"from a file"
        (tmp_path / "empty").touch()
        remote.write("files/ab/one", tmp_path / "empty")
        assert all_bytes(remote, "files/ab/one") == b""

    def test_ranges(self, remote: Remote) -> None:
        data = random.Random(0).randbytes(3_000_000)
        remote.write("one", data)
        for start, length in [
            (0, 10),
            (5, 1),
            (1_000_000, 1_500_000),
            (2_999_999, 1),
            (7, None),
            (2_999_990, 50),
            (0, 3_000_000),
        ]:
            options = {"start": start} | ({} if length is None else {"length": length})
            assert all_bytes(remote, "one", **options) == data[start : None if length is None else start + length], (
                start,
                length,
            )
        assert all_bytes(remote, "one", length=0) == b""
        assert all_bytes(remote, "one", start=3_000_000) == b""
        assert all_bytes(remote, "one", start=4_000_000, length=5) == b""
        assert all_bytes(remote, "one", length=9_000_000) == data

    def test_what_is_too_large_is_not_read_whole(self, remote: Remote) -> None:
        remote.write("one", bytes(1000))
        with pytest.raises(DamageError, match=r"'one'.*999"):
            remote.read_bytes("one", 999)

    def test_what_is_missing(self, remote: Remote) -> None:
        remote.write("folder/one", b"x")
        for key in ("none", "folder", "folder/none", "none/none"):
            assert remote.head(key) is None
            if key != "folder":
                remote.delete(key)
            reads = (
                lambda key=key: list(remote.read(key)),
                lambda key=key: list(remote.read(key, start=3, length=2)),
                lambda key=key: list(remote.read(key, length=0)),
                lambda key=key: remote.read_bytes(key, 10),
            )
            for read in reads:
                with pytest.raises(MissingObjectError, match=key):
                    read()
        assert list(remote.list("none/")) == []
        assert remote.read_bytes("folder/one", 1) == b"x"

    def test_lists_are_complete_sorted_and_by_prefix(self, remote: Remote) -> None:
        keys = [
            "a-b",
            "a.b",
            "a/b",
            "a/b-c/x",
            "a/b.c",
            "a0",
            "ab/x",
            "b/9",
            "b/10",
            "refs/x/1.json",
            "refs/x/10.json",
            "refs/xy/2.json",
        ]
        for key in random.Random(1).sample(keys, len(keys)):
            remote.write(key, key.encode())
        assert [entry.key for entry in remote.list("")] == sorted(keys)
        assert [entry.size for entry in remote.list("")] == [len(key) for key in sorted(keys)]
        for prefix in (
            "a",
            "a/",
            "a/b",
            "a/b-",
            "refs/x",
            "refs/x/",
            "refs/x/1",
            "refs/x/1.json",
            "b/1",
            "zz",
            "refs/x/1/",
        ):
            assert [entry.key for entry in remote.list(prefix)] == sorted(
                key for key in keys if key.startswith(prefix)
            ), prefix
        assert {entry.key: entry.modified for entry in remote.list("")} == {
            key: self._modified(remote, key) for key in keys
        }

    def test_a_list_shows_every_write_and_delete_that_has_ended(self, remote: Remote) -> None:
        for number in range(20):
            remote.write(f"refs/x/{number:03}", b"x")
            assert len(list(remote.list("refs/x/"))) == number + 1
        for number in range(20):
            remote.delete(f"refs/x/{number:03}")
            assert len(list(remote.list("refs/x/"))) == 19 - number
            assert remote.head(f"refs/x/{number:03}") is None

    def test_one_creator_wins(self, remote: Remote) -> None:
        assert remote.conditional is self.decides
        for attempt in range(3):
            data = [secrets.token_bytes(100) for _ in range(8)]

            def create(number: int, key: str = f"refs/x/{attempt}", data: list[bytes] = data) -> bool:
                return remote.create(key, data[number])

            won = at_once(8, create)
            there = remote.read_bytes(f"refs/x/{attempt}", 100)
            if self.decides:
                assert [mine for mine, made in zip(data, won, strict=True) if made] == [there]
            else:
                assert there in data
                assert any(won)

    def test_a_create_never_replaces_what_has_been_there(self, remote: Remote) -> None:
        assert remote.create("refs/x/1", b"mine")
        assert not remote.create("refs/x/1", b"other")
        assert not remote.create("refs/x/1", b"min")
        assert not remote.create("refs/x/1", b"mine and more")
        assert remote.read_bytes("refs/x/1", 10) == b"mine"
        remote.delete("refs/x/1")
        assert remote.create("refs/x/1", b"other")

    def test_ones_own_lost_answer_is_no_conflict(self, remote: Remote) -> None:
        assert remote.create("refs/x/1", b"mine 4711")
        assert remote.create("refs/x/1", b"mine 4711")

    def test_the_clock_is_that_of_the_objects(self, remote: Remote) -> None:
        before = remote.now()
        remote.write("one", b"x")
        written = self._modified(remote, "one")
        after = remote.now()
        assert before - 1 <= written <= after + 1  # whole seconds, truncated or rounded
        assert after - before < 60
        assert abs(remote.now() - time.time()) < 60  # of the stores that tests run against

    def test_many_threads(self, remote: Remote) -> None:
        def work(number: int) -> None:
            data = random.Random(number).randbytes(20_000 + number)
            for turn in range(3):
                key = f"files/{number:02}/{turn}"
                remote.write(key, data)
                assert all_bytes(remote, key) == data
                assert all_bytes(remote, key, start=100, length=50) == data[100:150]
                assert [entry.key for entry in remote.list(f"files/{number:02}/")][-1] == key
            remote.delete(f"files/{number:02}/0")

        at_once(16, work)
        assert len(list(remote.list("files/"))) == 32

    def test_readers_never_see_half_an_object(self, remote: Remote) -> None:
        versions = [bytes([number]) * (200_000 + number) for number in range(8)]
        writes = [(f"files/{number:02}", data) for number, data in enumerate(versions)]
        if self.replaces_in_one_step:
            remote.write("files/00", versions[0])
            writes += [("files/00", data) for data in versions * 2]
        done = threading.Event()

        def read(_: int) -> int:
            count = 0
            while not done.is_set() or count == 0:
                for entry in remote.list("files/"):
                    try:
                        assert all_bytes(remote, entry.key) in versions
                        count += 1
                    except MissingObjectError:
                        assert not self.lists_what_can_be_read
            return count

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read, number) for number in range(2)]
            try:
                for key, data in writes:
                    remote.write(key, data)
            finally:
                done.set()
            assert all(reader.result() > 0 for reader in readers)
        written = dict(writes)
        assert {
            entry.key: all_bytes(remote, entry.key) for entry in remote.list("files/")
        } == written  # now all can be read

    def test_a_large_file(self, remote: Remote, tmp_path: Path) -> None:
        source = tmp_path / "large"
        digest = hashlib.sha256()
        with source.open("wb") as file:
            for number in range(LARGE >> 20):
                block = random.Random(number).randbytes(1 << 20)
                digest.update(block)
                file.write(block)
        remote.write("files/large", source)
        entry = remote.head("files/large")
        assert entry is not None
        assert entry.size == LARGE
        arrived = hashlib.sha256()
        for block in remote.read("files/large"):
            assert len(block) <= 16 << 20
            arrived.update(block)
        assert arrived.digest() == digest.digest()

    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_odd_keys_are_refused(self, remote: Remote, key: str) -> None:
        calls: Sequence[Callable[[], object]] = (
            lambda: remote.head(key), lambda: list(remote.read(key)), lambda: remote.read_bytes(key, 10),
            lambda: remote.write(key, b"x"),
            lambda: remote.create(key, b"x"), lambda: remote.delete(key),
        )  # fmt: skip
        for call in calls:
            with pytest.raises(RemoteError, match="is no key of a remote"):
                call()
        if key.removesuffix("/") != "a" and key:
            with pytest.raises(RemoteError, match="is no key of a remote"):
                list(remote.list(key))

    def test_it_names_itself(self, remote: Remote) -> None:
        assert remote.url
        assert remote.url in repr(remote) or repr(remote).startswith("<")

    def test_tidying_up_takes_no_object(self, remote: Remote) -> None:
        assert remote.where.startswith(remote.url)
        remote.write("folder/a", b"kept")
        assert remote.remove_leftovers(-60.0) == 0
        remote.remove_empty_folders("folder")
        assert remote.read_bytes("folder/a", 10) == b"kept"

    @staticmethod
    def _modified(remote: Remote, key: str) -> float:
        entry = remote.head(key)
        assert entry is not None
        return entry.modified
