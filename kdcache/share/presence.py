"""Which objects are on a remote: by one list, one list per folder, or a request per object, whichever is cheapest.

An object of the wrong size counts as missing, since sending it again repairs it. All three ways show every completed
write, so others may push meanwhile. The number of objects is estimated from one of the 256 folders, because digests are
spread evenly; so the names of a large store are never all in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kdcache.share import keys as layout
from kdcache.share.parallel import WORKERS, gather

if TYPE_CHECKING:
    from kdcache.share.stores.base import Remote

_FOLDERS = 256  # of files: the first two hex digits of the digest
_PAGE = 1000  # objects that a store lists per request
_FEW = 8  # up to so many objects there is one request per object, without an estimate
_MOST = 50_000  # objects in one list at most


def sizes_of(remote: Remote, keys: Iterable[str], workers: int = WORKERS) -> dict[str, int]:
    """Key -> size of the objects that exist."""
    wanted = list(dict.fromkeys(keys))
    files = [key for key in wanted if layout.parse_file_key(key)]
    if len(files) <= _FEW:
        return _one_by_one(remote, wanted, workers)
    folders = sorted({_folder(key) for key in files})
    count = _listed(remote, folders[0], set())[1]
    all_at_once = 1 + _FOLDERS * count // _PAGE if _FOLDERS * count <= _MOST else len(files)
    per_folder = len(folders) * (1 + count // _PAGE)
    if len(files) <= min(all_at_once, 2 * per_folder):  # a list costs more than a head request
        return _one_by_one(remote, wanted, workers)
    others = _one_by_one(remote, [key for key in wanted if not layout.parse_file_key(key)], workers)
    return others | _by_lists(remote, files, [layout.FILES] if all_at_once <= per_folder else folders, workers)


def missing_of(remote: Remote, sizes: Mapping[str, int], workers: int = WORKERS) -> list[str]:
    """The keys of ``sizes`` whose object is missing or has another size."""
    there = sizes_of(remote, sizes, workers)
    return [key for key, size in sizes.items() if there.get(key) != size]


def _one_by_one(remote: Remote, keys: list[str], workers: int) -> dict[str, int]:
    entries = gather(keys, remote.head, workers=max(1, min(workers, len(keys))))
    return {entry.key: entry.size for entry in entries if entry}


def _by_lists(remote: Remote, keys: list[str], folders: list[str], workers: int) -> dict[str, int]:
    wanted, sizes = set(keys), dict[str, int]()
    for listed, _ in gather(
        folders, lambda folder: _listed(remote, folder, wanted), workers=max(1, min(workers, len(folders)))
    ):
        sizes |= listed
    return sizes


def _listed(remote: Remote, folder: str, wanted: set[str]) -> tuple[dict[str, int], int]:
    """Key -> size of the wanted objects in a folder, and the number of all objects in it."""
    sizes: dict[str, int] = {}
    count = 0
    for entry in remote.list(folder):
        count += 1
        if entry.key in wanted:
            sizes[entry.key] = entry.size
    return sizes, count


def _folder(key: str) -> str:
    return key[: len(layout.FILES) + 3]
