"""File locks between processes of one machine, shared or exclusive; the system releases them when the holder dies.

Each acquisition opens the file again, so threads of one process exclude each other as processes do. The ``filelock``
package, which kdcache 0.1.0 used, also calls ``flock`` on Linux and macOS, so both versions exclude each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kdcache.errors import LockedError, StorageError
from kdcache.files import make_directory

_PAUSE = 0.02  # seconds between two attempts


@contextlib.contextmanager
def hold(path: Path, *, shared: bool = False, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Wait for a lock and hold it while the block runs; ``check`` is called while waiting and may raise to give up."""
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
    """Hold a lock while the block runs if it is free; yields True if this call got it."""
    handle = _open(path)
    try:
        yield _try(handle, shared)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(path: Path, *, busy: Callable[[], str]) -> Iterator[None]:
    """Hold a lock while the block runs. Raises LockedError with the message ``busy()`` if another holds it."""
    with attempt(path) as held:
        if not held:
            raise LockedError(busy(), "Wait until it is done, or stop that process and run the same command again.")
        yield


def _open(path: Path) -> int:
    make_directory(path.parent)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        hint = f"Make '{path.parent}' writable. For files that kdcache keeps for reuse, set KDCACHE_HOME instead."
        raise StorageError(f"cannot lock '{path}': {error.strerror}", hint) from error


def _try(handle: int, shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            f"the file system has no locks between processes: {error.strerror}",
            "Mount it with locks (NFS 4, Lustre with -o flock), or write to another disk.",
        ) from error
    return True
