"""What a push holds in memory does not grow with the cache, its files or the number of workers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kdcache.files import FileDigest
from kdcache.share.parallel import for_each
from kdcache.share.stores.object_store import IN_FLIGHT, MOST_PARTS, PART, ByteBudget, open_object_store
from kdcache.share.transfer import SMALL, file_digest, send_file

MIB = 1 << 20


class Uploads:
    """In place of obstore's ``put``.

    How many bytes it would hold, as its documentation says: parts on their way, and one being read.
    """

    def __init__(self) -> None:
        self.now = self.peak = self.together = self.count = 0
        self.expected = 0  # bytes that are to be held at once: uploads wait for each other until they were
        self._changed, self._under_way = threading.Condition(), 0

    def put(self, _store: object, _key: str, source: Path | bytes, **options: Any) -> None:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if options["use_multipart"]:
            assert -(-size // options["chunk_size"]) <= MOST_PARTS + 1
            size = min(size, options["chunk_size"] * (options["max_concurrency"] + 1))
        self._add(size, 1)
        with self._changed:  # a busy machine needs time to bring the others here; few uploads may never be enough
            self._changed.wait_for(
                lambda: self.peak >= self.expected and self.together > 1, 1.0 if self.expected else 0.002
            )
        self._add(-size, -1)

    def _add(self, size: int, count: int) -> None:
        with self._changed:
            self.now += size
            self._under_way += count
            self.count += count > 0
            self.peak, self.together = max(self.peak, self.now), max(self.together, self._under_way)
            self._changed.notify_all()


def sparse(path: Path, size: int) -> Path:
    """A file of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Uploads:
    found = Uploads()
    monkeypatch.setattr("kdcache.share.stores.object_store.obstore", lambda: found)
    return found


@pytest.mark.parametrize("workers", [8, 32])
@pytest.mark.parametrize(
    "sizes", [[200 * MIB] * 12, [16 * MIB] * 40, [PART, PART + 1, 100, SMALL, 3 * PART, 900 * MIB] * 8]
)
def test_uploads_stay_within_their_bytes(tmp_path: Path, uploads: Uploads, sizes: list[int], workers: int) -> None:
    remote = open_object_store("gs://team/kdcache", {"GOOGLE_SKIP_SIGNATURE": "true"})
    files = [sparse(tmp_path / str(number), size) for number, size in enumerate(sizes)]
    uploads.expected = IN_FLIGHT // 2
    for_each(enumerate(files), lambda item, _: remote.write(f"files/{item[0]}", item[1]), workers)
    assert uploads.count == len(sizes) and uploads.now == 0
    assert IN_FLIGHT // 2 <= uploads.peak <= IN_FLIGHT and uploads.together > 1


def test_a_file_of_a_terabyte_has_few_enough_parts_and_goes_alone(tmp_path: Path, uploads: Uploads) -> None:
    remote = open_object_store("gs://team/kdcache", {"GOOGLE_SKIP_SIGNATURE": "true"})
    files = [sparse(tmp_path / str(number), size) for number, size in enumerate([1 << 40, 16 * MIB, 1 << 40, 16 * MIB])]
    for_each(files, lambda path, _: remote.write(f"files/{path.name}", path), 4)
    assert uploads.peak <= 2 * ((1 << 40) // MOST_PARTS + 1)


def test_what_waits_for_its_turn_is_small(tmp_path: Path, uploads: Uploads) -> None:
    """A worker that holds the bytes of a file and waits for room adds to what is in flight.

    Only small files are read before.
    """
    assert 8 * SMALL <= IN_FLIGHT // 8
    remote = open_object_store("gs://team/kdcache", {"GOOGLE_SKIP_SIGNATURE": "true"})
    path = sparse(tmp_path / "file", SMALL + 1)
    kinds: list[type] = []
    put = uploads.put
    uploads.put = lambda *given, **options: (kinds.append(type(given[2])), put(*given, **options))[1]  # type: ignore[method-assign,assignment,misc]
    send_file(remote, path, file_digest(path))
    (tmp_path / "small").write_bytes(b"x")
    send_file(remote, tmp_path / "small", FileDigest(1, file_digest(tmp_path / "small").sha256))
    assert [kind is bytes for kind in kinds] == [False, True]


def test_a_large_one_is_not_passed_for_ever() -> None:
    budget, order = ByteBudget(10), list[str]()

    def large() -> None:
        with budget.hold(10):
            order.append("large")

    def small() -> None:
        with budget.hold(1):
            order.append("small")

    threads = [threading.Thread(target=large, daemon=True)]
    with budget.hold(5):
        threads[0].start()
        while not budget._turn.locked():
            time.sleep(0.001)  # until it waits for the five
        threads += [threading.Thread(target=small, daemon=True) for _ in range(3)]
        for thread in threads[1:]:
            thread.start()
        time.sleep(0.02)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["large", "small", "small", "small"]
