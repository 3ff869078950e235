"""Checked reads of cache files: size and sha256 are verified at the first read, symbolic links are refused.

Bytes are hashed on their way into the result, so nothing is read twice and what was hashed is what is decoded. This
process does not hash a verified file again while its size, mtime and inode are unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from kdcache.cache.arrow_file import TableDamageError
from kdcache.cache.bases import BasisDamageError
from kdcache.cache.selection import not_here, not_yet_here
from kdcache.errors import DamageError, KdcacheError

if TYPE_CHECKING:
    from kdcache.cache.selection import LocalSelection, Selection
    from kdcache.files import FileDigest

T = TypeVar("T")
Key = tuple[int, int, int, int, str]  # device, inode, size, time of change, sha256

_found_whole: set[Key] = set()
_in_progress: dict[Key, threading.Lock] = {}
_guard = threading.Lock()

REPAIR_HINT = "Write it again with: kdcache dump-teachers RECIPE --repair"


class Arrivals(Protocol):
    """Fetches the missing files of a cache, for example from a remote. Thread-safe."""

    def wait_for(self, path: str) -> None:
        """Return when the file, by name in the manifest, is complete; fetches it before all others."""
        ...

    def select(self, selection: Selection) -> None:
        """Announce what will be needed. Raises MismatchError, StorageError if it cannot be fetched."""
        ...

    def expect(self, paths: Sequence[str]) -> None:
        """Announce the order of the next reads; files that are here are ignored."""
        ...


@contextlib.contextmanager
def enough_memory(path: str | Path, size: int) -> Iterator[None]:
    """Turn MemoryError into DamageError: a forged sparse file of terabytes is easily made."""
    try:
        yield
    except MemoryError as error:
        raise DamageError(
            f"'{path}' needs {size} bytes of memory, more than this machine has",
            "Read it on a larger machine; if no such file was dumped, the cache is forged.",
        ) from error


class CheckedFile:
    """An open file of a cache, read from front to back."""

    def __init__(self, path: str, handle: int, size: int) -> None:
        self._path, self._handle, self._left = path, handle, size
        self.hasher = hashlib.sha256()
        self.checking = True

    def readinto(self, view: memoryview) -> None:
        """Fill ``view``. Raises DamageError if the file is shorter."""
        filled = 0
        while filled < len(view):
            count = os.readv(self._handle, [view[filled:]])
            if not count:
                raise self._too_short()
            filled += count
        self._left -= filled
        if self.checking:
            self.hasher.update(view)

    def read_rest(self) -> bytes:
        """The bytes that were not read yet."""
        pieces = []
        with enough_memory(self._path, self._left):
            while self._left:
                piece = os.read(self._handle, self._left)  # all of it, so that a forged size fails at once
                if not piece:
                    raise self._too_short()
                self._left -= len(piece)
                if self.checking:
                    self.hasher.update(piece)
                pieces.append(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)  # an array of millions of ids is not copied

    def mapped(self) -> mmap.mmap:
        """All bytes of the file as mapped memory; those that were not hashed yet are hashed first."""
        block = memoryview(bytearray(1 << 20))
        while self._left and self.checking:
            self.readinto(block[: min(self._left, len(block))])
        return mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)

    def _too_short(self) -> DamageError:
        return DamageError(f"'{self._path}' ends too early", REPAIR_HINT)

    @property
    def left(self) -> int:
        return self._left


class CheckedFiles:
    """The files that a manifest lists, in the directory of the cache. Thread-safe.

    A missing file is damage, unless ``local`` says that it was not pulled, or ``arrivals`` fetches it.
    """

    def __init__(
        self,
        root: Path,
        files: Mapping[str, FileDigest],
        *,
        trust_earlier: bool = True,
        local: LocalSelection | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        self.root = root
        self._files = files
        self._trust_earlier = trust_earlier  # False: hash again, for verify
        self._local = local
        self._arrivals = arrivals

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def check_present(self, path: str) -> os.stat_result:
        """Check presence, kind and size; fetches a missing file if it can. Raises DamageError, MismatchError."""
        status = self._whole_or_none(path)
        if status is None and self._arrivals is not None:
            self._arrivals.wait_for(path)
            status = self.found(path)
        if status is None:
            raise self._missing(path)
        return status

    def check_coming(self, paths: Iterable[str]) -> None:
        """Like ``check_present`` without fetching: files that ``arrivals`` fetches count as present."""
        if self._arrivals is not None:
            return
        plain: set[str] = set()
        for path in paths:
            if self.found(path, plain) is None:
                raise self._missing(path)

    def _whole_or_none(self, path: str) -> os.stat_result | None:
        """Like ``found``; if files can be fetched, one of the wrong size counts as missing."""
        try:
            return self.found(path)
        except DamageError:
            if self._arrivals is None:
                raise
            return None

    def found(self, path: str, plain: set[str] | None = None) -> os.stat_result | None:
        """The status of a plain file of the right size, None if missing. Raises DamageError for anything else.

        ``plain`` caches directories that were checked; the parents of ``path`` are added to it.
        """
        digest, plain, place = self._files[path], set() if plain is None else plain, str(self.root)
        *directories, name = path.split("/")
        for step in directories:
            place = f"{place}/{step}"
            if place not in plain:
                if self._lstat(place) is None:
                    return None
                plain.add(place)
        place = f"{place}/{name}"
        status = self._lstat(place)
        if status is None:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise DamageError(f"'{place}' is not a plain file", REPAIR_HINT)
        if status.st_size != digest.size:
            raise DamageError(f"'{place}' has {status.st_size} bytes, the manifest says {digest.size}", REPAIR_HINT)
        return status

    @staticmethod
    def _lstat(place: str) -> os.stat_result | None:
        """The status of ``place``, None if missing. Raises DamageError for a symbolic link."""
        try:
            status = os.lstat(place)
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise DamageError(f"'{place}' is missing", REPAIR_HINT) from error
        except OSError as error:
            raise DamageError(f"'{place}' cannot be read: {error.strerror}", REPAIR_HINT) from error
        if stat.S_ISLNK(status.st_mode):
            raise DamageError(f"'{place}' is a symbolic link; a cache holds plain files only", REPAIR_HINT)
        return status

    def _missing(self, path: str) -> KdcacheError:
        if self._local is not None and not self._local.selection.takes(path):
            return not_here(self.root, self._local, path)
        if self._local is not None and not self._local.complete:
            return not_yet_here(self.root, self._local, path)
        return DamageError(f"'{self.root / path}' is missing", REPAIR_HINT)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[CheckedFile]:
        """Open a file to be read to its end; the digest is compared at the end of the block. Raises DamageError."""
        digest = self._files[path]
        status = self.check_present(path)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, digest.sha256)
        try:
            handle = os.open(self.root / path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DamageError(f"'{self.root / path}' cannot be read: {error.strerror}", REPAIR_HINT) from error
        try:
            with self._first_read(key) as first:
                file = CheckedFile(str(self.root / path), handle, digest.size)
                file.checking = first
                yield file
                if first:
                    self._compare(path, file, digest)
                    with _guard:
                        _found_whole.add(key)
        finally:
            os.close(handle)

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises DamageError."""
        with self.open(path) as file:
            return file.read_rest()

    def decode(self, path: str, decode: Callable[[bytes], T]) -> T:
        """``decode(bytes of the file)``; errors of ``decode`` become a DamageError that names the file."""
        data = self.read(path)
        with self.naming(path):
            return decode(data)

    def map(self, path: str) -> mmap.mmap:
        """The bytes of a file as mapped memory, which is nobody's as long as it is not read. Raises DamageError."""
        with self.open(path) as file:
            return file.mapped()

    @contextlib.contextmanager
    def naming(self, path: str) -> Iterator[None]:
        """Errors of a decoder become a DamageError that names the file."""
        try:
            yield
        except (TableDamageError, BasisDamageError, UnicodeDecodeError) as error:
            raise self.damage(path, error) from error

    def check(self, path: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Read and hash a file without keeping it. Raises DamageError."""
        with self.open(path) as file:
            block = memoryview(bytearray(1 << 20))
            while file.left:
                count = min(file.left, len(block))
                file.readinto(block[:count])
                if on_bytes:
                    on_bytes(count)

    def damage(self, path: str, reason: object) -> DamageError:
        """The error for a file with the right digest whose content contradicts the manifest."""
        return DamageError(f"'{self.root / path}' {reason}", REPAIR_HINT)

    @contextlib.contextmanager
    def _first_read(self, key: Key) -> Iterator[bool]:
        """Whether this read must hash; waits for another thread that hashes the same file."""
        with _guard:
            lock = (
                None if key in _found_whole and self._trust_earlier else _in_progress.setdefault(key, threading.Lock())
            )
        if lock is None:
            yield False
            return
        try:
            with lock:
                with _guard:
                    first = key not in _found_whole or not self._trust_earlier
                yield first
        finally:
            with _guard:
                _in_progress.pop(key, None)

    def _compare(self, path: str, file: CheckedFile, digest: FileDigest) -> None:
        if file.left:
            file.read_rest()
        if file.hasher.hexdigest() != digest.sha256:
            hint = (
                REPAIR_HINT
                if self._arrivals is None
                else f"Remove it and run the same command again: rm '{self.root / path}'"
            )
            raise DamageError(f"'{self.root / path}' is not the file that the manifest lists: its sha256 differs", hint)
