"""What ``--cache`` and other references to a cache mean.

A directory that is there, else a name on the team's remote.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import RecipeError
from kdcache.share import keys as layout

if TYPE_CHECKING:
    from kdcache.share.reading_through import RemoteCache
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote

_REFERENCE = re.compile(rf"{layout.NAME.pattern}(@{layout.TAG.pattern})?")


def find_cache(reference: str, url: str | None = None) -> Path | RemoteCache:
    """The directory of that name, or the version that it means on the remote at ``url``, or on KDCACHE_REMOTE.

    Raises RecipeError where it is neither, or no remote is named; MismatchError where the remote has no such version.
    """
    path = Path(reference)
    if path.is_dir():
        return path
    from kdcache.share.reading_through import RemoteCache

    return RemoteCache(*find_version(reference, url))


def find_version(reference: str, url: str | None = None) -> tuple[Remote, Ref]:
    """The version that a reference means on the remote at ``url``, or on KDCACHE_REMOTE. Raises as ``find_cache``."""
    if not _REFERENCE.fullmatch(reference):
        raise RecipeError(
            f"there is no directory '{reference}'", "Name a directory that holds a cache, or a cache on KDCACHE_REMOTE."
        )
    if not url and not os.environ.get("KDCACHE_REMOTE", "").strip():
        raise RecipeError(
            f"there is no directory '{reference}', and KDCACHE_REMOTE names no remote that could have a cache of that "
            "name",
            "Name the directory of a cache, or the team's remote: export KDCACHE_REMOTE=s3://BUCKET/PREFIX",
        )
    from kdcache.share.refs import resolve

    remote = open_team(url)
    return remote, resolve(remote, reference)


def open_team(url: str | None = None) -> Remote:
    """The remote at ``url``, or at KDCACHE_REMOTE. Raises RecipeError where neither names one."""
    from kdcache.share.stores.registry import default_remote, open_remote

    return open_remote(url) if url else default_remote()
