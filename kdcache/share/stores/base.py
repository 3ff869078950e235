"""The seam between the sharing protocol and the store where a team keeps its caches.

A remote is a flat namespace of objects. It guarantees little: a write is atomic, and a list shows every completed
write. The guarantees of push, pull and gc are built on these calls, and on ``create`` if the store has conditional
creates. The implementations are a directory on a shared disk and an object store; both pass the same contract tests,
``kdcache.testing.remote_contract``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kdcache.errors import DamageError, MissingObjectError, RemoteError


@dataclass(frozen=True)
class Entry:
    """An existing object. ``modified``: seconds since 1970 on the store's own clock, at least to the second."""

    key: str
    size: int
    modified: float


class Remote(Protocol):
    """Objects by key. Keys are relative POSIX paths, see ``kdcache.share.keys``. Thread-safe.

    Implementations retry transient faults.

    Raises:
        RemoteError: Any method: unreachable, refused, timed out. The message never contains credentials.
        RemoteAccessError: Any method: the credentials do not allow it.
    """

    @property
    def url(self) -> str:
        """The location, for messages; never with credentials."""
        ...

    @property
    def where(self) -> str:
        """``url``, with the endpoint unless it is the provider's; for messages."""
        ...

    @property
    def filesystem(self) -> str:
        """The type of the file system, as Linux names it; empty for an object store or if unknown."""
        ...

    @property
    def conditional(self) -> bool:
        """Whether ``create`` is atomic; if not, refs get keys that no other writer uses."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects whose keys start with ``prefix``, sorted by key.

        Args:
            prefix: Empty, a key, or a key and a slash.

        Returns:
            An iterator that shows every write that ended before the call.
        """
        ...

    def head(self, key: str) -> Entry | None:
        """The entry of an object, or None."""
        ...

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Read an object in blocks of at most a few MiB.

        The iterator may end early without an error if a connection breaks: the caller checks size and digest.

        Args:
            key: The object.
            start: Offset of the first byte.
            length: Number of bytes; None: to the end.

        Raises:
            MissingObjectError: There is no such object.
        """
        ...

    def read_bytes(self, key: str, limit: int) -> bytes:
        """The bytes of a small object. Raises MissingObjectError, DamageError (more than ``limit`` bytes)."""
        ...

    def write(self, key: str, source: Path | bytes) -> None:
        """Write an object atomically, replacing an existing one; streams a file in constant memory."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Create a small object unless one exists.

        If a response is lost, an existing object with exactly ``data`` counts as created by this call. Unless
        ``conditional``, this is a check followed by a write.

        Args:
            key: The object.
            data: Its bytes; must be unique to the caller, for example by a random token.

        Returns:
            True if this call created the object, False if another one existed.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete an object if it exists."""
        ...

    def now(self) -> float:
        """Seconds since 1970 on the store's clock, that of ``Entry.modified``."""
        ...

    def compares_and_swaps(self) -> bool | None:
        """Whether the store has compare-and-swap; None if it has no such call. Only ``kdcache remote check`` asks."""
        ...

    def remove_leftovers(self, age: float) -> int:
        """Remove temporary files of interrupted writes.

        Args:
            age: Seconds since their last change, on the store's clock.

        Returns:
            Their number; 0 on an object store, which never shows them.
        """
        ...

    def remove_empty_folders(self, prefix: str) -> None:
        """Remove empty folders at and below ``prefix``; an object store has none."""
        ...


def holds(remote: Remote, key: str, data: bytes) -> bool | None:
    """Whether an object has exactly the bytes ``data``; None if there is no such object."""
    try:
        return remote.read_bytes(key, len(data)) == data
    except MissingObjectError:
        return None
    except DamageError:  # longer
        return False


LONGEST_KEY = 512  # characters; S3 allows 1,024 bytes including the team's prefix
_PART = r"[a-z0-9_-][a-z0-9._-]{0,199}"  # file systems allow 255 bytes, and temporary names are longer
_KEY = re.compile(rf"{_PART}(/{_PART})*")


def is_key(key: str) -> bool:
    """Whether ``key`` can name an object of a remote."""
    return len(key) <= LONGEST_KEY and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """Returns ``key``. Raises RemoteError if it cannot name an object of a remote."""
    if not is_key(key):
        shown = repr(key) if len(key) <= 80 else f"{key[:80]!r}... ({len(key)} characters)"
        raise RemoteError(
            f"{shown} is no key of a remote",
            "A key is a relative path of lower-case letters, digits, '.', '_' and '-'; no part of it begins with a "
            "dot.",
        )
    return key


def check_prefix(prefix: str) -> str:
    """Returns ``prefix``. Raises RemoteError unless it is empty, a key, or a key and a slash."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix
