"""The local store: caches fetched from a remote, kept under ``KDCACHE_HOME`` so that a second student fetches nothing.

    store/caches/<identity>/           a cache directory, whole or a part
    store/objects/<2 hex>/<sha256>     every file once, hard-linked into the caches that have it
    store/locks/<identity>             shared lock of the users of that cache; its mtime is the time of last use
    store/locks/objects/<3 hex>        held while a file with such a digest is fetched, so no file is fetched twice
    store/locks/store                  held during eviction and changes of selections

Any number of processes can use it. It evicts whole caches, least recently used first, and never one in use. On a file
system without hard links each cache has its own copy of a file. Everything here can be fetched again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache import files as cache_files
from kdcache.cache import layout
from kdcache.cache.manifest import read_manifest
from kdcache.cache.selection import Selection, read_local, union, write_selection
from kdcache.errors import DamageError, KdcacheError, RecipeError, StorageError
from kdcache.files import FileDigest, make_directory, remove_file, write_file
from kdcache.locks import attempt, hold
from kdcache.progress import format_bytes
from kdcache.runs import home

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.manifest import Manifest

LIMIT = 100_000_000_000  # bytes, unless KDCACHE_STORE_BYTES is set
_GONE = ".removed-"

Fetch = Callable[[FileDigest, Path], None]


def default_store() -> LocalStore:
    """The store of this user, limited by ``KDCACHE_STORE_BYTES``. Raises RecipeError if that is no number of bytes."""
    limit = os.environ.get("KDCACHE_STORE_BYTES", "").replace("_", "")
    if limit and not limit.isdecimal():
        raise RecipeError(
            f"KDCACHE_STORE_BYTES is '{limit}', not a number of bytes", "Such as: KDCACHE_STORE_BYTES=100000000000"
        )
    return LocalStore(home() / "store", int(limit) if limit else LIMIT)


@dataclass(frozen=True)
class LocalStore:
    """``limit``: bytes of all caches together; a file that several caches share counts once."""

    root: Path
    limit: int = LIMIT

    @contextlib.contextmanager
    def use(self, identity: str) -> Iterator[Path]:
        """The directory of a cache, perhaps empty; it is not evicted while the block runs."""
        lock = self.root / "locks" / identity
        with hold(lock, shared=True):
            os.utime(lock)
            yield self.directory(identity)
            os.utime(lock)

    def directory(self, identity: str) -> Path:
        """The directory of a cache, whether it exists or not."""
        return self.root / "caches" / identity

    def begin(self, manifest: Manifest, origin: str) -> None:
        """Write the manifest of a cache, with the smallest selection."""
        place = self.directory(manifest.identity)
        with self._locked():
            if has_manifest(place, manifest.identity):
                return
            write_selection(place, Selection({}, text=False), complete=False, origin=origin)
            write_file(place / layout.MANIFEST, manifest.to_bytes())

    def select(self, manifest: Manifest, selection: Selection, origin: str) -> Selection:
        """Extend the selection of a cache in use and evict others to make room; returns the whole selection.

        Raises StorageError if there is not enough room.
        """
        place = self.directory(manifest.identity)
        with self._locked():
            before = read_local(place)
            wanted = Selection() if before is None else union(before.selection, selection)
            lacking = _lacking(place, wanted, manifest.contents)
            if lacking:
                self._make_room({digest.sha256: digest.size for digest in lacking}, manifest.identity)
            if before is not None:
                write_selection(place, wanted, complete=not lacking, origin=origin)
            return wanted

    def finish(self, manifest: Manifest, origin: str) -> bool:
        """Record the selection as complete if all its files are here; returns whether it is."""
        place = self.directory(manifest.identity)
        with self._locked():
            local = read_local(place)
            if local is None or local.complete:
                return True
            if _lacking(place, local.selection, manifest.contents):
                return False
            write_selection(place, local.selection, origin=origin)
            return True

    def bring(
        self, identity: str, path: str, digest: FileDigest, fetch: Fetch, check: Callable[[], None] | None = None
    ) -> bool:
        """Put a file into a cache, by a link into the store or by ``fetch``. False if it was there already.

        Waits for another thread or process that fetches the same file; ``check`` may raise to give up.
        """
        place = self.directory(identity)
        with hold(self.root / "locks" / "objects" / digest.sha256[:3], check=check):
            if is_here(place, path, digest):
                return False
            remove_file(place / path)
            if not self._has_links:
                fetch(digest, place / path)
                return True
            kept = self._object(digest.sha256)
            if not _is_whole(kept, digest):
                fetch(digest, kept)
            make_directory((place / path).parent)
            try:
                os.link(kept, place / path)
            except OSError:  # for example too many links to one file
                fetch(digest, place / path)
            else:
                cache_files.disk.fsync_directory(
                    (place / path).parent
                )  # a file that counts as fetched must survive a crash
            return True

    def adopt(self, place: Path, manifest: Manifest) -> Path:
        """Move a cache directory of the same file system into the store.

        The cache may be in use, also by this process: nothing that is there changes.
        """
        target = self.directory(manifest.identity)
        with self._locked():
            if target.exists():
                shutil.rmtree(place, ignore_errors=True)
                return target
            make_directory(target.parent)
            place.rename(target)
            cache_files.disk.fsync_directory(target.parent)
            for path, digest in manifest.contents.files.items() if self._has_links else ():
                kept = self._object(digest.sha256)
                if is_here(target, path, digest) and not kept.exists():
                    make_directory(kept.parent)
                    with contextlib.suppress(OSError):
                        os.link(target / path, kept)
                    cache_files.disk.fsync_directory(kept.parent)
            return target

    def used_bytes(self) -> int:
        """Bytes of all caches and objects; each file counts once."""
        return sum(_sizes(self.root).values())

    def remove(self, identity: str) -> bool:
        """Remove a cache, unless a process uses it (False). The caller holds the lock of the store."""
        with attempt(self.root / "locks" / identity) as free:
            if not free:
                return False
            gone = self.root / "caches" / f"{_GONE}{secrets.token_hex(4)}"
            with contextlib.suppress(FileNotFoundError):
                self.directory(identity).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        self._sweep()
        return True

    def _object(self, sha256: str) -> Path:
        return self.root / "objects" / sha256[:2] / sha256

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return hold(self.root / "locks" / "store")

    def _make_room(self, coming: Mapping[str, int], identity: str) -> None:
        """Evict other caches until ``coming`` (sha256 -> bytes) and the fetches in progress fit."""
        self._forget_removed()
        needed = sum(size for sha, size in coming.items() if not self._object(sha).is_file())
        others = sorted((other for other in self._caches() if other != identity), key=self._last_used)
        promised = {other: self._to_come(other) for other in others}
        used = self.used_bytes() + sum(promised.values())
        for other in others:
            if used + needed > self.limit and self.remove(other):
                del promised[other]
                used = self.used_bytes() + sum(promised.values())
        if used + needed > self.limit:
            busy = f"; {len(promised)} other caches are in use" if promised else ""
            raise StorageError(
                f"the local store '{self.root}' is limited to {format_bytes(self.limit)}; it holds "
                f"{format_bytes(used)} and would need {format_bytes(needed)} more{busy}",
                "Raise KDCACHE_STORE_BYTES, select less, or pull into a directory: kdcache cache pull NAME --to DIR",
            )

    def _caches(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [path.name for path in (self.root / "caches").iterdir() if not path.name.startswith(_GONE)]
        return []

    def _last_used(self, identity: str) -> float:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / "locks" / identity).stat().st_mtime
        return 0.0

    def _to_come(self, identity: str) -> int:
        """Bytes still to be fetched for a cache that a process uses."""
        place = self.directory(identity)
        with attempt(self.root / "locks" / identity) as free:
            if free:
                return 0
        try:
            local, contents = read_local(place), read_manifest(place).contents
        except KdcacheError:
            return 0
        if local is None or local.complete:
            return 0
        return sum(digest.size for digest in _lacking(place, local.selection, contents))

    def _forget_removed(self) -> None:
        """Remove what crashed processes left behind."""
        with contextlib.suppress(FileNotFoundError):
            for path in (self.root / "caches").iterdir():
                if path.name.startswith(_GONE):
                    shutil.rmtree(path, ignore_errors=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove objects that no cache links to, and temporary files."""
        for path in list((self.root / "objects").glob("*/*")):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_nlink > 1:
                    continue
                with attempt(self.root / "locks" / "objects" / path.name.lstrip(".")[:3]) as free:
                    if free and path.stat().st_nlink == 1:
                        path.unlink()

    @functools.cached_property
    def _has_links(self) -> bool:
        """Whether the file system of the store has hard links."""
        probe, other = self.root / "locks" / "linked", self.root / "locks" / f"link-{secrets.token_hex(4)}"
        try:
            probe.touch()
            os.link(probe, other)
        except OSError:
            return False
        finally:
            other.unlink(missing_ok=True)
        return True


def has_manifest(place: Path, identity: str) -> bool:
    """Whether a directory holds the manifest of that cache; a damaged one does not count."""
    with contextlib.suppress(KdcacheError):
        return (place / layout.MANIFEST).is_file() and read_manifest(place).identity == identity
    return False


def is_here(place: Path, path: str, digest: FileDigest) -> bool:
    """Whether a file of a cache is there as a plain file of the right size; its digest is checked when it is read."""
    try:
        status = (place / path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == digest.size


def _lacking(place: Path, selection: Selection, contents: Contents) -> list[FileDigest]:
    """The selected files that are not in a directory."""
    files = contents.files
    return [files[path] for path in selection.covers(contents) if not is_here(place, path, files[path])]


def _is_whole(kept: Path, digest: FileDigest) -> bool:
    from kdcache.share.transfer import file_digest

    with contextlib.suppress(DamageError):
        if kept.is_file() and file_digest(kept) == digest:
            return True
    remove_file(kept)
    return False


def _sizes(root: Path) -> dict[tuple[int, int], int]:
    """Bytes by device and inode."""
    sizes = {}
    for directory, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = (Path(directory) / name).lstat()
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sizes
