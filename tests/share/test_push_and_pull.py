"""Push and pull: what travels, what is refused, and dying at every request and at every step of the disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.cache.selection import Selection, read_local
from kdcache.cache.verify import unreferenced, verify
from kdcache.errors import DamageError, KdcacheError, LockedError, MismatchError
from kdcache.files import use_disk
from kdcache.share import keys as layout
from kdcache.share.intents import hold
from kdcache.share.presence import missing_of
from kdcache.share.pull import pull
from kdcache.share.push import push
from kdcache.share.refs import history
from kdcache.testing.faults import Died, counting_disk, delete, dying_disk, flip_bit, truncate
from tests.share.worlds import World, broken_refs, watched

Caches = dict[str, Path]


def test_what_was_pushed_comes_back_the_same(world: World, caches: Caches, tmp_path: Path) -> None:
    sent = push(world.remote, caches["two"], "sst2", tag="v1", timing=world.timing)
    assert (sent.reference, sent.new_version, sent.files_sent) == ("sst2@1", True, sent.files)
    assert sent.bytes_sent == sum(
        len(data) for key, (data, _) in world.remote.objects.items() if not key.startswith("refs/")
    )
    assert not any(key.startswith("intents/") for key in world.remote.objects)
    report = pull(world.remote, "sst2@v1", tmp_path / "c")
    assert report.selection is None
    assert report.identity == read_manifest(caches["two"]).identity
    assert verify(tmp_path / "c") == []
    assert unreferenced(tmp_path / "c") == []
    assert (tmp_path / "c/manifest.json").read_bytes() == (caches["two"] / "manifest.json").read_bytes()


def test_only_what_is_new_travels(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    remote, requests = watched(world)
    again = push(remote, caches["one"], "sst2", timing=world.timing)
    assert (again.reference, again.new_version, again.files_sent, again.bytes_sent) == ("sst2@1", False, 0, 0)
    assert push(remote, caches["one"], "sst2-copy", timing=world.timing).bytes_sent == 0
    requests.log.clear()
    more = push(remote, caches["two"], "sst2", timing=world.timing)
    assert more.reference == "sst2@2"
    news = {
        digest.sha256 for path, digest in read_manifest(caches["two"]).contents.files.items() if "/roberta/" in path
    }
    old = {digest.sha256 for digest in read_manifest(caches["one"]).contents.files.values()}
    assert {layout.parse_file_key(key) for key in requests.keys("write", "files/")} == news - old
    assert more.bytes_sent < again.bytes * 1.6


def test_a_dry_run_says_what_would_travel_and_writes_nothing(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    before = dict(world.remote.objects)
    would = push(world.remote, caches["two"], "sst2", dry_run=True, timing=world.timing)
    assert world.remote.objects == before
    did = push(world.remote, caches["two"], "sst2", timing=world.timing)
    assert (would.reference, would.files_sent, would.bytes_sent) == (did.reference, did.files_sent, did.bytes_sent)


@pytest.mark.parametrize("damage", [flip_bit, truncate, delete])
def test_a_damaged_local_file_is_never_published(world: World, caches: Caches, tmp_path: Path, damage: object) -> None:
    shutil.copytree(caches["one"], tmp_path / "c")
    damage(tmp_path / "c/teachers/bert/outputs/part-00000.arrow")  # type: ignore[operator]
    with pytest.raises(DamageError, match=r"teachers/bert/outputs/part-00000\.arrow"):
        push(world.remote, tmp_path / "c", "sst2", timing=world.timing)
    assert not any(key.startswith(("refs/", "manifests/", "intents/")) for key in world.remote.objects)
    wanted = read_manifest(tmp_path / "c").contents.files["teachers/bert/outputs/part-00000.arrow"].sha256
    assert layout.file_key(wanted) not in world.remote.objects


def test_without_text_no_text_travels(world: World, caches: Caches, tmp_path: Path) -> None:
    push(world.remote, caches["one"], "sst2", with_text=False, timing=world.timing)
    texts = {
        digest.sha256
        for path, digest in read_manifest(caches["one"]).contents.files.items()
        if path.startswith("text/")
    }
    assert texts.isdisjoint({layout.parse_file_key(key) for key in world.remote.objects})
    pull(world.remote, "sst2", tmp_path / "c")
    assert not open_cache(tmp_path / "c").has_text
    assert verify(tmp_path / "c") == []


def test_a_part_is_pulled_and_completed_by_the_difference(world: World, caches: Caches, tmp_path: Path) -> None:
    push(world.remote, caches["two"], "sst2", timing=world.timing)
    some = Selection({"bert": (4,)}, text=False)
    remote, requests = watched(world)
    report = pull(remote, "sst2", tmp_path / "c", some)
    assert report.selection == some == read_local(tmp_path / "c").selection
    contents = read_manifest(caches["two"]).contents
    assert {layout.parse_file_key(key) for key in requests.keys("read")} == {
        contents.files[path].sha256 for path in some.covers(contents)
    }
    assert verify(tmp_path / "c") == []
    first = set(requests.keys("read"))
    requests.log.clear()
    pull(remote, "sst2", tmp_path / "c", Selection({"roberta": ()}, text=False))
    assert read_local(tmp_path / "c").selection == Selection({"bert": (4,), "roberta": ()}, text=False)
    assert first.isdisjoint(requests.keys("read"))
    whole = pull(remote, "sst2", tmp_path / "c")
    assert whole.selection is None is read_local(tmp_path / "c")
    assert len(requests.keys("read")) + len(first) == len({digest.sha256 for digest in contents.files.values()})
    assert verify(tmp_path / "c") == []


def test_a_part_can_be_pushed_where_the_rest_is(world: World, caches: Caches, tmp_path: Path) -> None:
    push(world.remote, caches["two"], "sst2", timing=world.timing)
    pull(world.remote, "sst2", tmp_path / "c", Selection({"bert": ()}))
    assert push(world.remote, tmp_path / "c", "sst2-again", timing=world.timing).bytes_sent == 0
    elsewhere = World()
    with pytest.raises(MismatchError, match=r"only a part of this cache was pulled: \d+ other files are not on"):
        push(elsewhere.remote, tmp_path / "c", "sst2", timing=elsewhere.timing)
    assert elsewhere.remote.objects == {}


def test_a_pull_repairs_what_is_damaged_and_keeps_what_is_whole(world: World, caches: Caches, tmp_path: Path) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    pull(world.remote, "sst2", tmp_path / "c")
    flip_bit(tmp_path / "c/text/part-00000.arrow")
    delete(tmp_path / "c/texts/part-00000.arrow")
    assert pull(world.remote, "sst2", tmp_path / "c").files_fetched == 2
    assert verify(tmp_path / "c") == []


def test_directories_of_something_else_are_refused_untouched(world: World, caches: Caches, tmp_path: Path) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    push(world.remote, caches["two"], "sst2", timing=world.timing)
    pull(world.remote, "sst2@1", tmp_path / "cache")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    remote, _ = watched(world, die_at=9)
    with pytest.raises(Died):
        pull(remote, "sst2@1", tmp_path / "begun", workers=1)
    for name, match in {
        "cache": "holds another cache",
        "notes": "holds 'todo.txt'",
        "file": "is a file",
        "begun": "holds an unfinished pull of manifest",
    }.items():
        before = sorted(path for path in tmp_path.rglob("*"))
        with pytest.raises(MismatchError, match=match):
            pull(world.remote, "sst2@2", tmp_path / name)
        assert sorted(path for path in tmp_path.rglob("*")) == before
    assert pull(world.remote, "sst2@1", tmp_path / "begun").files_kept > 0


def test_a_link_in_the_target_leads_nowhere(world: World, caches: Caches, tmp_path: Path) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    pull(world.remote, "sst2", tmp_path / "c")
    shutil.move(tmp_path / "c/teachers", tmp_path / "elsewhere")
    (tmp_path / "c/teachers").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamageError, match="is a symbolic link"):
        pull(world.remote, "sst2", tmp_path / "c")


def test_a_push_gives_up_on_a_gc_that_does_not_end(world: World, caches: Caches) -> None:
    with hold(world.remote, "mark", world.timing) as mark:

        def sleep(seconds: float) -> None:
            world.sleep(seconds)
            mark.beat()

        with pytest.raises(LockedError, match="a gc is in progress"):
            push(world.remote, caches["one"], "sst2", timing=replace(world.timing, sleep=sleep))
    assert world.remote.objects == {}


def test_push_dying_at_every_request(caches: Caches) -> None:
    """Readers see the first version or both, whole; the rerun ends, and sends what did not arrive and nothing else."""
    counted = World()
    push(counted.remote, caches["one"], "sst2", timing=counted.timing)
    remote, requests = watched(counted)
    push(remote, caches["two"], "sst2", timing=counted.timing)
    steps, sent = len(requests.log), requests.keys("write", "files/")
    assert steps > 20
    for step in range(1, steps + 1):
        world = World()
        push(world.remote, caches["one"], "sst2", timing=world.timing)
        remote, first = watched(world, die_at=step)
        with pytest.raises(Died):
            push(remote, caches["two"], "sst2", timing=world.timing, workers=1 + step % 3)
        assert broken_refs(world.remote) == []
        arrived = set(first.keys("write", "files/")) & world.remote.objects.keys()
        remote, second = watched(world)
        report = push(remote, caches["two"], "sst2", timing=world.timing)
        assert report.reference == "sst2@2", f"request {step}"
        assert sorted([*second.keys("write", "files/"), *arrived]) == sorted(sent), f"request {step}"
        assert [ref.number for ref in history(world.remote, "sst2")] == [1, 2]
        assert broken_refs(world.remote) == []


def test_pull_dying_at_every_request(caches: Caches, tmp_path: Path) -> None:
    world = World()
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    remote, requests = watched(world)
    total = pull(remote, "sst2", tmp_path / "counted").files_fetched
    for step in range(1, len(requests.log) + 1):
        target = tmp_path / f"died-{step}"
        remote, first = watched(world, die_at=step)
        with pytest.raises(Died):
            pull(remote, "sst2", target, workers=1 + step % 3)
        assert not (target / "manifest.json").exists()
        remote, second = watched(world)
        report = pull(remote, "sst2", target)
        fetched = len(second.keys("read"))
        assert report.files_fetched == fetched
        assert total - fetched >= len(first.keys("read")) - 1 - step % 3
        assert verify(target) == []
        assert unreferenced(target) == []
        shutil.rmtree(target)


@pytest.mark.parametrize("first", [None, Selection({"bert": ()})], ids=["whole", "completing"])
def test_pull_dying_at_every_step_of_the_disk(caches: Caches, tmp_path: Path, first: Selection | None) -> None:
    world = World()
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    start, target = tmp_path / "start", tmp_path / "died"
    if first:
        pull(world.remote, "sst2", start, first)
        shutil.copytree(start, tmp_path / "counted")
    with use_disk(disk := counting_disk()):
        pull(world.remote, "sst2", tmp_path / "counted", workers=1)
    for step in range(1, len(disk.steps) + 1):
        if first:
            shutil.copytree(start, target)
        with use_disk(dying_disk(step)), pytest.raises(Died):
            pull(world.remote, "sst2", target, workers=1)
        if (target / "manifest.json").exists() and step % 3 == 0:
            assert verify(target) == []  # a reader finds what the selection promises, or all
        pull(world.remote, "sst2", target)
        assert read_local(target) is None, f"step {step}"
        assert step % 3 or verify(target) == []
        assert unreferenced(target) == []
        shutil.rmtree(target)


def test_every_object_altered_in_turn_is_found_and_named(caches: Caches, tmp_path: Path) -> None:
    from kdcache.share.refs import resolve
    from kdcache.share.remote_verify import verify_remote

    world = World()
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    whole = dict(world.remote.objects)
    ref = resolve(world.remote, "sst2")
    assert verify_remote(world.remote, ref, share=1.0) == []
    keys = sorted(whole)
    for position, key in enumerate(keys):
        data, at = whole[key]
        middle = len(data) // 2
        other = whole[keys[position - 1]][0]
        for name, altered in {
            "flip": data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :],
            "truncate": data[:-1],
            "lengthen": data + b"x",
            "empty": b"",
            "swap": other,
            "delete": None,
        }.items():
            world.remote.objects = dict(whole)
            world.remote.objects.pop(key)
            if altered is not None:
                world.remote.objects[key] = (altered, at)
            if not key.startswith("refs/"):
                damages = verify_remote(world.remote, ref, share=1.0)
                assert [damage.file for damage in damages] == [key], name
                if name != "flip" and (name, len(other)) != ("swap", len(data)):
                    assert [damage.file for damage in verify_remote(world.remote, ref)] == [key]
            target = tmp_path / f"{position}-{name}"
            with pytest.raises(KdcacheError) as caught:
                pull(world.remote, "sst2", target, workers=2)
            assert caught.value.exit_code == (4 if key.startswith("refs/") and altered is None else 3)
            assert ("sst2" if key.startswith("refs/") and altered is None else key) in caught.value.message
            assert not (target / "manifest.json").exists()
            shutil.rmtree(target, ignore_errors=True)
    world.remote.objects = whole
    pull(world.remote, "sst2", tmp_path / "c")
    assert verify(tmp_path / "c") == []


def test_a_push_repairs_an_object_of_another_size(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    key = next(key for key in world.remote.objects if key.startswith("files/"))
    world.remote.objects[key] = (world.remote.objects[key][0][:-1], world.seconds)
    assert push(world.remote, caches["one"], "sst2", timing=world.timing).files_sent == 1
    assert broken_refs(world.remote) == []


@pytest.mark.parametrize(
    ("wanted", "others", "requests"), [(5, 0, 6), (100, 200, 3), (60, 60_000, 62), (3000, 60_000, 258)]
)
def test_objects_are_looked_for_in_the_fewest_requests(world: World, wanted: int, others: int, requests: int) -> None:
    """One by one, by one list, one by one again where the store holds much else, and by folders where many are wanted
    of that.
    """
    names = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(wanted + others)]
    for name in names[wanted:]:
        world.remote.objects[layout.file_key(name)] = (b"abc", world.seconds)
    sizes = {layout.file_key(name): 3 for name in names[:wanted]} | {layout.manifest_key(names[0]): 3}
    for number, key in enumerate(list(sizes)[: wanted // 2]):
        world.remote.objects[key] = (b"abc" if number % 3 else b"other", world.seconds)
    expected = [key for key in sizes if world.remote.objects.get(key, (b"", 0))[0] != b"abc"]
    remote, heard = watched(world)
    assert missing_of(remote, sizes) == expected
    assert len(heard.log) == requests


def test_a_manifest_that_is_not_that_of_its_ref_is_refused(world: World, caches: Caches, tmp_path: Path) -> None:
    from kdcache.share.refs import publish

    push(world.remote, caches["one"], "sst2", timing=world.timing)
    ref = history(world.remote, "sst2")[0]
    publish(world.remote, "mind", ref.manifest, "0" * 64, None)
    with pytest.raises(DamageError, match="says identity 000000000000"):
        pull(world.remote, "mind", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert json.loads((caches["one"] / "manifest.json").read_bytes())["identity"] == ref.identity
