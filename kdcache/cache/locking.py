"""The lock that allows one writer per cache directory; a file beside it names the holder for the error message."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.canonical import NotCanonicalError, canonical_json, parse_json
from kdcache.errors import DamageError
from kdcache.files import make_directory, write_file
from kdcache.locks import exclusive


@contextlib.contextmanager
def hold_lock(root: Path) -> Iterator[None]:
    """Hold the lock of a cache directory while the block runs. Raises LockedError, which names the holder."""
    state = root / layout.STATE
    if state.is_symlink() or (state / "lock").is_symlink():
        raise DamageError(f"'{state}' is a symbolic link to another place", "Remove it.")
    make_directory(state)
    with exclusive(state / "lock", busy=lambda: f"cache '{root}' is being written by {_holder(state)}"):
        write_file(state / "holder.json", canonical_json({"host": socket.gethostname(), "pid": os.getpid()}))
        yield


def _holder(state: Path) -> str:
    try:
        holder = parse_json((state / "holder.json").read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, NotCanonicalError, KeyError, TypeError):
        return "another process"
