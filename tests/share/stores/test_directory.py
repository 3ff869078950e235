"""What only a directory can do wrong.

Half-written files, links, file systems without hard links, a disk that is not there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.errors import MissingObjectError, RemoteAccessError, RemoteError
from kdcache.files import Disk, use_disk
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.testing.faults import Died, UnsyncedDisk, counting_disk, dying_disk, failing_disk
from kdcache.testing.remote_contract import at_once


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "remote").mkdir()
    return tmp_path / "remote"


class NoLinks(UnsyncedDisk):
    """A file system without hard links."""

    def link(self, source: Path, target: Path) -> None:  # noqa: ARG002
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _replaced(remote: DirectoryRemote) -> None:
    remote.write("files/ab/one", b"new" * 100)


def _created(remote: DirectoryRemote) -> None:
    assert remote.create("refs/x/2", b"new" * 100)


def _prepared(root: Path) -> DirectoryRemote:
    root.mkdir()
    remote = DirectoryRemote(root)
    assert remote.conditional
    remote.write("files/ab/one", b"old")
    return remote


@pytest.mark.parametrize(("change", "key"), [(_replaced, "files/ab/one"), (_created, "refs/x/2")])
def test_dying_at_every_step_leaves_the_old_object_or_the_new_one(
    tmp_path: Path, change: Callable[[DirectoryRemote], None], key: str
) -> None:
    remote, disk = _prepared(tmp_path / "count"), counting_disk()
    with use_disk(disk):
        change(remote)
    assert [step.split(" /")[0] for step in disk.steps][-1] == "fsync directory"
    before, after = {"files/ab/one": b"old"}, {"files/ab/one": b"old"} | {key: b"new" * 100}
    for step in range(1, len(disk.steps) + 1):
        root = tmp_path / f"died-{step}"
        remote = _prepared(root)
        with use_disk(dying_disk(step)), pytest.raises(Died):
            change(remote)
        remote = DirectoryRemote(root)
        assert {entry.key: remote.read_bytes(entry.key, 999) for entry in remote.list("")} in (before, after), (
            f"step {step}"
        )
        change(remote)
        assert {entry.key: remote.read_bytes(entry.key, 999) for entry in remote.list("")} == after
        remote.remove_leftovers(-1)
        assert sorted(path.name for path in root.rglob("*") if path.is_file()) == sorted(
            Path(one).name for one in after
        )


def test_a_full_disk_is_said_and_leaves_nothing(root: Path) -> None:
    remote = DirectoryRemote(root)
    remote.write("one", b"old")
    for step in range(1, 4):
        with use_disk(failing_disk(step, once=True)), pytest.raises(RemoteError, match="No space left") as caught:
            remote.write("one", b"new")
        assert "Free some space" in caught.value.hint
        assert remote.read_bytes("one", 9) == b"old"
    assert [path.name for path in root.iterdir()] == ["one"]


def test_what_is_under_way_is_no_object(root: Path) -> None:
    remote = DirectoryRemote(root)
    remote.write("files/ab/one", b"x")
    (root / "files/ab/.two.0123abcd.tmp").write_bytes(b"half")
    (root / ".DS_Store").write_bytes(b"")
    (root / "Notes.txt").write_bytes(b"somebody's")
    assert [entry.key for entry in remote.list("")] == ["files/ab/one"]
    assert remote.remove_leftovers(60) == 0
    assert remote.remove_leftovers(-60) == 1
    assert (root / "Notes.txt").exists()


def test_no_link_is_followed(root: Path, tmp_path: Path) -> None:
    remote = DirectoryRemote(root)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "files").mkdir()
    (root / "files/ab").symlink_to(outside)
    (root / "one").symlink_to(outside / "secret")
    assert list(remote.list("")) == []
    for key in ("files/ab/secret", "one"):
        for call in (
            remote.head,
            remote.delete,
            lambda key: list(remote.read(key)),
            lambda key: remote.write(key, b"x"),
            lambda key: remote.create(key, b"x"),
            lambda key: remote.read_bytes(key, 10),
        ):
            with pytest.raises(RemoteError, match="contains the link"):
                call(key)
    assert (outside / "secret").read_bytes() == b"secret"
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_a_pipe_is_no_object(root: Path) -> None:
    remote = DirectoryRemote(root)
    os.mkfifo(root / "one")
    assert list(remote.list("")) == []
    for call in (remote.head, lambda key: list(remote.read(key))):
        with pytest.raises(RemoteError, match="no plain file"):
            call("one")


def test_a_disk_that_is_not_mounted_is_no_empty_remote(root: Path) -> None:
    remote = DirectoryRemote(root)
    root.rmdir()
    for call in (
        lambda: list(remote.list("")),
        lambda: remote.write("one", b"x"),
        lambda: remote.head("one"),
        remote.now,
    ):
        with pytest.raises(RemoteError, match="there is no directory"):
            call()
    assert not root.exists()


def test_without_hard_links_creates_are_not_decided(root: Path) -> None:
    with use_disk(NoLinks()):
        remote = DirectoryRemote(root)
        assert not remote.conditional
        assert remote.create("one", b"mine")
        assert not remote.create("one", b"other")
        assert any(at_once(8, lambda number: remote.create("two", b"%d" % number)))
    assert sorted(path.name for path in root.iterdir()) == ["one", "two"]


def test_what_may_not_be_written_is_said(root: Path) -> None:
    class ReadOnly(Disk):
        def write(self, path: Path, buffers: object) -> None:  # noqa: ARG002
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    remote = DirectoryRemote(root)
    with use_disk(ReadOnly()):
        for call in (lambda: remote.write("one", b"x"), lambda: remote.create("one", b"x"), remote.now):
            with pytest.raises(RemoteAccessError, match="Read-only file system") as caught:
                call()
            assert "pull works and push does not" in caught.value.hint


def test_what_vanishes_while_it_is_read_is_missing(root: Path) -> None:
    remote = DirectoryRemote(root)
    remote.write("one", b"x")
    body = remote.read("one")
    remote.delete("one")
    with pytest.raises(MissingObjectError):
        list(body)


def test_the_clock_is_that_of_the_file_system(root: Path) -> None:
    remote = DirectoryRemote(root)
    remote.write("one", b"x")
    os.utime(root / "one", (1000, 1000))
    entry = remote.head("one")
    assert entry is not None
    assert entry.modified == 1000
    assert not list(root.glob(".*"))
