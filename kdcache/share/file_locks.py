"""Locks between processes of one machine: shared or exclusive, on a file, released by the system when their holder dies.

Each acquisition opens the file anew, so that threads of one process exclude each other as processes do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kdcache.cache.files import make_directory
from kdcache.errors import StorageError

_PAUSE = 0.02  # seconds between two attempts


@contextlib.contextmanager
def hold(path: Path, *, shared: bool = False, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock while the block runs; waits for it. ``check`` is called while waiting, and may raise to give up."""
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
    """Hold a lock while the block runs, if nobody is in the way; gives whether it is held."""
    handle = _open(path)
    try:
        yield _try(handle, shared)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        make_directory(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(f"cannot lock '{path}': {error.strerror}", "Make the place writable, or set KDCACHE_HOME.") from error


def _try(handle: int, shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
