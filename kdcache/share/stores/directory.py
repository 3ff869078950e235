"""A directory as a remote: a shared disk, or a folder of this machine.

Objects are files under their keys. Each is written under a temporary name, fsynced, and renamed (for ``create``:
hard-linked, which is atomic and fails if the name exists), then its directory is fsynced. All of it goes through
``kdcache.files``, so tests can inject faults. Names with a leading dot are temporary files and no objects. The clock is
that of the file system: the modification time of a probe file.

The directory is not trusted: a symbolic link, a pipe or a device in the place of an object is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from kdcache import files
from kdcache.errors import DamageError, MissingObjectError, RemoteAccessError, RemoteError, StorageError
from kdcache.files import TEMPORARY, create_file, remove_file, write_file, write_stream
from kdcache.share.stores.base import Entry, check_key, check_prefix, holds, is_key

BLOCK = 1 << 20  # bytes of one block of ``read``
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class DirectoryRemote:
    """Objects under ``root``, which must exist: an unmounted shared disk must not look like an empty remote."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def __repr__(self) -> str:
        return f"DirectoryRemote({self.url!r})"

    @property
    def url(self) -> str:
        return str(self._root)

    @property
    def where(self) -> str:
        return self.url

    @property
    def filesystem(self) -> str:
        return filesystem(self._root)

    @cached_property
    def conditional(self) -> bool:
        """Whether the file system has hard links, which ``create`` needs; tried once."""
        probe = f".probe-{secrets.token_hex(8)}{TEMPORARY}"
        target, link = self._root / probe, self._root / f".{probe}"
        with self._explained("create"):
            files.disk.write(target, [b""])
            try:
                files.disk.link(target, link)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL):
                    return False
                raise
            finally:
                for path in (target, link):
                    with contextlib.suppress(FileNotFoundError):
                        files.disk.remove(path)
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        self._need_root()
        return self._walk(prefix.rpartition("/")[0], prefix)

    def head(self, key: str) -> Entry | None:
        path = self._path(key)
        with self._explained("look for", key):
            try:
                status = path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if stat.S_ISDIR(status.st_mode):  # a folder of keys is not an object
            return None
        self._need_file(key, status)
        return Entry(key, status.st_size, status.st_mtime)

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        return self._blocks(key, self._path(key), start, length)

    def read_bytes(self, key: str, limit: int) -> bytes:
        data = b"".join(self.read(key, length=limit + 1))
        if len(data) > limit:
            raise DamageError(f"'{key}' on {self.url} has more than the {limit} bytes it may have")
        return data

    def write(self, key: str, source: Path | bytes) -> None:
        path = self._path(key)
        with self._explained("write", key):
            if isinstance(source, bytes):
                write_file(path, source)
            else:
                write_stream(path, _file_blocks(source), lambda: None)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if self.conditional:
            with self._explained("create", key):
                if create_file(path, data):
                    return True
        there = holds(self, key, data)
        if there is None and self.conditional:
            raise RemoteError(
                f"'{key}' on {self.url} was removed while it was being created", "Run the same command again."
            )
        if there is None:
            self.write(key, data)
        return there is not False

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained("delete", key):
            if path.parent.is_dir() and not path.is_dir():
                remove_file(path)
                files.disk.fsync_directory(path.parent)

    def now(self) -> float:
        self._need_root()
        probe = self._root / f".clock-{secrets.token_hex(8)}{TEMPORARY}"
        with self._explained("read the clock of"):
            try:
                files.disk.write(probe, [b"?"])
                return probe.stat().st_mtime
            finally:
                with contextlib.suppress(FileNotFoundError):
                    files.disk.remove(probe)

    def compares_and_swaps(self) -> None:
        return None

    def remove_leftovers(self, age: float) -> int:
        removed, before = 0, self.now() - age
        with self._explained("tidy up"):
            for folder, _, names in os.walk(self._root):
                for name in names:
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        if name.startswith(".") and name.endswith(TEMPORARY) and path.lstat().st_mtime < before:
                            files.disk.remove(path)
                            removed += 1
        return removed

    def remove_empty_folders(self, prefix: str) -> None:
        for folder, _, _ in os.walk(self._path(prefix), topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()

    def _walk(self, folder: str, prefix: str) -> Iterator[Entry]:
        """In the order of keys: a folder sorts as its name with a slash."""
        with self._explained("list", folder):
            try:
                entries = list(os.scandir(self._root / folder))
            except (FileNotFoundError, NotADirectoryError):
                return
        keyed = []
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if is_key(key) and not entry.is_symlink():
                keyed.append((f"{key}/" if entry.is_dir() else key, entry))
        for key, entry in sorted(keyed, key=lambda pair: pair[0]):
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key[:-1], prefix)
            elif key.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield Entry(key, status.st_size, status.st_mtime)

    def _blocks(self, key: str, path: Path, start: int, length: int | None) -> Iterator[bytes]:
        with self._explained("read", key):
            try:
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                raise MissingObjectError(f"there is no '{key}' on {self.url}") from None
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                os.close(handle)
                raise MissingObjectError(f"there is no '{key}' on {self.url}")
            with open(handle, "rb", buffering=0) as file:  # noqa: PTH123  (a descriptor)
                self._need_file(key, os.fstat(handle))
                file.seek(start)
                left = length
                while left is None or left > 0:
                    block = file.read(BLOCK if left is None else min(BLOCK, left))
                    if not block:
                        return
                    left = None if left is None else left - len(block)
                    yield block

    def _path(self, key: str) -> Path:
        """The file of an object. Raises RemoteError if its path contains a symbolic link."""
        check_key(key)
        self._need_root()
        path = self._root
        for part in key.split("/"):
            path = path / part
            if path.is_symlink():
                raise RemoteError(
                    f"the path of '{key}' on {self.url} contains the link '{path}'",
                    "Remove it: a remote holds no links.",
                )
        return path

    def _need_root(self) -> None:
        if not self._root.is_dir():
            raise RemoteError(
                f"there is no directory '{self.url}'", "Mount the disk that it is on, or make it with mkdir."
            )

    def _need_file(self, key: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise RemoteError(f"'{key}' on {self.url} is no plain file", "Remove it: a remote holds files only.")

    @contextlib.contextmanager
    def _explained(self, action: str, key: str = "") -> Iterator[None]:
        """Raise errors of the file system as RemoteError."""
        what = f"cannot {action} '{key}' on {self.url}" if key else f"cannot {action} {self.url}"
        try:
            yield
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _DENIED:
                raise self._denied(what, cause) from error
            raise RemoteError(f"{what}: {error.message}", error.hint) from error
        except OSError as error:
            if error.errno in _DENIED:
                raise self._denied(what, error) from error
            raise RemoteError(
                f"{what}: {error.strerror or error}", "Look at the disk, then run the same command again."
            ) from error

    def _denied(self, what: str, error: OSError) -> RemoteAccessError:
        return RemoteAccessError(
            f"{what}: {error.strerror}",
            "Ask for write access there; without it, pull works and push does not.",
        )


def _file_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def filesystem(path: Path) -> str:
    """The type of the file system of ``path``, as Linux names it; empty if unknown."""
    best, kind = "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            fields = line.split(" ")
            point = fields[4].encode().decode("unicode_escape")
            if len(point) >= len(best) and path.resolve().is_relative_to(point):
                best, kind = point, fields[fields.index("-") + 1]
    return kind
