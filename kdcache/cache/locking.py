"""One writer per cache directory: a lock of the operating system, which dies with its owner.

A side file says who holds it, so that the refusal can name a process and a machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.canonical import NotCanonicalError, canonical_json, parse_json
from kdcache.errors import DamageError, LockedError
from kdcache.files import make_directory, write_file
from kdcache.locks import attempt


@contextlib.contextmanager
def hold_lock(root: Path) -> Iterator[None]:
    """Hold the lock of a cache directory while the block runs. Raises LockedError, which names the holder."""
    state = root / layout.STATE
    if state.is_symlink() or (state / "lock").is_symlink():
        raise DamageError(f"'{state}' is a link, and what is written there would lie elsewhere", "Remove it.")
    make_directory(state)
    with attempt(state / "lock") as held:
        if not held:
            raise LockedError(
                f"cache '{root}' is being written by {_holder(state)}",
                "Wait until it is done, or stop that process and run this again.",
            )
        write_file(state / "holder.json", canonical_json({"host": socket.gethostname(), "pid": os.getpid()}))
        yield


def _holder(state: Path) -> str:
    try:
        holder = parse_json((state / "holder.json").read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, NotCanonicalError, KeyError, TypeError):
        return "another process"
