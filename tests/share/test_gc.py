"""gc: deletes what no version reaches and nothing else, and never what a push is about to reuse."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.errors import DamageError, KdcacheError, LockedError, RemoteError
from kdcache.progress import SilentProgress
from kdcache.share import intents, parallel
from kdcache.share import keys as layout
from kdcache.share.gc import GRACE, collect, remove
from kdcache.share.intents import hold
from kdcache.share.pull import pull
from kdcache.share.push import push
from kdcache.share.refs import history, publish, resolve
from kdcache.share.stores.base import Remote
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.testing.faults import Died
from tests.share.worlds import DAY, START, Watched, World, broken_refs, watched

Caches = dict[str, Path]


def objects(world: World, prefix: str = "files/") -> set[str]:
    return {key for key in world.remote.objects if key.startswith(prefix)}


def test_what_versions_reach_stays_and_what_is_old_and_unreached_goes(
    world: World, caches: Caches, tmp_path: Path
) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    first = objects(world)
    push(world.remote, caches["other"], "other", timing=world.timing)
    world.seconds += 30 * DAY
    assert collect(world.remote, delete=True, timing=world.timing).keys == ()
    remove(world.remote, "other")
    assert (
        collect(world.remote, delete=True, timing=world.timing).keys == ()
    )  # dropped a moment ago: somebody may be pulling it
    world.seconds += GRACE + 1
    world.remote.write("readme.txt", b"not ours")
    would = collect(world.remote, timing=world.timing)
    assert not would.deleted
    assert first < objects(world)
    did = collect(world.remote, delete=True, timing=world.timing)
    assert replace(did, deleted=False) == would
    assert objects(world) == first
    assert (did.refs, did.manifests, did.files) == (1, 1, len([key for key in did.keys if key.startswith("files/")]))
    assert "readme.txt" in world.remote.objects
    pull(world.remote, "sst2", tmp_path / "c")
    assert broken_refs(world.remote) == []
    assert collect(world.remote, delete=True, timing=world.timing).keys == ()


def test_the_newest_number_of_a_name_is_never_used_twice(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    remove(world.remote, "sst2")
    for _ in range(3):
        world.seconds += 2 * GRACE
        collect(world.remote, delete=True, timing=world.timing)
    assert objects(world) == objects(world, "manifests/") == set()
    assert [ref.number for ref in history(world.remote, "sst2")] == [2]
    assert push(world.remote, caches["one"], "sst2", timing=world.timing).reference == "sst2@3"
    world.seconds += 2 * GRACE
    collect(world.remote, delete=True, timing=world.timing)
    assert [ref.number for ref in history(world.remote, "sst2")] == [3]  # a tombstone with nothing below goes as well


def test_a_tombstone_stays_until_what_it_drops_is_gone(world: World, caches: Caches) -> None:
    """A gc dies at every request: what was dropped never comes back."""
    for step in itertools.count(1):
        world = World()
        push(world.remote, caches["one"], "sst2", timing=world.timing)
        push(world.remote, caches["two"], "sst2", timing=world.timing)
        remove(world.remote, "sst2@1")
        push(world.remote, caches["other"], "sst2", timing=world.timing)
        world.seconds += 2 * GRACE
        remote, requests = watched(world, die_at=step)
        try:
            collect(remote, delete=True, timing=world.timing, workers=1)
        except Died:
            with pytest.raises(KdcacheError, match=r"was removed|has no version '1'"):
                resolve(world.remote, "sst2@1")
            assert broken_refs(world.remote) == []
            continue
        assert step > len(requests.log) > 15
        return


def test_young_objects_of_a_push_that_died_stay(world: World, caches: Caches) -> None:
    remote, _ = watched(world, die_at=20)
    with pytest.raises(Died):
        push(remote, caches["one"], "sst2", timing=world.timing, workers=1)
    there = objects(world)
    assert there
    with pytest.raises(LockedError, match="a push is in progress"):
        collect(world.remote, delete=True, timing=world.timing)
    world.seconds += 3600
    report = collect(world.remote, delete=True, timing=world.timing)
    assert (report.files, report.young_files) == (0, len(there))
    world.seconds += GRACE
    collect(world.remote, delete=True, timing=world.timing)
    assert world.remote.objects == {}  # the intent of the dead one too


def test_nothing_is_deleted_where_nobody_knows_what_is_reached(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    world.seconds += 2 * GRACE
    whole = dict(world.remote.objects)
    for key in (layout.ref_key("sst2", 1), next(iter(objects(world, "manifests/")))):
        world.remote.objects = dict(whole)
        world.remote.objects[key] = (b"{}", world.seconds)
        before = dict(world.remote.objects)
        with pytest.raises(DamageError, match=key):
            collect(world.remote, delete=True, timing=world.timing)
        assert world.remote.objects == before


def test_a_gc_that_slept_stops(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    remove(world.remote, "sst2")
    world.seconds += 2 * GRACE
    deleted = []

    def hear(method: str, key: str) -> None:
        if method == "delete" and key.startswith("files/"):
            deleted.append(key)
            world.seconds += 3600

    with pytest.raises(RemoteError, match="lost its lease: was the machine suspended"):
        collect(cast("Remote", Watched(world.remote, hear)), delete=True, timing=world.timing, workers=1)
    assert len(deleted) == 1
    assert objects(world, "marks/") == set()


# What follows runs a push and a gc in threads of which one at a time may go on, until its next request. A schedule says
# who.


@dataclass
class Turns:
    """Hands the turn to and fro: at each request the schedule decides whether the other one goes on instead.

    ``switches``: at which requests, counted over both, the turn is handed over; ``sleeps``: seconds that pass at a
    switch.
    """

    world: World
    switches: Sequence[int]
    sleeps: Sequence[float]
    count: int = 0

    def __post_init__(self) -> None:
        self._ready = threading.Condition()
        self._turn = 0
        self._done = [False, False]

    def run(self, works: Sequence[Callable[[Remote, Callable[[float], None]], Any]]) -> list[Any]:
        """The results, or the errors, of both."""
        results: list[Any] = [None, None]

        def actor(me: int) -> None:
            try:
                self._wait(me)
                results[me] = works[me](
                    cast("Remote", Watched(self.world.remote, lambda *_: self._hear(me))), lambda s: self._sleep(me, s)
                )
            except BaseException as error:
                results[me] = error
            finally:
                self._end(me)

        threads = [threading.Thread(target=actor, args=(me,), daemon=True) for me in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "the schedule hangs"
        return results

    def _hear(self, me: int) -> None:
        self.count += 1
        if self.count in self.switches:
            self.world.seconds += self.sleeps[list(self.switches).index(self.count)]
            self._hand_over(me)

    def _sleep(self, me: int, seconds: float) -> None:
        self.world.seconds += seconds
        self._hand_over(me)

    def _hand_over(self, me: int) -> None:
        with self._ready:
            if not self._done[1 - me]:
                self._turn = 1 - me
                self._ready.notify_all()
        self._wait(me)

    def _wait(self, me: int) -> None:
        with self._ready:
            assert self._ready.wait_for(lambda: self._turn == me, 30)

    def _end(self, me: int) -> None:
        with self._ready:
            self._done[me] = True
            self._turn = 1 - me
            self._ready.notify_all()


@pytest.fixture
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread for each of the two, so that a schedule decides all."""
    real = parallel.for_each
    monkeypatch.setattr(parallel, "for_each", lambda items, work, _=1: real(items, work, 1))


