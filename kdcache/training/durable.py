"""Files that are on the disk when the call returns: written, synced, renamed, the directory synced.

Checkpoints are too large to hold in memory a second time, so they are streamed here rather than passed as bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from kdcache.errors import StorageError


class DurableFile:
    """A new file open for writing; synced when the ``with`` block ends without an error. Raises StorageError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def write(self, data: memoryview | bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise _storage_error(self._path, error) from error

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _storage_error(self._path, error) from error
        finally:
            self._file.close()


def write_durably(path: Path, data: bytes) -> None:
    """A small file of a directory that is not published yet."""
    with DurableFile(path) as file:
        file.write(data)


def publish_directory(temporary: Path, final: Path) -> None:
    """Rename a directory whose files are synced; then it is there for good. Raises StorageError."""
    try:
        _sync_directory(temporary)
        temporary.rename(final)
        _sync_directory(final.parent)
    except OSError as error:
        raise _storage_error(final, error) from error


def publish_file(temporary: Path, final: Path) -> None:
    """Rename a synced file over ``final``; then it is there for good. Raises StorageError."""
    try:
        temporary.replace(final)
        _sync_directory(final.parent)
    except OSError as error:
        raise _storage_error(final, error) from error


def sync_tree(directory: Path) -> None:
    """Sync files that another library wrote, and their directories. Raises StorageError."""
    try:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            else:
                _sync_directory(path)
    except OSError as error:
        raise _storage_error(directory, error) from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(
        f"'{path}' could not be written: {reason}", "Free disk space or fix the permission, then run the same command again."
    )
