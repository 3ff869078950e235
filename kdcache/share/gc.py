"""Collecting: delete what no version reaches and what is older than a grace period on the store's own clock.

gc and push keep apart by intents and marks (docs/decisions/0010): gc writes its mark, gives way to any live intent,
only then reads the refs, and deletes as long as its own mark is fresh. A dropped version keeps its objects until its
tombstone has passed the grace period too, so a colleague who is pulling it can finish. Deleted are, in this order, so
that nothing that can be reached is ever broken: refs, manifests, files, and at last the intents and marks of the dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kdcache.errors import DamageError, MismatchError, RemoteError
from kdcache.progress import SilentProgress
from kdcache.share import keys as layout
from kdcache.share.intents import Lease, Pace, alive, hold, refuse_if_alive
from kdcache.share.parallel import WORKERS, SharedProgress, Stop, for_each
from kdcache.share.pull import fetch_manifest
from kdcache.share.refs import Ref, all_histories, history, live, read_refs, resolve, tombstone

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Entry, Remote


T = TypeVar("T")

GRACE = 7 * 86_400.0  # seconds
_UNDER_WAY = 3600.0  # that a file may stand still and yet be written on


@dataclass(frozen=True)
class GcReport:
    """What gc deleted, or without ``deleted`` would delete.

    Keys in the order of their deletion, bytes of all, and what stays.
    """

    keys: tuple[str, ...]
    refs: int
    manifests: int
    files: int
    bytes: int
    kept_files: int
    kept_bytes: int
    young_files: int  # unreachable and within the grace period
    young_bytes: int
    deleted: bool


@dataclass(frozen=True)
class _Plan:
    """What goes and what stays."""

    refs: list[Entry]
    manifests: list[Entry]
    files: list[Entry]
    kept: tuple[int, int]  # files and bytes
    young: tuple[int, int]
    leases: list[Entry]

    @property
    def entries(self) -> list[Entry]:
        return [*self.refs, *self.manifests, *self.files, *self.leases]


def collect(
    remote: Remote,
    *,
    grace: float = GRACE,
    delete: bool = False,
    progress: Progress | None = None,
    pace: Pace | None = None,
    workers: int = WORKERS,
) -> GcReport:
    """Delete, or without ``delete`` list, what no version reaches and what is older than ``grace`` seconds.

    Raises LockedError (a push is under way), DamageError (a ref or a manifest is damaged, so nobody knows what it
    reaches; or this machine slept in the middle of a delete, and a version that was pushed meanwhile lacks what it
    took), RemoteError (also where this machine slept: then nothing more is deleted), RemoteAccessError.
    """
    pace = pace or Pace()
    progress = progress or SilentProgress()
    with hold(remote, "mark", pace) if delete else nullcontext() as lease:
        epoch = lease.epoch if lease else 0
        if lease:
            refuse_if_alive(remote, "intent", pace)
        plan = _plan(remote, grace, pace, lease)
        if lease:
            _delete(remote, plan, lease, epoch, progress, workers)
            remote.remove_leftovers(max(grace, _UNDER_WAY))
    return GcReport(
        tuple(entry.key for entry in plan.entries), len(plan.refs), len(plan.manifests), len(plan.files),
        sum(entry.size for entry in plan.entries), *plan.kept, *plan.young, deleted=delete,
    )  # fmt: skip


def _plan(remote: Remote, grace: float, pace: Pace, lease: Lease | None) -> _Plan:
    entries = {
        entry.key: entry for entry in _beating(lease, remote.list(layout.REFS)) if layout.parse_ref_key(entry.key)
    }
    refs = read_refs(remote, entries.values(), {})
    now = remote.now()

    def old(entry: Entry) -> bool:
        return now - entry.modified > grace

    gone = {ref.key for one in _by_name(refs) for ref in _dropped(one, entries, old)}
    manifests, files = _reached(remote, [ref for ref in refs if ref.key not in gone], lease)
    unreached = [
        entry
        for entry in _beating(lease, remote.list(layout.MANIFESTS))
        if (sha := layout.parse_manifest_key(entry.key)) and bytes.fromhex(sha) not in manifests
    ]
    return _Plan(
        [entries[key] for key in sorted(gone)],
        [entry for entry in unreached if old(entry)],
        *_files(remote, files, old, lease),
        _dead(remote, old, pace),
    )


def _files(
    remote: Remote, reached: set[bytes], old: Callable[[Entry], bool], lease: Lease | None
) -> tuple[list[Entry], tuple[int, int], tuple[int, int]]:
    """Files to delete; number and bytes of those that versions reach, and of those that are too young."""
    gone: list[Entry] = []
    kept, young = [0, 0], [0, 0]
    for entry in _beating(lease, remote.list(layout.FILES)):
        sha = layout.parse_file_key(entry.key)
        if sha is None:
            continue
        if bytes.fromhex(sha) in reached:
            _count(kept, entry)
        elif old(entry):
            gone.append(entry)
        else:
            _count(young, entry)
    return gone, (kept[0], kept[1]), (young[0], young[1])


def _dropped(refs: Sequence[Ref], entries: Mapping[str, Entry], old: Callable[[Entry], bool]) -> Iterator[Ref]:
    """Of one name: versions that an old tombstone drops, and old tombstones with nothing left to drop; never the newest
    number.

    A tombstone outlives what it drops by a run of gc, so that no death in between brings a dropped version back.
    """
    newest = max(ref.number for ref in refs)
    for ref in refs:
        if ref.number == newest:
            continue
        if ref.removes is None:
            if any(one.drops(ref) and old(entries[one.key]) for one in refs):
                yield ref
        elif old(entries[ref.key]) and not any(ref.drops(other) for other in refs):
            yield ref


def _reached(remote: Remote, refs: Sequence[Ref], lease: Lease | None) -> tuple[set[bytes], set[bytes]]:
    """sha256 of the manifests and of the files that versions reach, those dropped within the grace period among them."""
    wanted = {ref.key for one in _by_name(refs) for ref in live(one)}
    manifests: set[bytes] = set()
    files: set[bytes] = set()
    for ref in _beating(lease, refs):
        sha = bytes.fromhex(ref.manifest)
        if ref.removes is not None or sha in manifests:
            continue
        try:
            manifest = fetch_manifest(remote, ref)
        except DamageError as error:
            if ref.key not in wanted:
                continue  # dropped: it has no claim to be whole
            raise DamageError(
                f"{error.message}; so nobody knows which files {ref.pinned} reaches, and nothing is deleted",
                f"Push that cache again, or drop it with: kdcache cache rm {ref.pinned}",
            ) from error
        manifests.add(sha)
        files.update(bytes.fromhex(digest.sha256) for digest in manifest.contents.files.values())
    return manifests, files


def _dead(remote: Remote, old: Callable[[Entry], bool], pace: Pace) -> list[Entry]:
    """Intents and marks whose owners died long ago."""
    living = {entry.key for entry in [*alive(remote, "intent", pace), *alive(remote, "mark", pace)]}
    listed = [*remote.list(layout.INTENTS), *remote.list(layout.MARKS)]
    return [entry for entry in listed if layout.is_lease_key(entry.key) and entry.key not in living and old(entry)]


def _delete(remote: Remote, plan: _Plan, lease: Lease, epoch: int, progress: Progress, workers: int) -> None:
    progress.start("gc", len(plan.entries), "objects")
    shared = SharedProgress(progress)
    late: list[str] = []

    def remove(entry: Entry, stop: Stop) -> None:
        stop.check()
        lease.beat()
        _refuse_lapsed(remote, lease, epoch)
        remote.delete(entry.key)
        if not lease.holds(epoch):
            late.append(entry.key)
            _refuse_lapsed(remote, lease, epoch)
        shared.advance(1, bytes_done=entry.size)

    try:
        for kind in (plan.refs, plan.manifests, plan.files, plan.leases):
            for_each(kind, remove, workers if len(kind) > 1 else 1)
    finally:
        if late:
            _say_what_was_lost(remote, set(late))
    progress.finish()


def _refuse_lapsed(remote: Remote, lease: Lease, epoch: int) -> None:
    if not lease.holds(epoch):
        raise RemoteError(
            f"gc on {remote.url} fell asleep, so a push may have begun meanwhile; nothing more is deleted",
            "Run it again: it continues.",
        )


def _say_what_was_lost(remote: Remote, late: set[str]) -> None:
    """Deletes that ended after this gc counted as dead: a push that ended meanwhile may have counted on those objects.

    Nothing can undo that, so it is said. Raises DamageError where a version lacks one of them now.
    """
    for refs in all_histories(remote).values():
        for ref in live(refs):
            if layout.manifest_key(ref.manifest) in late:
                needed = {layout.manifest_key(ref.manifest)}
            else:
                files = fetch_manifest(remote, ref).contents.files
                needed = late & {layout.file_key(digest.sha256) for digest in files.values()}
            lost = [key for key in sorted(needed) if remote.head(key) is None]
            if lost:
                raise DamageError(
                    f"gc fell asleep in the middle of a delete, and {ref.pinned}, which was pushed meanwhile, lacks "
                    f"'{lost[0]}' now",
                    "Push that cache again under the same name: what is gone is sent, and nothing else.",
                )


def _by_name(refs: Sequence[Ref]) -> list[list[Ref]]:
    names: dict[str, list[Ref]] = {}
    for ref in refs:
        names.setdefault(ref.name, []).append(ref)
    return list(names.values())


def _beating(lease: Lease | None, items: Iterable[T]) -> Iterator[T]:
    """``items``, while the mark is renewed where nothing does so in the background."""
    for item in items:
        if lease:
            lease.beat()
        yield item


def _count(pair: list[int], entry: Entry) -> None:
    pair[0] += 1
    pair[1] += entry.size


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
