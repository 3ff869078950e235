"""What a push reports, in which order it works, and what it does where it slept or may not write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.selection import Selection
from kdcache.errors import MismatchError, RemoteAccessError, RemoteError
from kdcache.share import keys as layout
from kdcache.share.pull import pull
from kdcache.share.push import PushReport, push
from kdcache.share.refs import OvertakenError, history
from kdcache.share.stores.base import Remote
from tests.share.test_gc import Told, prepared
from tests.share.worlds import Watched, World, broken_refs, watched

Caches = dict[str, Path]


def sizes(cache: Path) -> dict[str, int]:
    """Key -> bytes of all that a push of the cache puts on a remote."""
    data = (cache / "manifest.json").read_bytes()
    files = {layout.file_key(one.sha256): one.size for one in read_manifest(cache).contents.files.values()}
    return files | {layout.manifest_key(hashlib.sha256(data).hexdigest()): len(data)}


def hearing(world: World, hear: Callable[[str, str], None]) -> Remote:
    return cast("Remote", Watched(world.remote, hear))


def test_a_dry_run_reports_what_the_push_then_does(world: World, caches: Caches) -> None:
    pushes = [
        ("one", "sst2", None),
        ("one", "sst2", None),
        ("two", "sst2", "v1"),
        ("one", "sst2", None),
        ("two", "other", None),
    ]
    pushes += [("one", "sst2", "v2"), ("one", "sst2", "v2"), ("other", "sst2", None)]
    expected = [("sst2@1", True), ("sst2@1", False), ("sst2@2", True), ("sst2@3", True), ("other@1", True)]
    expected += [("sst2@4", True), ("sst2@4", False), ("sst2@5", True)]
    for (cache, name, tag), (reference, new) in zip(pushes, expected, strict=True):
        wanted, before = sizes(caches[cache]), set(world.remote.objects)
        sent = {key: size for key, size in wanted.items() if key not in before}
        would = push(world.remote, caches[cache], name, tag=tag, timing=world.timing, dry_run=True)
        assert set(world.remote.objects) == before
        did = push(world.remote, caches[cache], name, tag=tag, timing=world.timing)
        assert did == replace(would, dry_run=False) and would.dry_run is True
        manifest = next(key for key in wanted if layout.parse_manifest_key(key))
        assert did == PushReport(
            reference,
            read_manifest(caches[cache]).identity,
            str(layout.parse_manifest_key(manifest)),
            tag,
            new,
            len(wanted),
            sum(wanted.values()),
            len(sent),
            sum(sent.values()),
            False,
        )
        ref = next(ref for ref in history(world.remote, name) if ref.pinned == reference)
        assert (ref.manifest, ref.identity, ref.tag, ref.size, ref.files) == (
            did.manifest,
            did.identity,
            tag or ref.tag,
            did.bytes,
            did.files - 1,
        )


def test_a_tag_that_is_taken_is_refused_before_anything_is_sent(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", tag="v1", timing=world.timing)
    before = set(world.remote.objects)
    for dry_run in (True, False):
        with pytest.raises(MismatchError, match="tag 'v1' of 'sst2' is version 1 already"):
            push(world.remote, caches["two"], "sst2", tag="v1", timing=world.timing, dry_run=dry_run)
        assert {key for key in world.remote.objects if key.startswith("files/")} <= before


def test_files_come_before_the_manifest_and_the_ref_comes_last(world: World, caches: Caches) -> None:
    remote, requests = watched(world)
    told = Told()
    report = push(remote, caches["two"], "sst2", timing=world.timing, progress=told)
    made = [key.partition("/")[0] for method, key in requests.log if method in ("write", "create")]
    assert made == ["intents", *made[1:]] and [kind for kind in made if kind != "intents"] == (
        ["files"] * (report.files - 1) + ["manifests", "refs"]
    )
    assert (told.tasks, told.done, told.bytes) == ([("push sst2", report.bytes, "bytes")], report.bytes, report.bytes)
    assert told.finished == 1
    assert requests.log[-1][0] == "delete" and requests.log[-1][1].startswith("intents/")
    push(remote, caches["two"], "sst2", timing=world.timing, progress=(again := Told()))
    assert again.tasks == []


def test_a_push_whose_files_take_long_keeps_its_intent_alive(world: World, caches: Caches) -> None:
    written: list[str] = []

    def hear(method: str, key: str) -> None:
        if method == "write" and key.startswith("files/"):
            written.append(key)
            world.seconds += 40.0

    report = push(hearing(world, hear), caches["one"], "sst2", timing=world.timing, workers=1)
    assert len(written) == len(set(written)) == report.files_sent - 1
    assert report.reference == "sst2@1"


def test_a_push_that_sleeps_again_and_again_gives_up(world: World, caches: Caches) -> None:
    looked: list[str] = []

    def hear(method: str, key: str) -> None:
        if method == "head" and layout.parse_manifest_key(key):
            looked.append(key)
            world.seconds += 100.0

    with pytest.raises(RemoteError) as caught:
        push(hearing(world, hear), caches["one"], "sst2", timing=world.timing, workers=1)
    assert caught.value.message == "the push of 'sst2' lost its lease 5 times: was the machine suspended?"
    assert caught.value.hint == "Run it again on a machine that is not suspended meanwhile: what was sent is kept."
    assert len(looked) == 5
    assert history(world.remote, "sst2") == ()
    assert push(world.remote, caches["one"], "sst2", timing=world.timing).files_sent == 0  # what arrived was kept


@pytest.mark.parametrize("slept", [0.0, 130.0])
def test_what_went_before_the_ref_was_made_is_sent_again(caches: Caches, slept: float) -> None:
    """By a gc that looked before the intent was there.

    Where the push slept, what it had sent itself may be gone too.
    """
    world = prepared(caches)
    manifest = next(key for key in sizes(caches["one"]) if layout.parse_manifest_key(key))
    found = next(key for key in sizes(caches["one"]) if layout.parse_file_key(key))
    lost = [found, manifest] if slept else [found]

    def hear(method: str, key: str) -> None:
        if method == "create" and key.startswith("refs/"):
            world.seconds += slept
            for one in lost:
                world.remote.objects.pop(one, None)

    report = push(hearing(world, hear), caches["one"], "new", timing=world.timing, workers=1)
    assert (report.reference, report.new_version, report.files_sent) == ("new@1", True, 2)
    assert [ref.number for ref in history(world.remote, "new")] == [1]
    assert broken_refs(world.remote) == []


def test_an_overtaken_push_sends_nothing(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    first = history(world.remote, "sst2")
    push(world.remote, caches["other"], "sst2", timing=world.timing)
    remote, requests = watched(world)
    with pytest.raises(OvertakenError, match=r"was made from sst2@1, but its newest version is sst2@2"):
        push(remote, caches["two"], "sst2", timing=world.timing, after=first)
    assert requests.keys("write", "files/") == requests.keys("create") == []
    same = push(remote, caches["other"], "sst2", timing=world.timing, after=first)
    assert (same.reference, same.new_version) == ("sst2@2", False)  # it is there already: nothing to overtake
    newest = history(world.remote, "sst2")[-1:]
    assert push(remote, caches["two"], "sst2", timing=world.timing, after=newest).reference == "sst2@3"


def test_a_push_that_is_overtaken_at_the_last_moment_makes_no_version(world: World, caches: Caches) -> None:
    push(world.remote, caches["one"], "sst2", timing=world.timing)
    first, others = history(world.remote, "sst2"), list[str]()

    def hear(method: str, key: str) -> None:
        if method == "write" and key.startswith("manifests/") and not others:
            others.append(push(world.remote, caches["other"], "sst2", timing=world.timing).reference)

    with pytest.raises(OvertakenError):
        push(hearing(world, hear), caches["two"], "sst2", timing=world.timing, after=first)
    assert [ref.number for ref in history(world.remote, "sst2")] == [1, 2]


@pytest.mark.parametrize("hint", ["", "Ask the one who owns it."])
def test_read_only_credentials_are_named(world: World, caches: Caches, hint: str) -> None:
    def hear(method: str, key: str) -> None:  # noqa: ARG001
        if method == "write":
            raise RemoteAccessError("status 403", hint)

    with pytest.raises(RemoteAccessError) as caught:
        push(hearing(world, hear), caches["one"], "sst2", timing=world.timing)
    assert caught.value.message == f"push needs write access to {world.remote.url}: status 403"
    assert caught.value.hint == (hint or "Use credentials that may write there; pull, ls and verify work without.")
    assert push(hearing(world, hear), caches["one"], "sst2", timing=world.timing, dry_run=True).dry_run


def test_a_part_without_the_rest_is_refused_by_count_and_name(world: World, caches: Caches, tmp_path: Path) -> None:
    push(world.remote, caches["two"], "sst2", timing=world.timing)
    selection = Selection({"bert": (2,)})
    pull(world.remote, "sst2", tmp_path / "part", selection)
    contents = read_manifest(caches["two"]).contents
    here = {contents.files[path].sha256 for path in selection.covers(contents)}
    absent = sorted(path for path, digest in contents.files.items() if digest.sha256 not in here)
    elsewhere = World()
    for dry_run in (True, False):
        with pytest.raises(MismatchError) as caught:
            push(elsewhere.remote, tmp_path / "part", "sst2", timing=elsewhere.timing, dry_run=dry_run)
        assert caught.value.message == (
            f"only a part of this cache was pulled: {len(absent)} other files are not on "
            f"{elsewhere.remote.url} either, such as '{absent[0]}'"
        )
        assert caught.value.hint == "Pull the rest first, or push to the remote that it came from."
    assert not elsewhere.remote.objects
    assert push(world.remote, tmp_path / "part", "copy", timing=world.timing).files_sent == 0