def prepared(caches: Caches) -> World:
    """'two' was pushed and removed long ago, so a push of 'one' would reuse old objects that nothing reaches.

    'other' stays.
    """
    world = World()
    push(world.remote, caches["other"], "other", timing=world.timing, workers=1)
    push(world.remote, caches["two"], "sst2", timing=world.timing, workers=1)
    remove(world.remote, "sst2")
    world.seconds += 3 * GRACE
    return world


def interleave(
    start: World, caches: Caches, switches: Sequence[int], sleeps: Sequence[float], first: int
) -> tuple[World, list[Any], int]:
    """Run a push and a gc (``first``: 0 the push begins); both to their ends."""
    world = World(start.seconds)
    world.remote.objects = dict(start.remote.objects)
    turns = Turns(world, switches, sleeps)
    turns._turn = first

    def pushes(remote: Remote, sleep: Callable[[float], None]) -> object:
        return push(remote, caches["one"], "new", timing=replace(world.timing, sleep=sleep), workers=1)

    def collects(remote: Remote, sleep: Callable[[float], None]) -> object:
        return collect(remote, delete=True, timing=replace(world.timing, sleep=sleep), workers=1)

    return world, turns.run([pushes, collects]), turns.count


def check(world: World, results: list[Any], schedule: object) -> None:
    pushed, collected = results
    assert not isinstance(pushed, BaseException), f"{schedule}: {pushed!r}"
    assert not isinstance(collected, BaseException) or isinstance(collected, LockedError | RemoteError), (
        f"{schedule}: {collected!r}"
    )
    assert broken_refs(world.remote) == [], f"{schedule}"
    assert resolve(world.remote, "new").number == 1, f"{schedule}"
    assert not objects(world, "intents/") | objects(world, "marks/"), f"{schedule}"


