"""Which objects are on a remote: one list where that is short, else one question per object.

Objects are wanted by key with the size they must have; one of another size is as good as missing, since sending it again repairs
it. A list shows every write that has ended, so this may be asked while others push.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kdcache.share import layout
from kdcache.share.parallel import WORKERS, gather

if TYPE_CHECKING:
    from kdcache.share.remote import Remote

_FEW = 16  # objects up to which they are asked for one by one
_PAGES = 50  # listed objects per wanted one, after which asking one by one is cheaper


def sizes_of(remote: Remote, keys: Iterable[str], workers: int = WORKERS) -> dict[str, int]:
    """Key -> size of those that are there."""
    wanted = list(dict.fromkeys(keys))
    if len(wanted) > _FEW:
        found = _by_listing(remote, set(wanted))
        if found is not None:
            return found
    entries = gather(wanted, remote.head, workers=max(1, min(workers, len(wanted))))
    return {entry.key: entry.size for entry in entries if entry}


def missing_of(remote: Remote, sizes: Mapping[str, int], workers: int = WORKERS) -> list[str]:
    """The keys of ``sizes`` that are not there, or not of that size."""
    there = sizes_of(remote, sizes, workers)
    return [key for key, size in sizes.items() if there.get(key) != size]


def _by_listing(remote: Remote, wanted: set[str]) -> dict[str, int] | None:
    """None where the remote holds so much else that the list is not worth its requests."""
    found: dict[str, int] = {}
    for prefix in (layout.MANIFESTS, layout.FILES):
        if not any(key.startswith(prefix) for key in wanted):
            continue
        for number, entry in enumerate(remote.list(prefix)):
            if number > 10_000 + _PAGES * len(wanted):
                return None
            if entry.key in wanted:
                found[entry.key] = entry.size
    return found
