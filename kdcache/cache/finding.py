"""Which caches are on this machine, as far as the usual places tell.

Runs, the working directory, the store of fetched caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache import layout
from kdcache.cache.manifest import read_manifest
from kdcache.cache.selection import local_selection
from kdcache.errors import KdcacheError


@dataclass(frozen=True)
class Found:
    """A cache directory in a line; ``problem`` where it cannot be read, and then the rest is empty."""

    path: str
    identity: str = ""
    teachers: tuple[str, ...] = ()
    texts: int = 0
    bytes: int = 0  # of the whole cache
    bytes_here: int = 0  # of what was selected, where it is a part
    origin: str = ""  # name@number that a part was pulled from
    problem: str = ""


def find_caches(places: Iterable[Path]) -> list[Found]:
    """The caches among ``places``, which may or may not be directories, in their order."""
    return [_look(place) for place in places if (place / layout.MANIFEST).is_file()]


def _look(place: Path) -> Found:
    try:
        manifest = read_manifest(place)
        contents = manifest.contents
        local = local_selection(place, contents)
    except KdcacheError as error:
        return Found(str(place), problem=error.message)
    here = contents.files.keys() if local is None else local.selection.covers(contents)
    return Found(
        str(place),
        manifest.identity,
        tuple(contents.teachers),
        sum(part.texts for part in contents.parts),
        sum(digest.size for digest in contents.files.values()),
        sum(contents.files[path].size for path in here),
        "" if local is None else local.origin,
    )
