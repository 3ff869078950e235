"""A remote that somebody else can write to.

Whatever it serves, nothing lands outside the target, and nothing without end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcache.cache.canonical import canonical_json, digest_of, parse_json
from kdcache.cache.layout import STATE
from kdcache.cache.manifest import MAX_BYTES
from kdcache.cache.reader import open_cache
from kdcache.errors import DamageError, KdcacheError
from kdcache.share import keys as layout
from kdcache.share.local_store import LocalStore
from kdcache.share.pull import fetch_manifest, pull
from kdcache.share.push import push
from kdcache.share.reading_through import read_through
from kdcache.share.refs import resolve
from kdcache.testing.memory_remote import MemoryRemote
from tests.attacks.victim import tree

REF = layout.ref_key("mine", 1)


class EndlessRemote(MemoryRemote):
    """Bodies of data files never end."""

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        if layout.parse_file_key(key) is None:
            yield from super().read(key, start=start, length=length)
            return
        yield from super().read(key, start=start, length=length)
        for _ in range(10_000):
            yield bytes(1 << 20)
        raise AssertionError("ten gigabytes were taken")


@pytest.fixture
def remote(victim: Path) -> MemoryRemote:
    remote = EndlessRemote()
    push(remote, victim, "mine")
    return remote


def replace(remote: MemoryRemote, key: str, data: bytes) -> None:
    remote.objects[key] = (data, remote.now())


def resigned(remote: MemoryRemote, **changes: object) -> bytes:
    """The ref with other values and its checksum right."""
    document = parse_json(remote.objects[REF][0])
    document.pop("checksum")
    document |= changes
    return canonical_json({**document, "checksum": digest_of(document)})


REFS: dict[str, Callable[[MemoryRemote], bytes]] = {
    "of another name": lambda remote: resigned(remote, name="other"),
    "of another number": lambda remote: resigned(remote, number=7),
    "with a manifest that climbs": lambda remote: resigned(remote, manifest="../../etc/passwd"),
    "with a tag that steers": lambda remote: resigned(remote, tag="\x1b[2J"),
    "with a key of its own": lambda remote: resigned(remote, run="me"),
    "with an edited identity": lambda remote: remote.objects[REF][0].replace(b'"identity":"', b'"identity":"0'),
    "of a megabyte": lambda _: b'{"a":"' + b"x" * (1 << 20) + b'"}',
    "that nests": lambda _: b"[" * 3000,
    "that is empty": lambda _: b"",
    "with a byte order mark": lambda remote: b"\xef\xbb\xbf" + remote.objects[REF][0],
}


@pytest.mark.parametrize("attack", REFS)
def test_refs(remote: MemoryRemote, tmp_path: Path, attack: str) -> None:
    replace(remote, REF, REFS[attack](remote))
    with pytest.raises(DamageError) as caught:
        pull(remote, "mine", tmp_path / "target")
    assert len(caught.value.message) < 1000 and "\x1b" not in caught.value.message
    assert not (tmp_path / "target").exists()


def test_a_manifest_of_another_identity_and_one_without_end(remote: MemoryRemote, tmp_path: Path) -> None:
    ref = resolve(remote, "mine")
    replace(remote, REF, resigned(remote, identity="0" * 64))
    with pytest.raises(DamageError, match="identity"):
        fetch_manifest(remote, resolve(remote, "mine"))
    replace(remote, layout.manifest_key(ref.manifest), bytes(MAX_BYTES + 1))
    with pytest.raises(DamageError):
        pull(remote, "mine", tmp_path / "target")


def test_a_file_that_does_not_end_is_cut_where_its_size_says(remote: MemoryRemote, tmp_path: Path) -> None:
    with pytest.raises(DamageError, match="has more than"):
        pull(remote, "mine", tmp_path / "target")
    store = LocalStore(tmp_path / "store")
    with (
        pytest.raises(DamageError, match="has more than"),
        read_through(remote, resolve(remote, "mine"), store=store) as cache,
    ):
        cache.text_ids("part-00000")
    assert not [path for path in tmp_path.rglob("*.arrow") if "inside" not in path.parts]


@pytest.mark.parametrize("name", [STATE, "teachers", "texts", "data"])
def test_a_pull_into_a_directory_with_links_leaves_what_is_behind_them(victim: Path, tmp_path: Path, name: str) -> None:
    remote = MemoryRemote()
    push(remote, victim, "mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious.json").write_text("{}")
    target = tmp_path / "target"
    target.mkdir()
    (target / name).symlink_to(tmp_path / "outside")
    before = tree(tmp_path / "outside")
    with pytest.raises(KdcacheError):
        pull(remote, "mine", target)
    assert tree(tmp_path / "outside") == before


def test_a_wrong_file_is_not_kept_by_the_store(victim: Path, tmp_path: Path) -> None:
    remote = MemoryRemote()
    push(remote, victim, "mine")
    files = open_cache(victim).manifest.contents.files
    digest = files["teachers/bert/outputs/part-00000.arrow"]
    right = remote.objects[layout.file_key(digest.sha256)][0]
    replace(remote, layout.file_key(digest.sha256), right[:-1] + b"x")
    store = LocalStore(tmp_path / "store")
    with (
        pytest.raises(DamageError, match="sha256 differs"),
        read_through(remote, resolve(remote, "mine"), store=store) as cache,
    ):
        cache.outputs("bert", "part-00000")
    assert not list((tmp_path / "store").rglob(digest.sha256))
    replace(remote, layout.file_key(digest.sha256), right)
    with read_through(remote, resolve(remote, "mine"), store=store) as cache:
        cache.outputs("bert", "part-00000")
