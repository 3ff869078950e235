"""Versions of a name: numbered and immutable. A writer reads the existing refs, then creates the next one if absent.

A writer that loses the race for a number reads again and takes the next number, so no version is lost. Numbers only
grow: ``rm`` writes a tombstone, a ref with a number that removes earlier versions, and the newest ref is never deleted.
On a store without conditional creates two writers may make two refs of one number. Both stay, and readers report a
fork until the next version.
"""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from kdcache.errors import MismatchError, MissingObjectError, RemoteError
from kdcache.share import keys as layout
from kdcache.share.parallel import gather
from kdcache.share.ref_document import MAX_BYTES, Ref, parse_ref, ref_bytes

if TYPE_CHECKING:
    from kdcache.share.stores.base import Entry, Remote

__all__ = ["OvertakenError", "Ref", "history", "live", "publish", "resolve", "tombstone"]

ATTEMPTS = 100  # races for a number that may be lost before giving up


class OvertakenError(MismatchError):
    """Another version became the newest one before one's own was made."""


def history(remote: Remote, name: str, known: Mapping[str, Ref] | None = None) -> tuple[Ref, ...]:
    """Every ref of a name, including tombstones and the versions that they remove, oldest first.

    ``known``: refs by key that were read before. Raises DamageError for a damaged ref.
    """
    return read_refs(remote, remote.list(layout.refs_of(layout.check_name(name))), known or {})


def all_histories(remote: Remote) -> dict[str, tuple[Ref, ...]]:
    """``history`` of every name. Raises DamageError."""
    return by_name(read_refs(remote, remote.list(layout.REFS), {}))


def by_name(refs: Iterable[Ref]) -> dict[str, tuple[Ref, ...]]:
    """Sorted refs by name."""
    return {name: tuple(versions) for name, versions in itertools.groupby(refs, key=lambda ref: ref.name)}


def names_of(remote: Remote, prefix: str = layout.REFS) -> list[str]:
    """The sorted names of which there are refs; no ref is read."""
    places = (layout.parse_ref_key(entry.key) for entry in remote.list(prefix))
    return sorted({place[0] for place in places if place})


def read_refs(remote: Remote, entries: Iterable[Entry], known: Mapping[str, Ref]) -> tuple[Ref, ...]:
    """The refs among listed objects, by name and number. Raises DamageError."""
    keys = [entry.key for entry in entries if layout.parse_ref_key(entry.key)]
    refs = gather(keys, lambda key: known.get(key) or _read(remote, key), workers=min(8, max(1, len(keys))))
    return tuple(sorted((ref for ref in refs if ref), key=lambda ref: (ref.name, ref.number, ref.key)))


def live(refs: Sequence[Ref]) -> tuple[Ref, ...]:
    """The versions of one name without tombstones and without what they remove."""
    tombstones = [ref for ref in refs if ref.removes is not None]
    return tuple(
        ref for ref in refs if ref.removes is None and not any(tombstone.drops(ref) for tombstone in tombstones)
    )


def resolve(remote: Remote, reference: str) -> Ref:
    """The version that ``name``, ``name@3``, ``name@tag`` or ``name@digest`` means.

    A digest is that of the identity or the manifest, at least 6 digits. Raises RecipeError (no reference),
    MismatchError (no such version; the message lists those that exist; or a fork), DamageError.
    """
    name, version = layout.split_reference(reference)
    refs = history(remote, name)
    versions = live(refs)
    if not versions:
        raise _nothing(remote, name, refs)
    matching = newest_of(refs) if version is None else _matching(versions, version)
    if not matching:
        raise _no_version(remote, name, version or "", refs, versions)
    return _one(remote, reference, matching)


