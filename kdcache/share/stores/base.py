"""The seam between the sharing protocol and the place where a team keeps its caches.

A remote is a flat space of named objects. It promises little: an object is written whole or not at all, and a name
listed after a write has ended shows that object. Everything else that push, pull and gc guarantee is built on these
calls, and on ``create``, where the store has it. A directory on a shared disk and an object store are the two
implementations; each passes the same contract test class, ``kdcache.testing.remote_contract``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kdcache.errors import RemoteError


@dataclass(frozen=True)
class Entry:
    """An object that is there. ``modified``: seconds since 1970 on the store's own clock, whole seconds at worst."""

    key: str
    size: int
    modified: float


class Remote(Protocol):
    """Objects by key (relative POSIX paths of the layout, see ``kdcache.share.keys``).

    Safe to call from several threads.

    Every method raises RemoteError (exit code 1: unreachable, refused, timed out; message without credentials, the cure
    in the hint) and its subclass RemoteAccessError (the credentials do not allow it). Passing faults are retried
    inside.
    """

    @property
    def url(self) -> str:
        """Where it is, for messages: never with credentials."""
        ...

    @property
    def where(self) -> str:
        """``url``, with the endpoint where it is not the provider's own. For messages."""
        ...

    @property
    def filesystem(self) -> str:
        """The type of the file system, as Linux names it; empty for an object store and where it cannot be found."""
        ...

    @property
    def conditional(self) -> bool:
        """Whether ``create`` is decided by the store.

        Where it is not, refs are written under keys that no other writer uses.
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose key starts with ``prefix``, in the order of keys."""
        ...

    def head(self, key: str) -> Entry | None:
        """The object of that key; None where there is none."""
        ...

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes, in blocks of at most a few MiB; MissingObjectError where there is no such object.

        May end early without a word where a connection breaks: the caller knows size and digest.
        """
        ...

    def read_bytes(self, key: str, limit: int) -> bytes:
        """All bytes of a small object; MissingObjectError, or DamageError where it has more than ``limit``."""
        ...

    def write(self, key: str, source: Path | bytes) -> None:
        """Put an object in place whole; an existing one is replaced. Memory does not grow with the size of a file."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Put a small object in place if there is none of that key: True where it was made by this call, False where
        another was there.

        A response that was lost is recognised: where the object that is there has exactly ``data``, it is one's own. So
        ``data`` must be unique to the caller (a random token in it). Without ``conditional`` this is check-then-write.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        ...

    def now(self) -> float:
        """Seconds since 1970 on the store's own clock: that of ``Entry.modified``, not of this machine."""
        ...

    def compares_and_swaps(self) -> bool | None:
        """Whether an object can be replaced on condition that it has not changed; None where there is no such call.

        kdcache does not need it; ``kdcache remote check`` reports it.
        """
        ...

    def remove_leftovers(self, age: float) -> int:
        """Remove unfinished writes that were last touched more than ``age`` seconds ago, on the store's own clock.

        Returns their number: 0 on an object store, which never shows them.
        """
        ...

    def remove_empty_folders(self, prefix: str) -> None:
        """Remove the folders at and below ``prefix`` that hold nothing. An object store has no folders."""
        ...


LONGEST_KEY = 512  # characters; S3 ends at 1,024 bytes and a prefix of the team comes on top
_PART = r"[a-z0-9_-][a-z0-9._-]{0,199}"  # file systems end at 255 bytes, of which a name under way takes some
_KEY = re.compile(rf"{_PART}(/{_PART})*")


def is_key(key: str) -> bool:
    """Whether ``key`` can name an object of a remote."""
    return len(key) <= LONGEST_KEY and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """``key`` as it is; RemoteError where it cannot name an object of a remote."""
    if not is_key(key):
        shown = repr(key) if len(key) <= 80 else f"{key[:80]!r}... ({len(key)} characters)"
        raise RemoteError(
            f"{shown} is no key of a remote",
            "A key is a relative path of lower-case letters, digits, '.', '_' and '-'; no part of it begins with a "
            "dot.",
        )
    return key


def check_prefix(prefix: str) -> str:
    """``prefix`` as it is: empty, a key, a key with a slash behind it; RemoteError for all else."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix
