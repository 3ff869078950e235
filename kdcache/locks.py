"""Locks between processes of one machine: shared or exclusive, on a file, released by the system when their holder
dies.

Each acquisition opens the file anew, so threads of one process exclude each other as processes do. ``flock`` is what
the ``filelock`` package takes on Linux and macOS too, so kdcache 0.1.0 and this version exclude each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kdcache.errors import StorageError
from kdcache.files import make_directory

_PAUSE = 0.02  # seconds between two attempts


@contextlib.contextmanager
def hold(path: Path, *, shared: bool = False, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Wait for a lock and hold it while the block runs. ``check`` is called while waiting, and may raise to give up."""
    handle = _open(path)
    try:
        while not _try(handle, shared):
            if check is not None:
                check()
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def attempt(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold a lock while the block runs if it is free; yields whether it is held."""
    handle = _open(path)
    try:
        yield _try(handle, shared)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        make_directory(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        hint = f"Make '{path.parent}' writable; what is kept for reuse can lie elsewhere: set KDCACHE_HOME."
        raise StorageError(f"cannot lock '{path}': {error.strerror}", hint) from error


def _try(handle: int, shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