def check_late_delete(world: World, results: list[Any], schedule: object, caches: Caches) -> None:
    """The one thing that no order of steps excludes.

    A delete that is under way while its gc sleeps until a push has ended.
    """
    assert isinstance(results[1], DamageError), f"{schedule}: {results[1]!r}"
    assert "new@1, which was pushed at the same time, now lacks 'files/" in results[1].message
    broken = broken_refs(world.remote)  # none where the push still lived and took its last look afterwards
    assert len(broken) <= 1, f"{schedule}"
    assert push(world.remote, caches["one"], "new", timing=world.timing).files_sent == len(broken)
    assert broken_refs(world.remote) == []


@pytest.mark.usefixtures("_inline")
@pytest.mark.parametrize("first", [0, 1], ids=["push first", "gc first"])
def test_push_and_gc_interrupting_each_other_at_every_pair_of_requests(caches: Caches, first: int) -> None:
    """Every schedule of one or two switches.

    The one is interrupted at any request, the other runs to any of its own, and so on.
    """
    start = prepared(caches)
    _, results, count = interleave(start, caches, (), (), first)
    stopped = 0
    for switches in [*((one,) for one in range(1, count + 30)), *itertools.combinations(range(1, count + 30), 2)]:
        if len(switches) == 2 and (switches[0] + switches[1]) % 19:
            continue  # a share of the pairs
        world, results, _ = interleave(start, caches, switches, [0.0] * len(switches), first)
        check(world, results, (first, switches))
        stopped += isinstance(results[1], LockedError)
    assert stopped  # the schedules did meet


@pytest.mark.usefixtures("_inline")
@pytest.mark.parametrize("first", [0, 1], ids=["push first", "gc first"])
def test_push_and_gc_suspended_beyond_their_time_to_live(caches: Caches, first: int) -> None:
    """One is suspended at any request for longer than it counts as alive; the other one, or nobody, runs meanwhile."""
    start = prepared(caches)
    _, _, count = interleave(start, caches, (), (), first)
    lapsed = late = 0
    generator = random.Random(first)
    schedules = [((one,), (gap,)) for one in range(1, count + 30) for gap in (100.0, 125.0)[one % 2 :]]
    schedules += [
        (
            tuple(sorted(generator.sample(range(1, count + 40), 3))),
            tuple(generator.choice((0.0, 40.0, 95.0, 130.0)) for _ in range(3)),
        )
        for _ in range(150)
    ]
    for switches, sleeps in schedules:
        world, results, _ = interleave(start, caches, switches, sleeps, first)
        if isinstance(results[1], DamageError):
            check_late_delete(world, results, (first, switches, sleeps), caches)
            late += 1
        else:
            check(world, results, (first, switches, sleeps))
        lapsed += "lost its lease" in str(results[1])
    assert lapsed
    assert late < lapsed / 2


