"""Transfer of files between a cache directory and a remote: streamed, verified, and durable on arrival.

A local file is hashed before it is sent, so a damaged one is never published. A remote object is hashed while it is
written and gets its name only if size and sha256 are right. A response that ends early is continued at that offset. An
object that arrives complete with the wrong hash is fetched once more; if it is wrong again, it is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import DamageError, MissingObjectError, RemoteAccessError, RemoteError
from kdcache.files import FileDigest, digest_bytes, write_stream
from kdcache.share import keys as layout

if TYPE_CHECKING:
    from kdcache.share.stores.base import Remote

SMALL = 1 << 20  # bytes; files up to this size are sent from memory: exactly the bytes that were hashed
_BLOCK = 1 << 20
_FRUITLESS = 4  # continuations without a new byte before giving up
_FETCHES = 2  # attempts to fetch an object with the right bytes

OnBytes = Callable[[int], None]


def fetch_file(remote: Remote, digest: FileDigest, target: Path, on_bytes: OnBytes | None = None) -> None:
    """Fetch the data file with that digest to ``target``: atomic, durable, verified.

    Raises DamageError (the object is missing, truncated or altered), RemoteError, StorageError.
    """
    fetch_object(remote, layout.file_key(digest.sha256), digest, target, on_bytes)


def fetch_object(remote: Remote, key: str, digest: FileDigest, target: Path, on_bytes: OnBytes | None = None) -> None:
    """Like ``fetch_file``, for any object whose size and sha256 are known."""

    def attempt(body: _Body) -> None:
        write_stream(target, body, body.check)

    _verified(remote, key, digest, attempt, on_bytes)


def check_object(remote: Remote, key: str, digest: FileDigest, on_bytes: OnBytes | None = None) -> None:
    """Read and hash an object without keeping it. Raises as ``fetch_file``."""

    def attempt(body: _Body) -> None:
        for _ in body:
            pass
        body.check()

    _verified(remote, key, digest, attempt, on_bytes)


def send_file(remote: Remote, path: Path, digest: FileDigest) -> None:
    """Send a local file. Raises DamageError if its digest is another one, RemoteError."""
    key = layout.file_key(digest.sha256)
    if digest.size <= SMALL:
        with _readable(path), path.open("rb") as file:
            data = file.read(SMALL + 1)
        if digest_bytes(data) != digest:
            raise _not_it(path)
        remote.write(key, data)
        return
    before = _stamp(path)
    if file_digest(path) != digest:
        raise _not_it(path)
    remote.write(key, path)
    if _stamp(path) != before:
        remote.delete(key)
        raise DamageError(
            f"'{path}' changed while it was sent", "Files of a cache never change: find out which program wrote it."
        )


def file_digest(path: Path) -> FileDigest:
    """Size and sha256 of a file, read block by block. Raises DamageError if it cannot be read."""
    hasher, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    with _readable(path), path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            hasher.update(block[:count])
            size += count
    return FileDigest(size, hasher.hexdigest())


def copy_file(source: Path, digest: FileDigest, target: Path) -> None:
    """Copy a file and verify it on the way. Raises DamageError, StorageError."""
    hasher = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        with source.open("rb") as file:
            while block := file.read(_BLOCK):
                hasher.update(block)
                yield block

    def check() -> None:
        if hasher.hexdigest() != digest.sha256:
            raise DamageError(f"'{source}' changed while it was copied", "Run the same command again.")

    write_stream(target, blocks(), check)


class WrongBytesError(DamageError):
    """An object arrived complete, and its size or hash is wrong."""


class _Body:
    """The bytes of an object: continued after a broken connection, and never more than ``digest.size``."""

    def __init__(self, remote: Remote, key: str, digest: FileDigest, on_bytes: OnBytes | None) -> None:
        self._remote, self._key, self._digest, self._on_bytes = remote, key, digest, on_bytes
        self._hasher, self._size = hashlib.sha256(), 0

    def __iter__(self) -> Iterator[bytes]:
        fruitless = 0
        while self._size < self._digest.size and fruitless < _FRUITLESS:
            before = self._size
            try:
                yield from self._blocks()
                if self._size < self._digest.size:
                    self._expect_whole()
            except (MissingObjectError, RemoteAccessError):
                raise
            except RemoteError:
                if self._size == before:
                    raise
            fruitless = 0 if self._size > before else fruitless + 1

    def _expect_whole(self) -> None:
        """The response ended early; raises if the object itself has the wrong size, else the connection broke."""
        entry = self._remote.head(self._key)
        if entry is None:
            raise MissingObjectError(f"'{self._key}' was deleted on {self._remote.url}")
        if entry.size != self._digest.size:
            self._size = entry.size
            self.check()

    def _blocks(self) -> Iterator[bytes]:
        for block in self._remote.read(self._key, start=self._size):
            self._size += len(block)
            if self._size > self._digest.size:
                raise self._wrong(f"has more than {self._digest.size} bytes")
            self._hasher.update(block)
            if self._on_bytes:
                self._on_bytes(len(block))
            yield block

    def check(self) -> None:
        """Raises WrongBytesError if size or sha256 differ."""
        if self._size != self._digest.size:
            raise self._wrong(f"has {self._size} bytes, expected {self._digest.size}")
        if self._hasher.hexdigest() != self._digest.sha256:
            raise self._wrong("is altered: its sha256 differs from its name")

    def _wrong(self, what: str) -> WrongBytesError:
        if self._on_bytes and self._size:
            self._on_bytes(-self._size)
        return WrongBytesError(f"'{self._key}' on {self._remote.url} {what}", _REPAIR)


_REPAIR = "Somebody who has the cache can repair it: delete that object and push the cache again under the same name."


def _verified(
    remote: Remote, key: str, digest: FileDigest, attempt: Callable[[_Body], None], on_bytes: OnBytes | None
) -> None:
    for fetch in range(_FETCHES):
        try:
            attempt(_Body(remote, key, digest, on_bytes))
        except WrongBytesError:
            if fetch + 1 == _FETCHES:
                raise
        except MissingObjectError as error:
            raise DamageError(f"'{key}' is missing on {remote.url}", _REPAIR) from error
        else:
            return


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise errors of the file system as DamageError."""
    try:
        yield
    except OSError as error:
        raise DamageError(
            f"'{path}' cannot be read: {error.strerror}", "Verify it with: kdcache cache verify PATH"
        ) from error


def _stamp(path: Path) -> tuple[int, int, int]:
    with _readable(path):
        status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _not_it(path: Path) -> DamageError:
    return DamageError(
        f"'{path}' is damaged: it is not the file that the manifest lists; it was not published",
        "Write it again with: kdcache dump-teachers RECIPE --repair",
    )
