"""Reading through that is killed at random moments, and from a real S3 server."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.cache.reader import open_cache
from kdcache.cache.selection import Selection
from kdcache.cache.verify import to_come, verify
from kdcache.errors import MismatchError
from kdcache.share.keys import parse_file_key
from kdcache.share.local_store import LocalStore
from kdcache.share.push import push
from kdcache.share.reading_through import read_through
from kdcache.share.refs import resolve
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.testing.faulty_remote import FaultyRemote
from kdcache.testing.s3_server import S3Server
from tests.share.test_reading_through import read_teacher


class Deadly(DirectoryRemote):
    """The process is killed from a thread of its own once it asks for its ``at``-th file, and gets no file after that
    one.
    """

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self._left, self._guard = at, threading.Lock()

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        with self._guard:
            self._left -= 1 if parse_file_key(key) else 0
            if self._left == 0:
                threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGKILL)).start()
        if self._left < 0:
            threading.Event().wait()
        return super().read(key, start=start, length=length)


def read_all(remote: str, store: str, dies_at: int | None = None) -> None:
    place = DirectoryRemote(Path(remote)) if dies_at is None else Deadly(Path(remote), dies_at)
    with read_through(place, resolve(place, "mine"), store=LocalStore(Path(store))) as cache:
        cache.select(Selection())


def test_killed_at_random_moments_the_next_run_goes_on(tmp_path: Path, caches: dict[str, Path]) -> None:
    (tmp_path / "remote").mkdir()
    push(DirectoryRemote(tmp_path / "remote"), caches["two"], "mine")
    context, dice, arguments = (
        multiprocessing.get_context("fork"),
        random.Random(5),
        (str(tmp_path / "remote"), str(tmp_path / "store")),
    )
    incomplete = 0
    for _ in range(10):
        process = context.Process(target=read_all, args=(*arguments, dice.randrange(1, 6)))
        process.start()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)  # 0: nothing was missing any more
        for place in (tmp_path / "store/caches").glob("*/manifest.json"):
            assert verify(place.parent) == [], "half a file, or called damage"
            if to_come(place.parent):
                incomplete += 1
                with pytest.raises(MismatchError, match="is not complete"):
                    open_cache(place.parent)
    assert incomplete, "no process died on the way"
    read_all(*arguments)
    place = next((tmp_path / "store/caches").iterdir())
    assert verify(place) == [] and to_come(place) == []
    assert open_cache(place).identity == open_cache(caches["two"]).identity


def test_from_a_real_store(seaweedfs: S3Server, caches: dict[str, Path], tmp_path: Path) -> None:
    remote = FaultyRemote(seaweedfs.open())
    push(remote, caches["two"], "mine")
    store = LocalStore(tmp_path / "store")
    for _ in range(2):
        remote.log.clear()
        with read_through(remote, resolve(remote, "mine"), store=store) as cache:
            read_teacher(cache, "bert", (2,))
            place = cache.path
        fetched = [parse_file_key(line.split()[1]) for line in remote.log if line.startswith("read ")]
        assert len(fetched) == len(set(fetched))
    assert fetched == []
    assert verify(place) == []
    expected = open_cache(caches["two"]).hidden("bert", "part-00000", 2)
    assert (open_cache(place).hidden("bert", "part-00000", 2).values == expected.values).all()
