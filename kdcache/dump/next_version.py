"""Extends a published name: the result becomes its next version, and no teacher runs twice.

A teacher may run for hours, and somebody else may publish a version meanwhile. The store decides who gets the next
number. The loser merges its additions with the newer version, which takes seconds, and tries the next number.
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

ROUNDS = 20  # attempts to publish before giving up


@dataclass(frozen=True)
class _Extension:
    """The job; ``first`` is the copy in which teachers ran."""

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
    """Add ``wanted`` to a version and publish it under the next number; returns the report and ``name@number``.

    If ``ref`` is the newest version, additions are merged with what others publish meanwhile. An older version is
    published with its additions as it is. Raises what ``extend_cache`` and ``push`` raise, and RemoteError if others
    publish all the time. Teacher outputs are kept: the same command does not run teachers again.
    """
    newest = newest_of(history(remote, ref.name))
    with working_copy(remote, ref, wanted.digest(), store=store, progress=progress) as copy:
        with other_copies(ref.name, copy, store=store) as earlier:
            report = extend_cache(
                copy.path, wanted, progress=progress, arrivals=copy.arrivals, provenance=provenance, earlier=earlier
            )
        report = _compared(report, copy, report.runs)
        job = _Extension(remote, wanted, store, tag, progress, provenance or {}, copy)
        if ref.key not in {other.key for other in newest}:
            pushed = push(remote, copy.path, ref.name, tag=tag, progress=progress)
            report = replace(report, cache=store.adopt(copy.path, read_manifest(copy.path)))
        else:
            report, pushed = _publish(job, ref, newest, report)
        with other_copies(ref.name, copy, store=store) as earlier:
            _forget((copy.path, *earlier), read_manifest(report.cache))
    return report, pushed.reference


def _publish(job: _Extension, ref: Ref, newest: Sequence[Ref], report: ExtendReport) -> tuple[ExtendReport, PushReport]:
    """Publish the version after ``newest``, one of which ``ref`` is; merges with whatever is newest by then."""
    for _ in range(ROUNDS):
        with _copy_for(job, ref) as copy:
            if copy is not job.first:
                report = _together(job, copy, report)
            try:
                pushed = push(job.remote, copy.path, ref.name, tag=job.tag, after=newest, progress=job.progress)
            except OvertakenError:
                ref = resolve(job.remote, ref.name)
                newest = (ref,)
                job.progress.note(f"{ref.pinned} was published meanwhile: the additions are merged with it")
                continue
            rivals = _rivals(job.remote, ref.name, pushed)
            if not rivals:
                return replace(report, cache=job.store.adopt(copy.path, read_manifest(copy.path))), pushed
        ref, newest = rivals[0], newest_of(history(job.remote, ref.name))
        job.progress.note(
            f"two writers published {pushed.reference} at once, as {ref.name}@{pushed.manifest[:12]} and "
            f"{ref.name}@{ref.manifest[:12]}; the next version has the additions of both"
        )
    raise RemoteError(
        f"others published {ROUNDS} versions of '{ref.name}' on {job.remote.url} meanwhile",
        "Run the same command again: no teacher runs again.",
    )


def _copy_for(job: _Extension, ref: Ref) -> contextlib.AbstractContextManager[WorkingCopy]:
    """A working copy of ``ref``; the first copy if it has the same content."""
    if ref.identity == job.first.manifest.identity:
        return contextlib.nullcontext(job.first)
    return working_copy(job.remote, ref, job.wanted.digest(), store=job.store, progress=job.progress)


def _together(job: _Extension, copy: WorkingCopy, report: ExtendReport) -> ExtendReport:
    """Merge the additions into a copy of another version; rows that it added are run as well."""
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
    """The report with the difference between ``copy`` and the version on the remote."""
    new = read_manifest(copy.path)
    shared, added = shared_bytes(copy.manifest, new)
    return replace(
        report, before=copy.manifest.identity, identity=new.identity, runs=runs, bytes_new=added, bytes_shared=shared
    )


def _rivals(remote: Remote, name: str, pushed: PushReport) -> list[Ref]:
    """Other versions with the same number; only a store without conditional creates can have any."""
    if remote.conditional:
        return []
    return [
        ref
        for ref in newest_of(history(remote, name))
        if ref.pinned == pushed.reference and ref.manifest != pushed.manifest and ref.identity != pushed.identity
    ]


def _forget(places: Sequence[Path], published: Manifest) -> None:
    """Remove working copies whose teacher outputs are all in the published version."""
    there = {digest.sha256 for digest in published.contents.files.values()}
    for place in places:
        with contextlib.suppress(KdcacheError):
            files = contents_so_far(place).files
            if all(digest.sha256 in there for path, digest in files.items() if path.startswith("teachers/")):
                shutil.rmtree(place, ignore_errors=True)