@pytest.mark.usefixtures("_inline")
def test_schedules_find_a_push_that_trusts_what_it_saw_before_it_slept(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedules above can find faults.

    Without epochs, a gc that began during the sleep deletes after the push's last look.
    """
    monkeypatch.setattr(intents.Lease, "holds", lambda *_: True)
    start = prepared(caches)
    _, _, count = interleave(start, caches, (), (), 0)
    pairs = [(switch, switch + more) for more in (14, 12, 10, 16) for switch in range(5, count)]
    assert any(broken_refs(interleave(start, caches, pair, (130.0, 0.0), 0)[0].remote) for pair in pairs)


def test_a_push_that_reuses_old_objects_makes_a_running_gc_wait_or_waits_itself(caches: Caches) -> None:
    start = prepared(caches)
    with hold(start.remote, "intent", start.timing), pytest.raises(LockedError, match="a push is in progress"):
        collect(start.remote, delete=True, timing=start.timing)
    report = push(start.remote, caches["one"], "new", timing=start.timing)
    assert report.files_sent == 1  # the manifest of a cache that was never pushed before
    collect(start.remote, delete=True, timing=start.timing)
    assert broken_refs(start.remote) == []


def test_what_a_killed_writer_left_under_way_in_a_directory_goes_too(caches: Caches, tmp_path: Path) -> None:
    store = DirectoryRemote(tmp_path)
    push(store, caches["one"], "sst2")
    (old, new) = (tmp_path / "files/aa/.x.1.tmp", tmp_path / "files/aa/.x.2.tmp")
    for path, days in ((old, 8), (new, 6)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - days * DAY,) * 2)
    collect(store, delete=True)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_fork_protects_both_its_versions(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    push(world.remote, caches["other"], "other", timing=world.timing)
    other = history(world.remote, "other")[0]
    world.remote._conditional = False
    world.remote.objects.pop(other.key)
    real = history(world.remote, "sst2")[0]
    twin = publish(World().remote, "sst2", other.manifest, other.identity, None)
    from kdcache.share.ref_document import ref_bytes

    world.remote.write(layout.ref_key("sst2", 1, "0" * 16), ref_bytes(replace(twin, made=real.made), "0" * 16))
    world.seconds += 2 * GRACE
    before = objects(world)
    assert collect(world.remote, delete=True, timing=world.timing).files == 0
    assert objects(world) == before


class Told(SilentProgress):
    """What a bar would show."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int, str]] = []
        self.done, self.bytes, self.finished = 0, 0, 0

    def start(self, title: str, total: int, unit: str, *, done: int = 0) -> None:  # noqa: ARG002
        self.tasks.append((title, total, unit))

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
        self.done, self.bytes = self.done + count, self.bytes + bytes_done

    def finish(self) -> None:
        self.finished += 1


def test_the_report_says_what_went_and_what_stayed(world: World, caches: Caches) -> None:
    """Counted by a plain loop over the store before and after; what is not ours is neither counted nor touched."""
    push(world.remote, caches["one"], "kept", timing=world.timing)
    push(world.remote, caches["other"], "dropped", timing=world.timing)
    remove(world.remote, "dropped")
    world.seconds += 2 * GRACE
    world.remote.write(layout.file_key(hashlib.sha256(b"left by a push that died").hexdigest()), b"young")
    world.remote.write(layout.intent_key("0" * 32), b"{}")
    world.remote.objects[layout.intent_key("0" * 32)] = (b"{}", world.seconds - GRACE - 1)
    for foreign in ("files/00-notes", "files/zz-notes", "intents/notes.txt", "manifests/notes"):
        world.remote.objects[foreign] = (b"not ours", START)
    before, told = dict(world.remote.objects), Told()
    report = collect(world.remote, delete=True, timing=world.timing, progress=told)
    gone = {key: len(data) for key, (data, _) in before.items() if key not in world.remote.objects}
    assert (set(report.keys), report.bytes) == (set(gone), sum(gone.values()))
    kinds = [key.partition("/")[0] for key in report.keys]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["refs", "manifests", "files", "intents"]
    assert (report.refs, report.manifests, report.files) == tuple(
        kinds.count(kind) for kind in ("refs", "manifests", "files")
    )
    kept = {digest.sha256: digest.size for digest in read_manifest(caches["one"]).contents.files.values()}
    assert (report.kept_files, report.kept_bytes) == (len(kept), sum(kept.values()))
    assert (report.young_files, report.young_bytes) == (1, len(b"young"))
    assert all(
        key in world.remote.objects
        for key in ("files/00-notes", "files/zz-notes", "intents/notes.txt", "manifests/notes")
    )
    assert (told.tasks, told.done, told.bytes, told.finished) == (
        [("gc", len(gone), "objects")],
        len(gone),
        report.bytes,
        1,
    )


def test_a_tombstone_goes_a_run_after_what_it_dropped_and_not_before_the_grace_period(
    world: World, caches: Caches
) -> None:
    def numbers() -> list[int]:
        return [ref.number for ref in history(world.remote, "sst2")]

    push(world.remote, caches["one"], "sst2", timing=world.timing)
    remove(world.remote, "sst2@1")
    push(world.remote, caches["two"], "sst2", timing=world.timing)
    world.seconds += GRACE
    collect(world.remote, delete=True, timing=world.timing)
    assert numbers() == [1, 2, 3]  # as old as the grace period is not older
    world.seconds += 1
    collect(world.remote, delete=True, timing=world.timing)
    assert numbers() == [2, 3]
    key = next(ref.key for ref in history(world.remote, "sst2") if ref.number == 2)
    world.remote.objects[key] = (world.remote.objects[key][0], world.seconds)
    collect(world.remote, delete=True, timing=world.timing)
    assert numbers() == [2, 3]
    world.seconds += GRACE + 1
    collect(world.remote, delete=True, timing=world.timing)
    assert numbers() == [3]


@pytest.mark.parametrize("pushed", ["one", "two", "other"])
def test_a_delete_that_took_what_was_pushed_while_gc_slept_is_said(caches: Caches, pushed: str) -> None:
    """``one`` shares files with what gc deletes, ``two`` is all of it, with its manifest.

    ``other`` lives, and loses nothing.
    """
    world, slept = prepared(caches), list[str]()
    push_key = layout.manifest_key(hashlib.sha256((caches["two"] / "manifest.json").read_bytes()).hexdigest())
    needed = {digest.sha256 for digest in read_manifest(caches["one"]).contents.files.values()}

    def hear(method: str, key: str) -> None:
        mine = key == push_key if pushed == "two" else layout.parse_file_key(key) in needed
        if method == "delete" and mine and not slept:
            slept.append(key)
            world.seconds += 130
            push(world.remote, caches[pushed], "new", timing=world.timing, workers=1)

    with pytest.raises(KdcacheError) as caught:
        collect(cast("Remote", Watched(world.remote, hear)), delete=True, timing=world.timing, workers=1)
    if pushed == "other":
        assert (
            str(caught.value.message) == f"gc on {world.remote.url} lost its lease: was the machine suspended? "
            "A push may have begun, so gc stops here"
        )
        assert caught.value.hint == "Run it again: it continues."
        assert broken_refs(world.remote) == []
    else:
        assert isinstance(caught.value, DamageError)
        assert caught.value.message == (
            "gc lost its lease during a delete: was the machine suspended? new@1, which was pushed at the same time, "
            f"now lacks '{slept[0]}'"
        )
        assert caught.value.hint == "Push that cache again under the same name: only the missing objects are sent."
        assert len(broken_refs(world.remote)) == 1
        assert push(world.remote, caches[pushed], "new", timing=world.timing).files_sent == 1
    assert len([key for key in slept if key in world.remote.objects]) == (pushed != "other")
    assert broken_refs(world.remote) == []


@pytest.mark.parametrize(
    ("method", "slow"), [("list", "refs/"), ("list", "manifests/"), ("list", "files/"), ("read_bytes", "manifests/")]
)
def test_a_gc_on_a_slow_store_keeps_its_mark_alive(caches: Caches, method: str, slow: str) -> None:
    """Each object takes less than a renewal may wait, all of them take longer than a mark lives."""
    world = prepared(caches)
    for name in caches:
        push(world.remote, caches[name], f"{name}-kept", timing=world.timing)

    class Slow:
        url, conditional = world.remote.url, True

        def list(self, prefix: str) -> Iterator[Any]:
            for entry in world.remote.list(prefix):
                yield entry
                world.seconds += 50.0 * (method == "list" and prefix == slow)

        def read(self, key: str, **options: Any) -> Any:
            return self.read_bytes(key, 1 << 30) if not options else world.remote.read(key, **options)

        def read_bytes(self, key: str, limit: int) -> bytes:
            world.seconds += 50.0 * (method == "read_bytes" and key.startswith(slow))
            return world.remote.read_bytes(key, limit)

        def __getattr__(self, name: str) -> Any:
            return getattr(world.remote, name)

    lapsed = world.seconds
    collect(cast("Remote", Slow()), delete=True, timing=world.timing, workers=1)
    assert world.seconds - lapsed > world.timing.ttl
    assert broken_refs(world.remote) == []


def test_a_dropped_version_that_is_damaged_takes_nothing_from_the_others(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "aaa", timing=world.timing)
    push(world.remote, caches["other"], "zzz", timing=world.timing)
    world.seconds += 2 * GRACE
    world.remote.objects[layout.manifest_key(history(world.remote, "aaa")[0].manifest)] = (b"{}", world.seconds)
    with pytest.raises(DamageError) as caught:
        collect(world.remote, delete=True, timing=world.timing)
    assert caught.value.message.endswith("; the files of aaa@1 are unknown, so nothing is deleted")
    assert caught.value.hint == "Push that cache again, or remove it with: kdcache cache rm aaa@1"
    remove(world.remote, "aaa@1")
    files = read_manifest(caches["other"]).contents.files
    report = collect(world.remote, delete=True, timing=world.timing)
    assert (report.refs, report.kept_files) == (0, len({one.sha256 for one in files.values()}))
    assert broken_refs(world.remote) == []


def test_each_name_keeps_its_own_newest_number(world: World, caches: Caches) -> None:
    for cache in ("one", "two", "other", "one"):
        push(world.remote, caches[cache], "long", timing=world.timing)
    push(world.remote, caches["one"], "short", timing=world.timing)
    remove(world.remote, "short")
    for _ in range(3):
        world.seconds += 2 * GRACE
        collect(world.remote, delete=True, timing=world.timing)
    assert [ref.number for ref in history(world.remote, "short")] == [2]
    assert [ref.number for ref in history(world.remote, "long")] == [1, 2, 3, 4]


def test_one_worker_is_the_calling_thread(caches: Caches) -> None:
    world, threads = prepared(caches), set[int]()
    remote = cast(
        "Remote",
        Watched(world.remote, lambda method, _: threads.add(threading.get_ident()) if method == "delete" else None),
    )
    collect(remote, delete=True, timing=world.timing, workers=1)
    assert threads == {threading.get_ident()}
