"""Extending a name: the result is its next version, whatever others publish meanwhile, and no teacher runs twice.

A teacher may run for hours. The version that was extended may not be the newest one any more by then; the number of the
next one is decided by the store. Who comes second puts what was added together with what was published, which takes
seconds, and tries the next number.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.manifest import read_manifest
from kdcache.cache.merge import contents_so_far, merge
from kdcache.dump.extend import extend_cache, shared_bytes
from kdcache.errors import KdcacheError, MismatchError, RemoteError
from kdcache.share.push import push
from kdcache.share.refs import OvertakenError, history, newest_of, resolve
from kdcache.share.working_copy import other_copies, working_copy

if TYPE_CHECKING:
    from kdcache.cache.manifest import Manifest
    from kdcache.dump.extend import ExtendReport, Wanted
    from kdcache.dump.run import TeacherRun
    from kdcache.progress import Progress
    from kdcache.share.local_store import LocalStore
    from kdcache.share.push import PushReport
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote
    from kdcache.share.working_copy import WorkingCopy

ROUNDS = 20  # versions that others may publish between the last look and one's own, before giving up


@dataclass(frozen=True)
class _Extension:
    """What is being done; ``first`` is the copy in which teachers ran."""

    remote: Remote
    wanted: Wanted
    store: LocalStore
    tag: str | None
    progress: Progress
    provenance: Mapping[str, Any]
    first: WorkingCopy


def extend_version(
    remote: Remote,
    ref: Ref,
    wanted: Wanted,
    *,
    store: LocalStore,
    progress: Progress,
    tag: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[ExtendReport, str]:
    """Add what is wanted to a version and publish the result under the next number; gives back the report and
    ``name@number``.

    Of the newest version: what others publish until then is kept, and what is added comes on top. Of an older one: as
    it is, on top of the newer ones. Raises what ``extend_cache`` and ``push`` raise; RemoteError where others publish
    without end. What teachers said until then is kept for the same command.
    """
    newest = newest_of(history(remote, ref.name))
    with working_copy(remote, ref, store=store, progress=progress) as copy:
        with other_copies(ref.name, copy, store=store) as earlier:
            report = extend_cache(
                copy.path, wanted, progress=progress, arrivals=copy.arrivals, provenance=provenance, earlier=earlier
            )
        report = _compared(report, copy, report.runs)
        job = _Extension(remote, wanted, store, tag, progress, provenance or {}, copy)
        if ref.key not in {one.key for one in newest}:
            pushed = push(remote, copy.path, ref.name, tag=tag, progress=progress)
            report = replace(report, cache=store.adopt(copy.path, read_manifest(copy.path)))
        else:
            report, pushed = _publish(job, ref, newest, report)
        with other_copies(ref.name, copy, store=store) as earlier:
            _forget((copy.path, *earlier), read_manifest(report.cache))
    return report, pushed.reference


def _publish(job: _Extension, ref: Ref, newest: Sequence[Ref], report: ExtendReport) -> tuple[ExtendReport, PushReport]:
    """Make the version after ``newest``, of which ``ref`` was extended.

    After what is the newest one by then, where it is another.
    """
    for _ in range(ROUNDS):
        with _copy_for(job, ref) as copy:
            if copy is not job.first:
                report = _together(job, copy, report)
            try:
                pushed = push(job.remote, copy.path, ref.name, tag=job.tag, after=newest, progress=job.progress)
            except OvertakenError:
                ref = resolve(job.remote, ref.name)
                newest = (ref,)
                job.progress.note(f"{ref.pinned} was published meanwhile: what was added here comes on top of it")
                continue
            rivals = _rivals(job.remote, ref.name, pushed)
            if not rivals:
                return replace(report, cache=job.store.adopt(copy.path, read_manifest(copy.path))), pushed
        ref, newest = rivals[0], newest_of(history(job.remote, ref.name))
        job.progress.note(
            f"{pushed.reference} was made twice, by two writers at once: the next version has what both added; each "
            "can be had "
            f"as {ref.name}@{pushed.manifest[:12]} and {ref.name}@{ref.manifest[:12]}"
        )
    raise RemoteError(
        f"others published {ROUNDS} versions of '{ref.name}' on {job.remote.url} while this one was being made",
        "Run the same command again: no teacher runs again.",
    )


def _copy_for(job: _Extension, ref: Ref) -> contextlib.AbstractContextManager[WorkingCopy]:
    """A copy of the version that is followed; the first one where that has the same content."""
    if ref.identity == job.first.manifest.identity:
        return contextlib.nullcontext(job.first)
    return working_copy(job.remote, ref, store=job.store, progress=job.progress)


def _together(job: _Extension, copy: WorkingCopy, report: ExtendReport) -> ExtendReport:
    """Bring what was added into a copy of another version.

    Its files alone, or where rows were added there, with these run too.
    """
    first, runs = job.first, report.runs
    try:
        merge(copy.path, first.path, first.manifest.contents)
    except MismatchError:
        more = extend_cache(
            copy.path, job.wanted, progress=job.progress, arrivals=copy.arrivals, provenance=job.provenance,
            earlier=(first.path,), like=first.manifest.contents,
        )  # fmt: skip
        runs = (*runs, *more.runs)
    return _compared(report, copy, runs)


def _compared(report: ExtendReport, copy: WorkingCopy, runs: tuple[TeacherRun, ...]) -> ExtendReport:
    """The report of what ``copy`` has beyond the version on the remote, whichever run of the command brought it there."""
    made = read_manifest(copy.path)
    shared, added = shared_bytes(copy.manifest, made)
    return replace(
        report, before=copy.manifest.identity, identity=made.identity, runs=runs, bytes_new=added, bytes_shared=shared
    )


def _rivals(remote: Remote, name: str, pushed: PushReport) -> list[Ref]:
    """On a store that does not decide creates: other versions of the number that was just made."""
    if remote.conditional:
        return []
    return [
        ref
        for ref in newest_of(history(remote, name))
        if ref.pinned == pushed.reference and ref.manifest != pushed.manifest and ref.identity != pushed.identity
    ]


def _forget(places: Sequence[Path], published: Manifest) -> None:
    """Remove working copies of which all that teachers said is in what was published."""
    there = {digest.sha256 for digest in published.contents.files.values()}
    for place in places:
        with contextlib.suppress(KdcacheError):
            files = contents_so_far(place).files
            if all(digest.sha256 in there for path, digest in files.items() if path.startswith("teachers/")):
                shutil.rmtree(place, ignore_errors=True)
