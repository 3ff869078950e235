"""The only place that writes: every file arrives whole and durable, or not at all.

A file is written under a temporary name, fsynced, renamed, and its directory fsynced; none of zarr, pyarrow and
safetensors does that by itself. Each system step goes through one small object, ``disk``, which fault injection
replaces to die or to fail at the n-th step. So what is tested is the order of steps that runs in production.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import StorageError

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".tmp"  # names: .<name>.<random>.tmp


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a manifest says of a file; a large cache has ten thousands of them."""

    size: int
    sha256: str


def digest_bytes(data: Buffer) -> FileDigest:
    """Size and sha256 of bytes in memory."""
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


class Disk:
    """The system steps, one method each. Stateless, so that a replacement can wrap it."""

    def write(self, path: Path, buffers: Iterable[Buffer]) -> None:
        with path.open("xb") as file:
            for buffer in buffers:
                file.write(buffer)

    def fsync(self, path: Path) -> None:
        _fsync(path)

    def link(self, source: Path, target: Path) -> None:
        """A second name of a file; FileExistsError where the name is taken, decided in one step."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def fsync_directory(self, path: Path) -> None:
        _fsync(path)

    def make_directory(self, path: Path) -> None:
        path.mkdir()

    def remove(self, path: Path) -> None:
        path.unlink()


disk: Disk = Disk()


@contextlib.contextmanager
def use_disk(replacement: Disk) -> Iterator[None]:
    """Send every step through ``replacement`` while the block runs."""
    global disk
    before, disk = disk, replacement
    try:
        yield
    finally:
        disk = before


def write_file(path: Path, data: Buffer | Iterable[Buffer]) -> FileDigest:
    """Write ``data`` to ``path``, durably and atomically, and give back its size and sha256.

    Missing directories are made. An existing file is replaced in one step. Raises StorageError (disk full, permission).
    """
    buffers = [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    _put(path, buffers, lambda: None)
    return FileDigest(sum(len(buffer) for buffer in buffers), digest.hexdigest())


def write_stream(path: Path, blocks: Iterable[Buffer], check: Callable[[], None]) -> None:
    """As ``write_file``, a block at a time.

    The file takes its name only if ``check`` raises nothing once all are written.
    """
    _put(path, blocks, check)


def create_file(path: Path, data: Buffer) -> bool:
    """As ``write_file``, if nothing has that name: of several callers exactly one gets True. Raises StorageError."""

    def publish(temporary: Path) -> None:
        disk.link(temporary, path)
        disk.remove(temporary)

    try:
        _put(path, [data], lambda: None, publish)
    except FileExistsError:
        return False
    return True


def share_file(source: Path, target: Path) -> None:
    """Give a file that never changes a second name, durably.

    A copy where the file system has no hard links. Raises StorageError.
    """
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}{TEMPORARY}"
    make_directory(target.parent)
    try:
        disk.link(source, temporary)
    except OSError:
        write_file(target, source.read_bytes())
        return
    try:
        _step(target, lambda: disk.rename(temporary, target))
    finally:
        with contextlib.suppress(OSError):
            # where renaming failed, and where both names were of one file already: then it does nothing
            temporary.unlink()
    _step(target, lambda: disk.fsync_directory(target.parent))


def _put(
    path: Path, blocks: Iterable[Buffer], check: Callable[[], None], publish: Callable[[Path], None] | None = None
) -> None:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}"
    make_directory(path.parent)
    try:
        _step(path, lambda: disk.write(temporary, blocks))
        check()
        _step(path, lambda: disk.fsync(temporary))
        _step(path, lambda: publish(temporary) if publish else disk.rename(temporary, path))
        _step(path, lambda: disk.fsync_directory(path.parent))
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def make_directory(path: Path) -> None:
    """Make ``path`` and its parents, each made durable in its own parent. Raises StorageError."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            _step(directory, lambda directory=directory: disk.make_directory(directory))  # type: ignore[misc]
        _step(directory, lambda directory=directory: disk.fsync_directory(directory.parent))  # type: ignore[misc]


def remove_file(path: Path) -> None:
    """Remove ``path`` if it is there. Raises StorageError."""
    with contextlib.suppress(FileNotFoundError):
        _step(path, lambda: disk.remove(path))


def remove_temporaries(root: Path) -> int:
    """Remove what an interrupted writer left under temporary names.

    Gives back how many files. The caller holds the lock.
    """
    removed = 0
    for directory, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(TEMPORARY):
                remove_file(Path(directory) / name)
                removed += 1
    return removed


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step(path: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = (
            "Free some space and run the same command again: what is written is kept."
            if full
            else "Make the place writable and run the same command again."
        )
        raise StorageError(f"cannot write '{path}': {error.strerror or error}", hint) from error
