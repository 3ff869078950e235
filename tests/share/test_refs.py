"""Versions of a name: one line, none lost, damage seen, forks reported."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import pytest

from kdcache.cache.canonical import canonical_json, digest_of, parse_json
from kdcache.errors import DamageError, MismatchError, RecipeError
from kdcache.share import keys as layout
from kdcache.share.refs import OvertakenError, Ref, history, live, publish, resolve, tombstone
from kdcache.share.stores.base import Remote
from kdcache.testing.memory_remote import MemoryRemote
from tests.share.worlds import Watched

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
ONE, TWO = ("1" * 64, "2" * 64)


def no_sleep(_: float) -> None: ...


def test_versions_are_numbered_and_found_by_number_tag_and_digest(remote: MemoryRemote) -> None:
    publish(remote, "sst2", A, ONE, None)
    publish(remote, "sst2", B, TWO, "v2")
    publish(remote, "sst2", C, TWO, None)
    assert [ref.number for ref in history(remote, "sst2")] == [1, 2, 3]
    meant = {"sst2": 3, "sst2@1": 1, "sst2@v2": 2, "sst2@" + A[:6]: 1, "sst2@" + TWO[:8]: 3, "sst2@" + C: 3}
    assert {reference: resolve(remote, reference).number for reference in meant} == meant
    assert resolve(remote, "sst2").made == "2027-01-15T08:00:00Z"


def test_the_same_content_makes_no_new_version_and_a_tag_stays_where_it_is(remote: MemoryRemote) -> None:
    first = publish(remote, "sst2", A, ONE, "v1")
    assert publish(remote, "sst2", A, ONE, None) == first == publish(remote, "sst2", A, ONE, "v1")
    assert publish(remote, "sst2", A, ONE, "final").number == 2
    with pytest.raises(MismatchError, match="tag 'v1' of 'sst2' is version 1 already"):
        publish(remote, "sst2", B, TWO, "v1")
    publish(remote, "sst2", B, TWO, None)
    assert publish(remote, "sst2", A, ONE, None).number == 4  # back to the older content is a version too


@pytest.mark.parametrize("reference", ["", "SST2", "../x", "a/b", "sst2@", "sst2@a b", "x" * 65, ".x", "sst2@3@4"])
def test_what_is_no_reference_is_refused(remote: MemoryRemote, reference: str) -> None:
    with pytest.raises(RecipeError):
        resolve(remote, reference)


@pytest.mark.parametrize("tag", ["12", "abcdef", "a/b", "-x", "x" * 65])
def test_tags_that_could_mean_something_else_are_refused(remote: MemoryRemote, tag: str) -> None:
    with pytest.raises(RecipeError, match="is not a tag"):
        publish(remote, "sst2", A, ONE, tag)


def test_what_is_not_there_is_refused_with_what_is(remote: MemoryRemote) -> None:
    with pytest.raises(MismatchError, match="no cache 'sst2'") as caught:
        resolve(remote, "sst2")
    assert "cache push" in caught.value.hint
    publish(remote, "sst2", A, ONE, "v1")
    with pytest.raises(MismatchError, match="no cache 'mind'") as caught:
        resolve(remote, "mind")
    assert "sst2" in caught.value.hint
    for version in ("7", "v9", "ffffff"):
        with pytest.raises(MismatchError, match=f"has no version '{version}'") as caught:
            resolve(remote, f"sst2@{version}")
        assert "1 (v1) 111111111111" in caught.value.hint


def test_a_tombstone_drops_what_is_older_and_numbers_go_on(remote: MemoryRemote) -> None:
    for manifest, identity in ((A, ONE), (B, TWO)):
        publish(remote, "sst2", manifest, identity, None)
    tombstone(remote, "sst2", (2,))
    assert resolve(remote, "sst2").number == 1
    with pytest.raises(MismatchError, match=r"version 2 of 'sst2' .* was removed"):
        resolve(remote, "sst2@2")
    tombstone(remote, "sst2", "all")
    with pytest.raises(MismatchError, match=r"all versions of 'sst2' .* were removed"):
        resolve(remote, "sst2")
    assert publish(remote, "sst2", B, TWO, None).number == 5
    assert [ref.number for ref in live(history(remote, "sst2"))] == [5]


def test_eight_writers_make_one_line(remote: MemoryRemote) -> None:
    def write(digit: int) -> None:
        for step in range(3):
            publish(remote, "sst2", f"{digit:x}{step}" * 32, ONE, None, sleep=no_sleep)

    threads = [threading.Thread(target=write, args=(digit,)) for digit in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refs = history(remote, "sst2")
    assert [ref.number for ref in refs] == list(range(1, 25))
    assert len({ref.manifest for ref in refs}) == 24


def test_two_heads_of_a_store_without_conditions_are_a_fork_and_both_stay(remote: MemoryRemote) -> None:
    other = MemoryRemote(conditional=False, clock=remote.now)
    made = []

    class Behind(MemoryRemote):
        """Another writer gets in between reading and writing."""

        def create(self, key: str, data: bytes) -> bool:
            if not made:
                made.append(publish(other, "sst2", B, TWO, None))
            return super().create(key, data)

    late = Behind(conditional=False, clock=remote.now)
    late.objects = other.objects
    publish(late, "sst2", A, ONE, None)
    assert [ref.number for ref in history(other, "sst2")] == [1, 1]
    for reference in ("sst2", "sst2@1"):
        with pytest.raises(MismatchError, match="version 1 was made twice") as caught:
            resolve(other, reference)
        assert A[:12] in caught.value.hint
        assert B[:12] in caught.value.hint
    assert resolve(other, f"sst2@{A[:12]}").manifest == A
    assert publish(other, "sst2", A, ONE, None).number == 2  # on top of both, though one of them has this content
    assert resolve(other, "sst2").manifest == A


def test_a_version_that_is_removed_while_it_is_made_is_not_called_made() -> None:
    class Slow(MemoryRemote):
        def create(self, key: str, data: bytes) -> bool:
            done = super().create(key, data)
            if len(self.objects) == 1:
                tombstone(self, "sst2", "all")
            return done

    with pytest.raises(MismatchError, match="version 1 of 'sst2' was removed by version 2 while it was being made"):
        publish(Slow(), "sst2", A, ONE, None)


def resigned(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        document = parse_json(data)
        change(document)
        document.pop("checksum", None)
        return canonical_json({**document, "checksum": digest_of(document)})

    return edit


ATTACKS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "not json": lambda data: data[:-1],
    "a list": lambda _: b"[]",
    "deep": lambda _: b"[" * 20000 + b"]" * 20000,
    "large": lambda data: data + b" " * 70000,
    "another manifest": lambda data: data.replace(b"a" * 64, b"b" * 64),
    "another name": resigned(lambda document: document.update(name="mind")),
    "another number": resigned(lambda document: document.update(number=7)),
    "an unknown key": resigned(lambda document: document.update(url="http://x")),
    "a path for a manifest": resigned(lambda document: document.update(manifest="../../etc/passwd")),
    "a number as text": resigned(lambda document: document.update(number="1")),
    "a huge number": resigned(lambda document: document.update(number=10**12)),
    "removal and manifest": resigned(lambda document: document.update(removes="all")),
    "a tag that escapes": resigned(lambda document: document.update(tag="\u001b[2J")),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_ref_from_somebody_else_is_checked(remote: MemoryRemote, attack: str) -> None:
    publish(remote, "sst2", A, ONE, None)
    key = layout.ref_key("sst2", 1)
    data, at = remote.objects[key]
    remote.objects[key] = (ATTACKS[attack](data), at)
    with pytest.raises(DamageError, match=r"refs/sst2/1\.json") as caught:
        resolve(remote, "sst2")
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message


def test_refs_that_were_exchanged_are_seen(remote: MemoryRemote) -> None:
    for name in ("mind", "sst2"):
        publish(remote, name, A if name == "mind" else B, ONE, None)
    keys = [layout.ref_key(name, 1) for name in ("mind", "sst2")]
    remote.objects[keys[0]], remote.objects[keys[1]] = remote.objects[keys[1]], remote.objects[keys[0]]
    with pytest.raises(DamageError, match="holds version 1 of 'mind'"):
        resolve(remote, "sst2")


def test_objects_of_others_are_left_alone(remote: MemoryRemote) -> None:
    publish(remote, "sst2", A, ONE, None)
    for key in ("refs/sst2/readme.txt", "refs/sst2/01.json", "refs/sst2/2/x.json", "refs/notes"):
        remote.write(key, b"mine")
    assert [ref.number for ref in history(remote, "sst2")] == [1]


def test_a_version_that_is_to_follow_another_follows_it_or_is_not_made(remote: MemoryRemote) -> None:
    first = publish(remote, "sst2", A, ONE, None)
    second = publish(remote, "sst2", B, TWO, None, after=[first])
    assert publish(remote, "sst2", B, TWO, None, after=[first]) == second  # one's own, found after a lost answer
    with pytest.raises(OvertakenError, match=r"was made from sst2@1, but its newest version is sst2@2") as caught:
        publish(remote, "sst2", C, TWO, None, after=[first])
    assert caught.value.exit_code == 4
    tombstone(remote, "sst2", (1,))
    assert publish(remote, "sst2", C, TWO, None, after=[second]).number == 4  # what was dropped is no version
    tombstone(remote, "sst2", "all")
    with pytest.raises(OvertakenError, match="all its versions were removed"):
        publish(remote, "sst2", A, ONE, None, after=[second])


def test_two_that_follow_the_same_version_at_once(remote: MemoryRemote) -> None:
    """The second one read the history before the first one made its number: the store decides."""
    first = publish(remote, "sst2", A, ONE, None)
    made: list[Ref] = []

    def hear(method: str, _: str) -> None:
        if method == "create" and not made:
            made.append(publish(remote, "sst2", B, TWO, None, after=[first]))

    slow = cast("Remote", Watched(remote, hear))
    with pytest.raises(OvertakenError):
        publish(slow, "sst2", C, ONE, None, after=[first], sleep=no_sleep)
    assert [ref.manifest for ref in history(remote, "sst2")] == [A, B]
