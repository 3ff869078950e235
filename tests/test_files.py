"""Files that arrive whole or not at all, and what is said where they cannot.

What a power cut takes is in tests/test_power_cut.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcache import files
from kdcache.errors import StorageError
from kdcache.files import (
    Disk,
    FileDigest,
    create_file,
    digest_bytes,
    make_directory,
    remove_file,
    remove_temporaries,
    replace_file,
    share_file,
    use_disk,
    write_file,
    write_stream,
)
from kdcache.testing.faults import Died, FaultyDisk, counting_disk, dying_disk, failing_disk
from kdcache.testing.power_cut import watched

FULL = "Free some space and run the same command again: what is written is kept."
READ_ONLY = "Make the place writable and run the same command again."
BUFFERS = [
    b"",
    b"abc",
    bytearray(b"abc"),
    memoryview(b"abc"),
    [b"a", bytearray(b"b"), memoryview(b"cd")],
    iter([b"a", b"b"]),
    [],
]
Write = Callable[[Path], object]
WAYS: dict[str, Write] = {
    "write_file": lambda path: write_file(path, b"new content"),
    "write_stream": lambda path: write_stream(path, [b"new ", b"content"], lambda: None),
    "create_file": lambda path: create_file(path, b"new content"),
    "share_file": lambda path: share_file(
        next(found for one in path.parents if (found := one / "source").exists()), path
    ),
}


@pytest.fixture(autouse=True)
def _source(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "source").write_bytes(b"new content")
    with use_disk(Disk()):
        yield


@pytest.mark.parametrize("data", BUFFERS, ids=lambda data: type(data).__name__)
def test_the_digest_is_that_of_the_file(tmp_path: Path, data: object) -> None:
    found = write_file(tmp_path / "file", data)  # type: ignore[arg-type]
    content = (tmp_path / "file").read_bytes()
    assert found == FileDigest(len(content), hashlib.sha256(content).hexdigest()) == digest_bytes(content)
    assert isinstance(data, Iterator) or content == b"".join(data if isinstance(data, list) else [data])  # type: ignore[list-item]


@pytest.mark.parametrize("way", WAYS)
def test_a_file_gets_its_name_when_it_is_whole_and_stays(tmp_path: Path, way: str) -> None:
    path = tmp_path / "a/b/file"
    with watched(tmp_path) as watch:
        WAYS[way](path)
    assert watch.wrong == [] and watch.lost() == []
    assert path.read_bytes() == b"new content"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, FULL), (errno.EDQUOT, FULL), (errno.EACCES, READ_ONLY), (errno.EIO, READ_ONLY)]
)
def test_where_a_step_fails_the_old_file_stays_and_the_error_names_the_new_one(
    tmp_path: Path, way: str, number: int, hint: str
) -> None:
    for step in range(1, _steps(tmp_path, way) + 1):
        (place := tmp_path / f"place-{step}").mkdir()
        path = place / "file"
        if way != "create_file":
            path.write_bytes(b"old content")
        disk = failing_disk(step, number, once=True)
        with use_disk(disk):
            try:
                WAYS[way](path)
            except StorageError as error:
                assert error.message == f"cannot write '{path}': {os.strerror(number)}"
                assert error.hint == hint
            else:
                assert disk.steps[step - 1].startswith("link ") and way == "share_file"  # no hard links: a copy
        last = step == len(disk.steps) and disk.steps[-1].startswith("fsync directory")
        if path.exists():
            assert path.read_bytes() in (b"new content", *([] if last or way == "create_file" else [b"old content"]))
        assert {entry.name for entry in place.iterdir()} <= {"file"}, disk.steps


def _steps(tmp_path: Path, way: str) -> int:
    (tmp_path / "counted").mkdir()
    with use_disk(disk := counting_disk()):
        WAYS[way](tmp_path / "counted/file")
    return len(disk.steps)


def test_temporary_names_are_hidden_and_never_the_same(tmp_path: Path) -> None:
    with use_disk(disk := counting_disk()):
        for _ in range(50):
            write_file(tmp_path / "file", b"content")
    names = [step.removeprefix(f"write {tmp_path}/") for step in disk.steps if step.startswith("write")]
    assert len(set(names)) == 50
    assert all(re.fullmatch(r"\.file\.[0-9a-f]{8}\.tmp", name) for name in names)


def test_a_stream_that_does_not_check_out_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def refuse() -> None:
        raise ValueError("other bytes than expected")

    with pytest.raises(ValueError, match="other bytes"):
        write_stream(tmp_path / "file", [b"new"], refuse)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "source"}


def test_what_is_created_is_created_once(tmp_path: Path) -> None:
    assert create_file(tmp_path / "file", b"first") is True
    assert create_file(tmp_path / "file", b"second") is False
    assert (tmp_path / "file").read_bytes() == b"first"
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "source"}


def test_a_shared_file_is_the_same_file_unless_there_are_no_links(tmp_path: Path) -> None:
    for _ in range(2):  # the second time both names are of one file already
        share_file(tmp_path / "source", tmp_path / "shared/file")
        assert (tmp_path / "shared/file").samefile(tmp_path / "source")
        assert [entry.name for entry in (tmp_path / "shared").iterdir()] == ["file"]

    class NoLinks(Disk):
        def link(self, source: Path, target: Path) -> None:  # noqa: ARG002
            raise PermissionError(errno.EPERM, "Operation not permitted")

    with use_disk(NoLinks()), watched(tmp_path) as watch:
        share_file(tmp_path / "source", tmp_path / "copied/file")
    assert watch.wrong == [] and watch.lost() == []
    assert (tmp_path / "copied/file").read_bytes() == b"new content"
    assert not (tmp_path / "copied/file").samefile(tmp_path / "source")


def test_a_link_is_shared_as_a_link_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "source")
    Disk().link(tmp_path / "link", tmp_path / "other")
    assert (tmp_path / "other").is_symlink()


def test_a_replaced_file_leaves_one_temporary_file_at_most(tmp_path: Path) -> None:
    path = tmp_path / "run/run.json"
    replace_file(path, b"old")
    with use_disk(disk := counting_disk()):
        replace_file(path, b"new")
    for step in range(1, len(disk.steps) + 1):
        with use_disk(dying_disk(step)), pytest.raises(Died):
            replace_file(path, b"newer")
        assert path.read_bytes() in (b"new", b"newer")
        assert len([entry for entry in path.parent.iterdir() if entry != path]) <= 1
    replace_file(path, b"newest")
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"] and path.read_bytes() == b"newest"


def test_directories_are_made_once_from_the_top(tmp_path: Path) -> None:
    with use_disk(disk := counting_disk()):
        make_directory(tmp_path / "a/b/c")
    made = [f"{step} {tmp_path}{below}" for below in ("/a", "/a/b", "/a/b/c") for step in ("make directory",)]
    assert [step for step in disk.steps if step.startswith("make")] == made
    assert disk.steps[1::2] == [f"fsync directory {tmp_path}{below}" for below in ("", "/a", "/a/b")]
    with use_disk(disk := counting_disk()):
        make_directory(tmp_path / "a/b/c")
    assert disk.steps == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((StorageError, NotADirectoryError, FileExistsError)):
        make_directory(tmp_path / "file/below")


@pytest.mark.parametrize(("step", "named"), [(1, "a"), (2, "a"), (3, "a/b"), (4, "a/b")])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, step: int, named: str) -> None:
    with use_disk(failing_disk(step, errno.EACCES)), pytest.raises(StorageError) as caught:
        make_directory(tmp_path / "a/b")
    assert caught.value.message == f"cannot write '{tmp_path / named}': Permission denied"


def test_a_directory_that_somebody_else_makes_at_this_moment_is_fine(tmp_path: Path) -> None:
    class Raced(Disk):
        def make_directory(self, path: Path) -> None:
            path.mkdir()
            raise FileExistsError(errno.EEXIST, "File exists")

    with use_disk(Raced()), watched(tmp_path) as watch:
        make_directory(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir() and watch.lost() == []


def test_what_is_removed_is_gone_and_what_is_not_there_is_fine(tmp_path: Path) -> None:
    remove_file(tmp_path / "source")
    remove_file(tmp_path / "source")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "stays").write_bytes(b"")
    with (
        use_disk(failing_disk(1, errno.EACCES)),
        pytest.raises(StorageError, match=r"cannot write '.*stays': Permission denied"),
    ):
        remove_file(tmp_path / "stays")


def test_only_temporary_files_are_swept_wherever_they_lie(tmp_path: Path) -> None:
    kept = ["a/.hidden", "a/b/file.tmp", "a/.file.tmp.bak", "file"]
    gone = ["a/.file.1.tmp", "a/b/.x.2.tmp", ".y.3.tmp"]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert remove_temporaries(tmp_path) == 3
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {*kept, "source"}
    assert remove_temporaries(tmp_path) == 0


def test_the_disk_is_put_back_whatever_happens() -> None:
    before, other = files.disk, FaultyDisk()
    with pytest.raises(ValueError, match="inside"), use_disk(other):
        assert files.disk is other
        raise ValueError("inside")
    assert files.disk is before


def test_syncing_leaves_no_file_open(tmp_path: Path) -> None:
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else None
    for _ in range(20):
        write_file(tmp_path / "file", b"content")
    with pytest.raises(FileNotFoundError):
        Disk().fsync(tmp_path / "nothing")
    if opened is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == opened
