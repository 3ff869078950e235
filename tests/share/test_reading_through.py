"""A cache that arrives while it is read.

Order, one fetch per file, interruptions, and several processes at one store.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.selection import Selection, read_local
from kdcache.cache.verify import to_come, verify
from kdcache.errors import MismatchError, RemoteError
from kdcache.share.keys import parse_file_key
from kdcache.share.local_store import LocalStore
from kdcache.share.push import push
from kdcache.share.reading_through import read_through
from kdcache.share.refs import Ref, resolve
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.testing.caches import dump, made_plan
from kdcache.testing.memory_remote import MemoryRemote


class GatedRemote(MemoryRemote):
    """Files are handed out one permission at a time, once ``gated``; keys of what was read, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = False
        self.permits = threading.Semaphore(0)
        self.asked: list[str] = []
        self.broken = False

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        if parse_file_key(key):
            self.asked.append(key.rsplit("/", 1)[1])
            if self.gated:
                self.permits.acquire()
            if self.broken:
                raise RemoteError("the connection is lost", "Look at the cable.")
        return super().read(key, start=start, length=length)


@pytest.fixture
def remote(caches: dict[str, Path]) -> GatedRemote:
    remote = GatedRemote()
    push(remote, caches["two"], "mine")
    return remote


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def read_teacher(cache: Cache, teacher: str, layers: tuple[int, ...]) -> None:
    cache.select(Selection({teacher: layers}))
    for part in cache.parts:
        cache.outputs(teacher, part.name)
        for layer in layers if part.scope == "full" else ():
            cache.hidden(teacher, part.name, layer)


def digests_of(cache: Path, selection: Selection) -> set[str]:
    contents = open_cache(cache).manifest.contents
    return {contents.files[path].sha256 for path in selection.covers(contents)}


def paths_of(cache: Path, digests: list[str]) -> list[str]:
    """One name in the manifest for each digest."""
    names = {digest.sha256: path for path, digest in open_cache(cache).manifest.contents.files.items()}
    return [names[one] for one in digests]


def test_what_is_needed_arrives_once_and_a_second_run_fetches_nothing(
    remote: GatedRemote, store: LocalStore, caches: dict[str, Path]
) -> None:
    ref = resolve(remote, "mine")
    with read_through(remote, ref, store=store) as cache:
        read_teacher(cache, "bert", (2,))
        place = cache.path
    assert max(Counter(remote.asked).values()) == 1
    selection = Selection({"bert": (2,)})
    first = digests_of(caches["two"], selection)
    assert set(remote.asked) == first
    assert read_local(place) is not None and read_local(place).selection == selection  # type: ignore[union-attr]
    assert verify(place) == [] and to_come(place) == []
    remote.asked.clear()
    with read_through(remote, ref, store=store) as cache:
        read_teacher(cache, "bert", (2,))
    assert remote.asked == []
    with read_through(remote, ref, store=store) as cache:
        read_teacher(cache, "roberta", (4,))
    assert set(remote.asked) == digests_of(caches["two"], Selection({"roberta": (4,)})) - first
    assert open_cache(place).hidden("bert", "part-00000", 2) is not None
    assert verify(place) == []


def test_files_come_in_the_order_in_which_they_are_expected_and_a_wanted_one_first(
    remote: GatedRemote, store: LocalStore, caches: dict[str, Path]
) -> None:
    ref, remote.gated = resolve(remote, "mine"), True
    order = [f"teachers/bert/outputs/part-0000{part}.arrow" for part in (1, 0)]
    with pytest.raises(MismatchError, match="no teacher"), read_through(remote, ref, store=store, workers=1) as cache:
        remote.permits.release(4)  # ids and examples, and no more
        cache.locate(cache.text_ids("part-00000"))
        for split in cache.splits:
            cache.examples(split)
        remote.asked.clear()
        cache.select(Selection({"bert": ()}))
        await_asked(remote, 1)
        cache.expect(order)
        wanted = threading.Thread(target=lambda: cache.texts("part-00000"))
        wanted.start()
        await_asked(remote, 2)
        remote.permits.release(30)
        wanted.join()
        await_asked(remote, 4)
        found = paths_of(caches["two"], remote.asked)
        assert found[:4] == ["teachers/bert/tokenizer/tokenizer.json", "text/part-00000.arrow", *order]
        cache.outputs("gpt", "part-00000")


def await_asked(remote: GatedRemote, count: int) -> None:
    while len(remote.asked) < count:
        time.sleep(0.001)


def test_an_interruption_leaves_what_the_next_run_goes_on_with(remote: GatedRemote, store: LocalStore) -> None:
    ref, remote.gated = resolve(remote, "mine"), True
    with (
        pytest.raises(RemoteError, match="the connection is lost") as caught,
        read_through(remote, ref, store=store) as cache,
    ):
        place = cache.path
        remote.permits.release(12)
        cache.select(Selection({"bert": (2, 4)}))
        while len([path for path in place.rglob("*") if path.suffix == ".arrow"]) < 3:
            time.sleep(0.001)
        remote.broken = True
        remote.permits.release(1000)
        read_teacher(cache, "bert", (2, 4))
    assert caught.value.hint.startswith("Look at the cable. Run the same command again")
    assert verify(place) == [] and to_come(place)
    with pytest.raises(MismatchError, match="is not complete") as refused:
        open_cache(place)
    assert f"kdcache cache pull mine@1 --teachers bert --layers 2,4 --to {place}" in refused.value.hint
    arrived = set(remote.asked[:12])
    remote.broken, remote.gated = False, False
    remote.asked.clear()
    with read_through(remote, ref, store=store) as cache:
        read_teacher(cache, "bert", (2, 4))
    assert verify(place) == [] and to_come(place) == []
    assert len(set(remote.asked) & arrived) <= 9, "what had arrived was fetched again"
    open_cache(place)


