"""What a key of a remote may look like: so little that it means the same on every file system and in every object store.

Relative POSIX paths of lower-case letters, digits, ``.``, ``_`` and ``-``; no part begins with a dot. So no key leaves the folder
of a directory remote, none differs from another in case only, none needs escaping in a URL, and names with a leading dot are free
for what a remote keeps to itself (files under way).
"""

from __future__ import annotations

import re

from kdcache.errors import RemoteError

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
            "A key is a relative path of lower-case letters, digits, '.', '_' and '-'; no part of it begins with a dot.",
        )
    return key


def check_prefix(prefix: str) -> str:
    """``prefix`` as it is: empty, a key, a key with a slash behind it; RemoteError for all else."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix
