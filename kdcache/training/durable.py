"""Durable large files and directories: written, synced, renamed, the parent synced, before the call returns.

Checkpoints and models are streamed, because a second copy in memory would be too large. Every step goes through the
``disk`` of ``kdcache.files``, where tests inject faults.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from kdcache import files
from kdcache.errors import LockedError, StorageError
from kdcache.locks import attempt


class DurableFile:
    """A new file open for writing; synced when the ``with`` block ends without an error. Raises StorageError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _step(path, lambda: files.disk.write(path, []))
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
                _step(self._path, lambda: files.disk.fsync(self._path))


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file in a directory that is not published yet."""
    with DurableFile(path) as file:
        file.write(data)


def publish_directory(temporary: Path, final: Path) -> None:
    """Rename a directory of synced files to ``final``, durably, replacing an existing one. Raises StorageError."""
    _step(final, lambda: files.disk.fsync_directory(temporary))
    replaced = temporary.with_name(f".{final.name}.old.tmp")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        _step(final, lambda: files.disk.rename(final, replaced))
    _step(final, lambda: files.disk.rename(temporary, final))
    _step(final, lambda: files.disk.fsync_directory(final.parent))
    shutil.rmtree(replaced, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Sync all files and directories below ``directory``, written by another library. Raises StorageError."""
    for path in sorted(directory.rglob("*")):
        sync = files.disk.fsync if path.is_file() else files.disk.fsync_directory
        _step(path, lambda path=path, sync=sync: sync(path))  # type: ignore[misc]


def remove_directory(path: Path) -> None:
    """Rename a directory, then delete it: an interruption does not leave a partial directory."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    _step(path, lambda: files.disk.rename(path, hidden))
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files and directories (``.<name>.tmp``) of an interrupted writer."""
    for path in directory.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def hold_lock(directory: Path, what: str) -> Iterator[None]:
    """Hold the lock of ``directory``; LockedError if another process has it. It is released when the process ends."""
    files.make_directory(directory)
    with attempt(directory / ".lock") as held:
        if not held:
            hint = "Wait until it ends, or stop it and run the same command again: it continues."
            raise LockedError(f"another process is at work on the {what} in '{directory}'", hint)
        yield


def _step(path: Path, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        raise _storage_error(path, error) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    hint = "Free disk space, or make the place writable, then run the same command again: it continues."
    return StorageError(f"cannot write '{path}': {reason}", hint)