def publish(
    remote: Remote,
    name: str,
    manifest_sha: str,
    identity: str,
    tag: str | None,
    *,
    size: int = 0,
    files: int = 0,
    after: Collection[Ref] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Ref:
    """Make the next version of a name; or return the newest one, if it has this manifest and tag.

    Manifest and files must exist. ``after``: the refs that must be the newest version when this one is made (several
    for a fork). On a store with conditional creates nothing can come in between. Raises OvertakenError if they are not,
    MismatchError if another version has the tag.
    """
    wanted = Ref(
        layout.check_name(name), 0, manifest_sha, identity, tag and layout.check_tag(tag), None, "", "", size, files
    )

    def already(refs: Sequence[Ref]) -> Ref | None:
        newest = newest_like(refs, manifest_sha, tag)
        if newest is None:
            refuse_taken_tag(refs, manifest_sha, tag)
        if newest is None and after is not None:
            check_newest(refs, after)
        return newest

    return _append(remote, wanted, already, sleep)


def tombstone(remote: Remote, name: str, removes: tuple[int, ...] | Literal["all"]) -> Ref:
    """Remove versions of a name by publishing a tombstone."""
    return _append(remote, Ref(layout.check_name(name), 0, "", "", None, removes, "", ""), lambda _: None, time.sleep)


def newest_of(refs: Sequence[Ref]) -> tuple[Ref, ...]:
    """The newest version in a history: several refs after a fork, none if all are removed."""
    versions = live(refs)
    return tuple(ref for ref in versions if ref.number == versions[-1].number)


def check_newest(refs: Sequence[Ref], after: Collection[Ref]) -> None:
    """Raises OvertakenError unless the newest version is ``after``."""
    newest = newest_of(refs)
    if {ref.key for ref in newest} != {ref.key for ref in after}:
        there = f"its newest version is {newest[-1].pinned}" if newest else "all its versions were removed"
        expected = ", ".join(ref.pinned for ref in after)
        raise OvertakenError(
            f"this version was made from {expected}, but {there}",
            "Run the same command again: it starts from the newest version.",
        )


def refuse_taken_tag(refs: Sequence[Ref], manifest_sha: str, tag: str | None) -> None:
    """Raises MismatchError if another version of the name has the tag."""
    for ref in live(refs):
        if tag and ref.tag == tag and ref.manifest != manifest_sha:
            raise MismatchError(f"tag '{tag}' of '{ref.name}' is version {ref.number} already", "Choose another tag.")


def newest_like(refs: Sequence[Ref], manifest_sha: str, tag: str | None) -> Ref | None:
    """The newest version, if there is no fork and it has that manifest and, if given, that tag."""
    latest = [ref for ref in refs if ref.number == refs[-1].number]
    if len(latest) != 1 or latest[0] not in live(refs):
        return None
    newest = latest[0]
    return newest if newest.manifest == manifest_sha and tag in (None, newest.tag) else None


def _append(
    remote: Remote, wanted: Ref, already: Callable[[Sequence[Ref]], Ref | None], sleep: Callable[[float], None]
) -> Ref:
    token, known = secrets.token_hex(8), dict[str, Ref]()
    for attempt in range(ATTEMPTS):
        refs = history(remote, wanted.name, known)
        known = {ref.key: ref for ref in refs}
        there = already(refs)
        if there:
            return there
        number = refs[-1].number + 1 if refs else 1
        key = layout.ref_key(wanted.name, number, None if remote.conditional else token)
        made = replace(wanted, number=number, key=key, made=_timestamp(remote.now()))
        if remote.create(key, ref_bytes(made, token)):
            return _stands(remote, made)
        sleep(random.uniform(0, min(2.0, 0.02 * 2 ** min(attempt, 7))))
    raise RemoteError(
        f"other writers made {ATTEMPTS} versions of '{wanted.name}' on {remote.url} meanwhile", "Run it again."
    )


def _stands(remote: Remote, made: Ref) -> Ref:
    """Returns ``made``. Raises MismatchError if a tombstone that was written meanwhile removes it."""
    after = history(remote, made.name, {made.key: made})
    dropped = next((ref for ref in after if ref.drops(made)), None)
    if dropped:
        raise MismatchError(
            f"version {made.number} of '{made.name}' was removed by version {dropped.number} while it was being made",
            "Run the same command again if it is still wanted.",
        )
    return made


def _read(remote: Remote, key: str) -> Ref | None:
    try:
        return parse_ref(remote.read_bytes(key, MAX_BYTES), key)
    except MissingObjectError:
        return None  # deleted by gc since it was listed


def _matching(versions: Sequence[Ref], version: str) -> list[Ref]:
    """The versions with that number; else the newest with that tag; else those whose digest begins with it."""
    if version.isdecimal() and len(version) < 10:
        numbered = [ref for ref in versions if ref.number == int(version)]
        if numbered:
            return numbered
    tagged = [ref for ref in versions if ref.tag == version]
    if tagged:
        return [ref for ref in tagged if ref.number == tagged[-1].number]
    if not layout.PREFIX.fullmatch(version):
        return []
    digested = [ref for ref in versions if ref.manifest.startswith(version)]
    digested = digested or [ref for ref in versions if ref.identity.startswith(version)]
    identities = {ref.identity for ref in digested}
    return digested[-1:] if len(identities) == 1 else digested


def _one(remote: Remote, reference: str, refs: Sequence[Ref]) -> Ref:
    """The last of ``refs``. Raises MismatchError if they point to several manifests."""
    if len({ref.manifest for ref in refs}) == 1:
        return refs[-1]
    name = refs[-1].name
    choices = ", ".join(f"{name}@{ref.manifest[:12]} ({ref.made})" for ref in refs)
    same = len({ref.number for ref in refs}) == 1
    what = f"version {refs[-1].number} was made twice, by two writers at once" if same else "it fits several versions"
    raise MismatchError(
        f"'{reference}' on {remote.url} is not one cache: {what}",
        f"Name one of {choices}; a later push continues after both.",
    )


def _nothing(remote: Remote, name: str, refs: Sequence[Ref]) -> MismatchError:
    if refs:
        return MismatchError(
            f"all versions of '{name}' on {remote.url} were removed", "Push it again, or name another cache."
        )
    names = names_of(remote)
    there = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    hint = f"There is: {there}." if names else "Push one with: kdcache cache push PATH --name NAME"
    return MismatchError(f"there is no cache '{name}' on {remote.url}", hint)


def _no_version(remote: Remote, name: str, version: str, refs: Sequence[Ref], versions: Sequence[Ref]) -> MismatchError:
    dropped = version.isdecimal() and any(str(ref.number) == version for ref in refs)
    what = f"version {version} of '{name}' on {remote.url} was removed" if dropped else (
        f"'{name}' on {remote.url} has no version '{version}'"
    )  # fmt: skip
    shown = [f"{ref.number}{f' ({ref.tag})' if ref.tag else ''} {ref.identity[:12]}" for ref in versions[-10:]]
    return MismatchError(what, f"There is: {', '.join(shown)}.")


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
