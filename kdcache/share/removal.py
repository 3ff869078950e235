"""Removal: drop versions of a name. A version that says so is added; the objects stay until gc collects them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.errors import MismatchError
from kdcache.share import layout
from kdcache.share.refs import Ref, history, live, resolve, tombstone

if TYPE_CHECKING:
    from kdcache.share.remote import Remote


def remove(remote: Remote, reference: str) -> tuple[Ref, ...]:
    """Drop every version of ``name``, or the one that ``name@version`` means. Gives back what was dropped.

    Raises MismatchError where there is nothing of the kind, RemoteAccessError, RemoteError.
    """
    name, version = layout.split_reference(reference)
    if version is not None:
        ref = resolve(remote, reference)
        same = tuple(one for one in live(history(remote, name)) if one.number == ref.number)
        if len(same) > 1:
            raise MismatchError(
                f"version {ref.number} of '{name}' was made twice, by two writers at once: both would be dropped",
                f"Push on top of them, or drop all of them with: kdcache cache rm {name}",
            )
        tombstone(remote, name, (ref.number,))
        return same
    dropped = live(history(remote, name))
    if not dropped:
        resolve(remote, reference)  # says why there is nothing
    tombstone(remote, name, "all")
    return dropped
