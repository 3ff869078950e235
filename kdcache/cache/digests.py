"""Reading files of a cache: size and sha256 checked at a process's first read, links refused.

What is digested is what is decoded: bytes go from the file into the result and through sha256 on the way, so nothing is
read twice. A file that was found whole is not digested again by this process while its size, time and inode stay the
same.
"""

from __future__ import annotations

import contextlib
import hashlib
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
    """Files of a cache that are on their way here, from a remote or from anywhere.

    Safe to call from several threads.
    """

    def wait_for(self, path: str) -> None:
        """Give back once the file, by its name in the manifest, is there whole; it is fetched before all others."""
        ...

    def select(self, selection: Selection) -> None:
        """Say what will be needed of the cache. MismatchError, StorageError where it cannot be had."""
        ...

    def expect(self, paths: Sequence[str]) -> None:
        """Say in which order files will be wanted next; those that are there already are left out."""
        ...


@contextlib.contextmanager
def enough_memory(path: str | Path, size: int) -> Iterator[None]:
    """DamageError in the place of MemoryError: a sparse file of terabytes costs its author nothing."""
    try:
        yield
    except MemoryError as error:
        raise DamageError(
            f"'{path}' needs {size} bytes of memory, more than there are",
            "Read it on a machine that has them; if no such file was dumped, the cache is forged.",
        ) from error


class CheckedFile:
    """An open file of a cache, read from front to back."""

    def __init__(self, path: str, handle: int, size: int) -> None:
        self._path, self._handle, self._left = path, handle, size
        self.hasher = hashlib.sha256()
        self.checking = True

    def readinto(self, view: memoryview) -> None:
        """Fill ``view``; DamageError where the file ends before."""
        filled = 0
        while filled < len(view):
            count = os.readv(self._handle, [view[filled:]])
            if not count:
                raise DamageError(f"'{self._path}' ends too early", REPAIR_HINT)
            filled += count
        self._left -= filled
        if self.checking:
            self.hasher.update(view)

    def read_rest(self) -> bytes:
        """All that was not read yet."""
        with enough_memory(self._path, self._left):
            data = bytearray(self._left)
            self.readinto(memoryview(data))
            return bytes(data)

    @property
    def left(self) -> int:
        return self._left


class CheckedFiles:
    """The files that a manifest lists, under the directory of the cache. Safe to use from several threads.

    A file that is not there is damage, unless ``local`` says that it was never pulled, or ``arrivals`` brings it.
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
        self._trust_earlier = trust_earlier  # False: digest again, for verify
        self._local = local
        self._arrivals = arrivals

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def check_present(self, path: str) -> os.stat_result:
        """Presence, kind and size, without reading.

        Waits for a file that is on its way. Raises DamageError, MismatchError.
        """
        found = self._whole_or_none(path)
        if found is None and self._arrivals is not None:
            self._arrivals.wait_for(path)
            found = self.found(path)
        if found is None:
            raise self._missing(path)
        return found

    def check_coming(self, paths: Iterable[str]) -> None:
        """As ``check_present``, but without waiting: a file that is on its way is as good as there."""
        if self._arrivals is not None:
            return
        plain: set[str] = set()
        for path in paths:
            if self.found(path, plain) is None:
                raise self._missing(path)

    def _whole_or_none(self, path: str) -> os.stat_result | None:
        """``found``; where files can be fetched again, one of another size is as good as absent."""
        try:
            return self.found(path)
        except DamageError:
            if self._arrivals is None:
                raise
            return None

    def found(self, path: str, plain: set[str] | None = None) -> os.stat_result | None:
        """A plain file of the right size, or None where there is nothing. Raises DamageError for anything else.

        Directories of ``plain``, to which those on the way are added, were looked at a moment ago: files have most in
        common.
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
        found = self._lstat(place)
        if found is None:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise DamageError(f"'{place}' is not a plain file", REPAIR_HINT)
        if found.st_size != digest.size:
            raise DamageError(f"'{place}' has {found.st_size} bytes, the manifest says {digest.size}", REPAIR_HINT)
        return found

    @staticmethod
    def _lstat(place: str) -> os.stat_result | None:
        """Of anything but a link, None where there is nothing. Raises DamageError."""
        try:
            found = os.lstat(place)
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise DamageError(f"'{place}' is missing", REPAIR_HINT) from error
        except OSError as error:
            raise DamageError(f"'{place}' cannot be read: {error.strerror}", REPAIR_HINT) from error
        if stat.S_ISLNK(found.st_mode):
            raise DamageError(f"'{place}' is a link; a cache holds plain files only", REPAIR_HINT)
        return found

    def _missing(self, path: str) -> KdcacheError:
        if self._local is not None and not self._local.selection.takes(path):
            return not_here(self.root, self._local, path)
        if self._local is not None and not self._local.complete:
            return not_yet_here(self.root, self._local, path)
        return DamageError(f"'{self.root / path}' is missing", REPAIR_HINT)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[CheckedFile]:
        """The file, to be read to its end inside the block.

        At the end of it the digest is compared. Raises DamageError.
        """
        digest = self._files[path]
        found = self.check_present(path)
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, digest.sha256)
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
        """What ``decode`` makes of the bytes of a file.

        Raises DamageError, which names the file, where it refuses them.
        """
        data = self.read(path)
        try:
            return decode(data)
        except (TableDamageError, BasisDamageError, UnicodeDecodeError) as error:
            raise self.damage(path, error) from error

    def check(self, path: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Read a file to its end without keeping it. Raises DamageError."""
        with self.open(path) as file:
            block = memoryview(bytearray(1 << 20))
            while file.left:
                count = min(file.left, len(block))
                file.readinto(block[:count])
                if on_bytes:
                    on_bytes(count)

    def damage(self, path: str, reason: object) -> DamageError:
        """The error for a file whose digest is right and whose content is not what the manifest implies."""
        return DamageError(f"'{self.root / path}' {reason}", REPAIR_HINT)

    @contextlib.contextmanager
    def _first_read(self, key: Key) -> Iterator[bool]:
        """Whether this read must digest; another thread's first read of the same file is waited for."""
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
