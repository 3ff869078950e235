"""Atomic, durable writes of files and directories. All of kdcache writes through this module.

A file or directory is written under a temporary name, fsynced and renamed, and its parent directory is fsynced. After a
crash or a power cut it is complete or absent. zarr, pyarrow and safetensors give no such guarantee. Small files are
passed as bytes; checkpoints and models, which are too large to be in memory twice, are streamed into a ``DurableFile``
of a temporary directory, which ``publish_directory`` renames.

Each system call goes through the object ``disk``. Fault injection replaces it and dies or fails at the n-th call, so
the tests exercise the order of calls that runs in production.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kdcache.errors import StorageError

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".tmp"  # names: .<name>.<random>.tmp


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and hash of a file, as listed in a manifest. Has slots: a large cache has tens of thousands of files."""

    size: int
    sha256: str


def digest_bytes(data: Buffer) -> FileDigest:
    """Size and sha256 of bytes in memory."""
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


class Disk:
    """The system calls, one method each. Stateless, so that a replacement can wrap it."""

    def write(self, path: Path, buffers: Iterable[Buffer]) -> None:
        with path.open("xb") as file:
            for buffer in buffers:
                file.write(buffer)

    def fsync(self, path: Path) -> None:
        _fsync(path)

    def link(self, source: Path, target: Path) -> None:
        """Make a hard link. Atomic; raises FileExistsError if ``target`` exists."""
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
    """Send every system call through ``replacement`` while the block runs."""
    global disk
    before, disk = disk, replacement
    try:
        yield
    finally:
        disk = before


def write_file(path: Path, data: Buffer | Iterable[Buffer]) -> FileDigest:
    """Write ``data`` to ``path`` atomically and durably, and return its size and sha256.

    Makes missing directories. Replaces an existing file. Raises StorageError (disk full, permission).
    """
    buffers = [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    _put(path, buffers, lambda: None)
    return FileDigest(sum(len(buffer) for buffer in buffers), digest.hexdigest())


def replace_file(path: Path, data: bytes) -> None:
    """Like ``write_file``, for a file with one writer: the next call replaces a temporary file that a crash left."""
    temporary = path.parent / f".{path.name}{TEMPORARY}"
    remove_file(temporary)
    _put(path, [data], lambda: None, temporary=temporary)


def write_stream(path: Path, blocks: Iterable[Buffer], check: Callable[[], None]) -> None:
    """Like ``write_file``, block by block; ``check`` runs after the last block and may raise to discard the file."""
    _put(path, blocks, check)


def create_file(path: Path, data: Buffer) -> bool:
    """Like ``write_file``, unless ``path`` exists. Of concurrent callers exactly one gets True. Raises StorageError."""

    def publish(temporary: Path) -> None:
        disk.link(temporary, path)
        disk.remove(temporary)

    try:
        _put(path, [data], lambda: None, publish)
    except FileExistsError:
        return False
    return True


def share_file(source: Path, target: Path) -> None:
    """Hard-link an immutable file to ``target``, durably; copy it if the file system has no links.

    Raises StorageError.
    """
    temporary = _temporary(target)
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
            # needed if the rename failed, and if both names already link to one file: then rename does nothing
            temporary.unlink()
    _step(target, lambda: disk.fsync_directory(target.parent))


class DurableFile:
    """A new file open for writing; fsynced when the ``with`` block ends without an error. Raises StorageError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _step(path, lambda: disk.write(path, []))
        self._file = path.open("ab")

    def write(self, data: memoryview | bytes) -> None:
        _step(self._path, lambda: self._file.write(data))

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _step(self._path, self._file.close)
        finally:
            if kind is None:
                _step(self._path, lambda: disk.fsync(self._path))


def publish_directory(temporary: Path, final: Path) -> None:
    """Rename a directory of fsynced files to ``final``, durably, in place of what was there. Raises StorageError."""
    _step(final, lambda: disk.fsync_directory(temporary))
    replaced = temporary.with_name(f".{final.name}.old{TEMPORARY}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        _step(final, lambda: disk.rename(final, replaced))
    _step(final, lambda: disk.rename(temporary, final))
    _step(final, lambda: disk.fsync_directory(final.parent))
    shutil.rmtree(replaced, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Fsync the files that another library wrote, and their directories. Raises StorageError."""
    for path in sorted(directory.rglob("*")):
        sync = disk.fsync if path.is_file() else disk.fsync_directory
        _step(path, lambda path=path, sync=sync: sync(path))  # type: ignore[misc]


def remove_directory(path: Path) -> None:
    """Remove a directory; if interrupted, no half of it is left under its name. Raises StorageError."""
    hidden = path.with_name(f".{path.name}.old{TEMPORARY}")
    shutil.rmtree(hidden, ignore_errors=True)
    _step(path, lambda: disk.rename(path, hidden))
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files and directories that an interrupted writer left in ``directory`` itself."""
    for path in directory.glob(f".*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}"


def _put(
    path: Path,
    blocks: Iterable[Buffer],
    check: Callable[[], None],
    publish: Callable[[Path], None] | None = None,
    temporary: Path | None = None,
) -> None:
    temporary = temporary or _temporary(path)
    make_directory(path.parent)
    try:
        _step(path, lambda: disk.write(temporary, blocks))
        check()
        _step(path, lambda: disk.fsync(temporary))
        _step(path, lambda: publish(temporary) if publish else disk.rename(temporary, path), (FileExistsError,))
        _step(path, lambda: disk.fsync_directory(path.parent))
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def absolute(path: Path) -> Path:
    """The absolute path; links are followed, but a file keeps the name that it was given, which has its ending."""
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def make_directory(path: Path) -> None:
    """Make ``path`` and its missing parents, durably. Raises StorageError."""
    missing = []
    parent = path
    while not parent.is_dir():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        try:
            _step(directory, lambda name=directory: disk.make_directory(name), (FileExistsError,))  # type: ignore[misc]
        except FileExistsError as error:
            if not directory.is_dir():  # else another process made it meanwhile
                raise StorageError(
                    f"cannot write '{directory}': it is a file, not a directory", "Name another place."
                ) from error
        _step(directory, lambda name=directory: disk.fsync_directory(name.parent))  # type: ignore[misc]


def remove_file(path: Path) -> None:
    """Remove ``path`` if it is there. Raises StorageError."""
    with contextlib.suppress(FileNotFoundError):
        _step(path, lambda: disk.remove(path), (FileNotFoundError,))


def remove_temporaries(root: Path) -> int:
    """Remove the temporary files of interrupted writers anywhere below ``root``; returns their number.

    The caller holds the lock of ``root``.
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


def _step(path: Path, action: Callable[[], object], expected: tuple[type[OSError], ...] = ()) -> None:
    """Run one system call. Raises ``expected`` errors unchanged, every other OSError as StorageError."""
    try:
        action()
    except expected:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = (
            "Free some space and run the same command again: what is written is kept."
            if full
            else "Make the place writable and run the same command again."
        )
        raise StorageError(f"cannot write '{path}': {error.strerror or error}", hint) from error
