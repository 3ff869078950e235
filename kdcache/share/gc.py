"""Garbage collection: delete objects that no version reaches and that are older than a grace period.

Ages are measured on the store's own clock. gc and push exclude each other by leases (docs/decisions/0010): gc writes
its mark, stops if any intent is alive, only then reads the refs, and deletes only while its own mark is valid. The
objects of a removed version stay until its tombstone is older than the grace period, so a pull in progress can finish.
The order of deletion is refs, manifests, files, expired leases: a version that can still be resolved is always whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kdcache.errors import DamageError, MismatchError, RemoteError
from kdcache.progress import SilentProgress
from kdcache.share import keys as layout
from kdcache.share.intents import Lease, LeaseTiming, alive, hold, refuse_if_alive
from kdcache.share.parallel import WORKERS, SharedProgress, Stop, for_each
from kdcache.share.pull import fetch_manifest
from kdcache.share.refs import Ref, all_histories, by_name, history, live, read_refs, resolve, tombstone

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Entry, Remote


T = TypeVar("T")

GRACE = 7 * 86_400.0  # seconds
_UPLOAD = 3600.0  # seconds without a change after which a temporary file is no upload in progress


@dataclass(frozen=True)
class GcReport:
    """What gc deleted, or would delete (``deleted`` is False): keys in the order of deletion, and counts."""

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
    """The objects to delete, and counts of the files to keep."""

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
    timing: LeaseTiming | None = None,
    workers: int = WORKERS,
) -> GcReport:
    """Delete (or only list, without ``delete``) objects that no version reaches and that are older than ``grace``.

    Args:
        remote: The remote to collect.
        grace: Age in seconds that an unreachable object must have.
        delete: Whether to delete; without it nothing is written either.
        progress: Reports the deletions.
        timing: Intervals of the lease.
        workers: Threads that delete.

    Raises:
        LockedError: A push is in progress.
        DamageError: A ref or manifest is damaged, so what it reaches is unknown; or the machine was suspended during a
            delete, and a version that was pushed meanwhile lacks the deleted object.
        RemoteError: The remote failed, or the lease of this gc expired; nothing more is deleted.
        RemoteAccessError: The credentials do not allow it.
    """
    timing = timing or LeaseTiming()
    progress = progress or SilentProgress()
    with hold(remote, "mark", timing) if delete else nullcontext() as lease:
        epoch = lease.epoch if lease else 0
        if lease:
            refuse_if_alive(remote, "intent", timing)
        plan = _plan(remote, grace, timing, lease)
        if lease:
            _delete(remote, plan, lease, epoch, progress, workers)
            remote.remove_leftovers(max(grace, _UPLOAD))
    return GcReport(
        tuple(entry.key for entry in plan.entries), len(plan.refs), len(plan.manifests), len(plan.files),
        sum(entry.size for entry in plan.entries), *plan.kept, *plan.young, deleted=delete,
    )  # fmt: skip


def _plan(remote: Remote, grace: float, timing: LeaseTiming, lease: Lease | None) -> _Plan:
    entries = {
        entry.key: entry for entry in _beating(lease, remote.list(layout.REFS)) if layout.parse_ref_key(entry.key)
    }
    refs = read_refs(remote, entries.values(), {})
    now = remote.now()

    def old(entry: Entry) -> bool:
        return now - entry.modified > grace

    gone = {ref.key for versions in by_name(refs).values() for ref in _dropped(versions, entries, old)}
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
        _expired(remote, old, timing),
    )


def _files(
    remote: Remote, reached: set[bytes], old: Callable[[Entry], bool], lease: Lease | None
) -> tuple[list[Entry], tuple[int, int], tuple[int, int]]:
    """Files to delete; number and bytes of the reachable files, and of the unreachable ones within the grace period."""
    gone: list[Entry] = []
    kept, young = [0, 0], [0, 0]
    for entry in _beating(lease, remote.list(layout.FILES)):
        sha = layout.parse_file_key(entry.key)
        if sha is None:
            continue
        in_use = bytes.fromhex(sha) in reached
        if not in_use and old(entry):
            gone.append(entry)
        else:
            counts = kept if in_use else young
            counts[0] += 1
            counts[1] += entry.size
    return gone, (kept[0], kept[1]), (young[0], young[1])


def _dropped(refs: Sequence[Ref], entries: Mapping[str, Entry], old: Callable[[Entry], bool]) -> Iterator[Ref]:
    """The refs of one name to delete: versions under an old tombstone, and old tombstones with no such version left.

    The newest number always stays. A tombstone is deleted one run of gc after its versions, so that a crash between
    the two deletions cannot bring a removed version back.
    """
    newest = max(ref.number for ref in refs)
    for ref in refs:
        if ref.number == newest:
            continue
        if ref.removes is None:
            if any(other.drops(ref) and old(entries[other.key]) for other in refs):
                yield ref
        elif old(entries[ref.key]) and not any(ref.drops(other) for other in refs):
            yield ref


def _reached(remote: Remote, refs: Sequence[Ref], lease: Lease | None) -> tuple[set[bytes], set[bytes]]:
    """sha256 of the manifests and files that versions reach, including versions removed within the grace period."""
    wanted = {ref.key for versions in by_name(refs).values() for ref in live(versions)}
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
                continue  # a removed version need not be whole
            raise DamageError(
                f"{error.message}; the files of {ref.pinned} are unknown, so nothing is deleted",
                f"Push that cache again, or remove it with: kdcache cache rm {ref.pinned}",
            ) from error
        manifests.add(sha)
        files.update(bytes.fromhex(digest.sha256) for digest in manifest.contents.files.values())
    return manifests, files


def _expired(remote: Remote, old: Callable[[Entry], bool], timing: LeaseTiming) -> list[Entry]:
    """Expired leases that are older than the grace period."""
    living = {entry.key for entry in [*alive(remote, "intent", timing), *alive(remote, "mark", timing)]}
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
            _report_lost(remote, set(late))
    progress.finish()


def _refuse_lapsed(remote: Remote, lease: Lease, epoch: int) -> None:
    if not lease.holds(epoch):
        raise RemoteError(
            f"gc on {remote.url} lost its lease: was the machine suspended? A push may have begun, so gc stops here",
            "Run it again: it continues.",
        )


def _report_lost(remote: Remote, late: set[str]) -> None:
    """Raises DamageError if a version lacks one of ``late``, the objects deleted after the lease had expired.

    A push that ended in between may have relied on them. This cannot be undone, so it is reported.
    """
    for refs in all_histories(remote).values():
        for ref in live(refs):
            needed = late & {layout.manifest_key(ref.manifest)}
            if not needed:
                files = fetch_manifest(remote, ref).contents.files
                needed = late & {layout.file_key(digest.sha256) for digest in files.values()}
            lost = [key for key in sorted(needed) if remote.head(key) is None]
            if lost:
                raise DamageError(
                    f"gc lost its lease during a delete: was the machine suspended? {ref.pinned}, which was pushed at "
                    f"the same time, now lacks '{lost[0]}'",
                    "Push that cache again under the same name: only the missing objects are sent.",
                )


def _beating(lease: Lease | None, items: Iterable[T]) -> Iterator[T]:
    """``items``; renews the lease meanwhile if no background thread does."""
    for item in items:
        if lease:
            lease.beat()
        yield item


def remove(remote: Remote, reference: str) -> tuple[Ref, ...]:
    """Remove every version of ``name``, or the one that ``name@version`` means; returns the removed versions.

    Raises MismatchError if there is no such version, RemoteAccessError, RemoteError.
    """
    name, version = layout.split_reference(reference)
    if version is not None:
        ref = resolve(remote, reference)
        same = tuple(other for other in live(history(remote, name)) if other.number == ref.number)
        if len(same) > 1:
            raise MismatchError(
                f"version {ref.number} of '{name}' was made twice, by two writers at once: both would be removed",
                f"Push a new version, or remove all of them with: kdcache cache rm {name}",
            )
        tombstone(remote, name, (ref.number,))
        return same
    dropped = live(history(remote, name))
    if not dropped:
        resolve(remote, reference)  # raises, with the reason
    tombstone(remote, name, "all")
    return dropped