def test_what_was_damaged_or_removed_in_the_store_is_fetched_again(remote: GatedRemote, store: LocalStore) -> None:
    ref = resolve(remote, "mine")
    with read_through(remote, ref, store=store) as cache:
        read_teacher(cache, "bert", ())
        place = cache.path
    (place / "teachers/bert/outputs/part-00000.arrow").write_bytes(b"short")
    (place / "texts/part-00000.arrow").unlink()
    with read_through(remote, ref, store=store) as cache:
        read_teacher(cache, "bert", ())
        cache.text_ids("part-00000")
    assert verify(place) == []


def read_in_a_process(url: str, root: str, ready: object, number: int) -> None:
    remote = LoggingRemote(Path(url), Path(root) / f"log-{number}")
    ready.wait()  # type: ignore[attr-defined]
    with read_through(remote, resolve(remote, "mine"), store=LocalStore(Path(root) / "store")) as cache:
        read_teacher(cache, "bert", (2, 4))
        read_teacher(cache, "roberta", (4,) if number % 2 else ())


class LoggingRemote(DirectoryRemote):
    """Writes down which files are read."""

    def __init__(self, root: Path, log: Path) -> None:
        super().__init__(root)
        self._log = log

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        with self._log.open("a") as file:
            file.write(key + "\n")
        return super().read(key, start=start, length=length)


def test_processes_that_read_the_same_cache_at_once_fetch_each_file_once(
    tmp_path: Path, caches: dict[str, Path]
) -> None:
    (tmp_path / "remote").mkdir()
    push(DirectoryRemote(tmp_path / "remote"), caches["two"], "mine")
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)
    arguments = [(str(tmp_path / "remote"), str(tmp_path), ready, number) for number in range(3)]
    processes = [context.Process(target=read_in_a_process, args=one) for one in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    keys = [key for log in tmp_path.glob("log-*") for key in log.read_text().split() if parse_file_key(key)]
    assert len(keys) == len(set(keys)) > 20
    place = next((tmp_path / "store/caches").iterdir())
    assert verify(place) == [] and to_come(place) == []
    assert open_cache(place).local.selection == Selection({"bert": (2, 4), "roberta": (4,)})  # type: ignore[union-attr]


def pushed(remote: MemoryRemote, root: Path, name: str, train: int, teachers: tuple[str, ...] = ("bert",)) -> Ref:
    dump(root / name, made_plan(train, 2, teachers))
    push(remote, root / name, name)
    return resolve(remote, name)


def fill(remote: MemoryRemote, ref: Ref, store: LocalStore) -> Path:
    with read_through(remote, ref, store=store) as cache:
        cache.select(Selection())
        return cache.path


def test_versions_share_their_files(remote: GatedRemote, store: LocalStore, caches: dict[str, Path]) -> None:
    push(remote, caches["one"], "first")
    first = fill(remote, resolve(remote, "first"), store)
    one = store.used_bytes()
    remote.asked.clear()
    second = fill(remote, resolve(remote, "mine"), store)
    assert set(remote.asked) == digests_of(caches["two"], Selection()) - digests_of(caches["one"], Selection())
    shared = "teachers/bert/outputs/part-00000.arrow"
    assert (first / shared).samefile(second / shared)
    manifests = sum(path.stat().st_size for path in (second / "manifest.json", first / "manifest.json"))
    roberta = sum(path.stat().st_size for path in (second / "teachers/roberta").rglob("*") if path.is_file())
    assert store.used_bytes() <= one + roberta + manifests
    assert store.remove(first.name)
    assert verify(second) == []


def test_room_is_made_by_whole_caches_the_least_recently_used_first(remote: GatedRemote, tmp_path: Path) -> None:
    import os

    refs = [pushed(remote, tmp_path, name, 4 + index) for index, name in enumerate(("a", "b", "c"))]
    store = LocalStore(tmp_path / "store")
    places = [fill(remote, ref, store) for ref in refs[:2]]
    for age, ref in zip((50, 90), refs, strict=False):
        os.utime(store.root / "locks" / ref.identity, (1e9 - age, 1e9 - age))
    tight = LocalStore(store.root, store.used_bytes() + 4000)
    third = fill(remote, refs[2], tight)
    assert [place.exists() for place in (*places, third)] == [True, False, True], "b was used before a"
    with (
        tight.use(refs[0].identity),
        tight.use(refs[2].identity),
        pytest.raises(Exception, match="is limited to") as caught,
    ):
        fill(remote, refs[1], tight)
    assert "KDCACHE_STORE_BYTES" in caught.value.hint  # type: ignore[attr-defined]
    assert verify(places[0]) == [] and verify(third) == []
    assert fill(remote, refs[1], tight).exists()
    assert tight.used_bytes() <= tight.limit


def test_a_file_system_without_hard_links(
    remote: GatedRemote, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    place = fill(remote, resolve(remote, "mine"), store)
    assert verify(place) == [] and not (store.root / "objects").exists()
