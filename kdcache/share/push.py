"""Push: publish a cache under a name. Files first, then the manifest, then the ref; only what is missing travels.

The order of steps is that of docs/decisions/0010, and it is what keeps a push and a gc apart: intent, no live mark, presence,
files, manifest, ref, and once more the presence of all that was found there and not sent. A push whose intent lapsed (its
machine slept) begins again with the presence, so that it never trusts what it saw before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout as cache_layout
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.files import FileDigest
from kdcache.cache.manifest import read_manifest
from kdcache.cache.selection import local_selection
from kdcache.errors import MismatchError, RemoteAccessError, RemoteError
from kdcache.progress import SilentProgress
from kdcache.share import layout, refs
from kdcache.share.intents import Lease, Pace, hold, wait_until_none
from kdcache.share.parallel import WORKERS, SharedProgress, Stop, for_each
from kdcache.share.presence import missing_of
from kdcache.share.transfer import send_file

if TYPE_CHECKING:
    from kdcache.cache.manifest import Manifest
    from kdcache.progress import Progress
    from kdcache.share.refs import Ref
    from kdcache.share.remote import Remote

_ROUNDS = 5  # of beginning again after a lapse or a loss


@dataclass(frozen=True)
class PushReport:
    """What a push did, or with ``dry_run`` would do. Files are counted once per content, the manifest among them."""

    reference: str  # name@number; with dry_run the number that it would get
    identity: str
    manifest: str
    tag: str | None
    new_version: bool
    files: int
    bytes: int
    files_sent: int
    bytes_sent: int
    dry_run: bool


@dataclass(frozen=True)
class _Object:
    """Something that must be on the remote: a local file, or the manifest's own bytes."""

    digest: FileDigest
    path: Path | None  # None: not here (not pulled), or the manifest
    data: bytes | None = None


@dataclass
class _Job:
    """A push under way."""

    remote: Remote
    name: str
    tag: str | None
    manifest: Manifest
    manifest_sha: str
    objects: dict[str, _Object]  # by key; the manifest is the last one
    pace: Pace
    progress: Progress
    workers: int
    after: Collection[Ref] | None
    sent: dict[str, int] = field(default_factory=dict)  # key -> bytes


def push(
    remote: Remote,
    cache_dir: Path,
    name: str,
    *,
    tag: str | None = None,
    with_text: bool = True,
    dry_run: bool = False,
    after: Collection[Ref] | None = None,
    progress: Progress | None = None,
    pace: Pace | None = None,
    workers: int = WORKERS,
) -> PushReport:
    """Publish the cache in ``cache_dir`` as the newest version of ``name``; the same content again makes no new one.

    ``after``: what must be the newest version until this one is made; OvertakenError where it is not. Raises DamageError (a local file is missing or altered), MismatchError (files that were not pulled are not on the remote
    either; the tag is taken), LockedError (a gc does not end), RemoteAccessError (read-only credentials), RemoteError.
    """
    layout.check_name(name)
    if tag:
        layout.check_tag(tag)
    job = _prepare(remote, cache_dir, name, tag, with_text, pace or Pace(), progress or SilentProgress(), workers, after)
    if dry_run:
        return _would(job)
    with _writable(remote), hold(remote, "intent", job.pace) as lease:
        ref, new = _publish(job, lease)
    return _report(job, ref.pinned, new, job.sent, dry_run=False)


def _prepare(
    remote: Remote,
    root: Path,
    name: str,
    tag: str | None,
    with_text: bool,
    pace: Pace,
    progress: Progress,
    workers: int,
    after: Collection[Ref] | None,
) -> _Job:
    manifest = read_manifest(root)
    data = (root / cache_layout.MANIFEST).read_bytes()
    if not with_text:
        from kdcache.cache.textfree import without_text

        manifest = without_text(manifest)
        data = manifest.to_bytes()
    contents = manifest.contents
    local = local_selection(root, contents)
    here = contents.files.keys() if local is None else local.selection.covers(contents)
    files = CheckedFiles(root, contents.files)
    objects: dict[str, _Object] = {}
    for path, digest in contents.files.items():
        needed = path in here and (local is None or local.complete)
        if needed or (root / path).exists():  # what was added to a part of a cache need not belong to its selection
            files.check_present(path)
            objects[layout.file_key(digest.sha256)] = _Object(digest, root / path)
        else:
            objects.setdefault(layout.file_key(digest.sha256), _Object(digest, None))
    sha = hashlib.sha256(data).hexdigest()
    key = layout.manifest_key(sha)
    objects[key] = _Object(FileDigest(len(data), sha), None, data)
    return _Job(remote, name, tag, manifest, sha, objects, pace, progress, workers, after)


def _publish(job: _Job, lease: Lease) -> tuple[Ref, bool]:
    """The protocol. Gives back the ref and whether it is a new one."""
    found = refs.history(job.remote, job.name)
    before = {ref.key for ref in found}
    if job.after is not None and refs.newest_like(found, job.manifest_sha, job.tag) is None:
        refs.check_newest(found, job.after)  # before anything is sent; asked again as the ref is made
    ref: Ref | None = None
    for _ in range(_ROUNDS):
        lease.renew()
        epoch = lease.epoch
        wait_until_none(job.remote, "mark", job.pace, lease, job.progress.note)
        _send_missing(job, list(job.objects), lease)
        if not lease.holds(epoch):
            continue
        ref = ref or refs.publish(
            job.remote, job.name, job.manifest_sha, job.manifest.identity, job.tag,
            size=_size(job), files=len(job.objects) - 1, after=job.after, sleep=job.pace.sleep,
        )  # fmt: skip
        _send_missing(job, [key for key in job.objects if key not in job.sent], lease)
        if lease.holds(epoch):
            return ref, ref.key not in before
    raise RemoteError(
        f"the push of '{job.name}' fell asleep {_ROUNDS} times for longer than a gc waits",
        "Run it again on a machine that stays awake: what arrived is kept.",
    )


def _send_missing(job: _Job, keys: list[str], lease: Lease) -> None:
    """Send what of ``keys`` is not there; the manifest after all files."""
    missing = missing_of(job.remote, {key: job.objects[key].digest.size for key in keys}, job.workers)
    _refuse_absent(job, missing)
    if not missing:
        return
    total = sum(job.objects[key].digest.size for key in missing)
    files = [key for key in missing if job.objects[key].data is None]
    job.progress.start(f"push {job.name}", total, "bytes")
    shared = SharedProgress(job.progress)

    def send(key: str, stop: Stop) -> None:
        stop.check()
        one = job.objects[key]
        lease.beat()
        if one.data is not None:
            job.remote.write(key, one.data)
        else:
            assert one.path is not None
            send_file(job.remote, one.path, one.digest)
        job.sent[key] = one.digest.size
        shared.advance(one.digest.size, bytes_done=one.digest.size)

    for_each(files, send, job.workers)
    for_each([key for key in missing if job.objects[key].data is not None], send, 1)
    job.progress.finish()


def _refuse_absent(job: _Job, missing: list[str]) -> None:
    absent = {key for key in missing if job.objects[key].path is None and job.objects[key].data is None}
    if absent:
        files = job.manifest.contents.files
        paths = sorted(path for path, digest in files.items() if layout.file_key(digest.sha256) in absent)
        raise MismatchError(
            f"this cache is a part of its whole: {len(paths)} files were not pulled and are not on {job.remote.url}, "
            f"such as '{paths[0]}'",
            "Pull the rest first, or push to the remote that it was pulled from.",
        )


def _would(job: _Job) -> PushReport:
    missing = missing_of(job.remote, {key: one.digest.size for key, one in job.objects.items()}, job.workers)
    _refuse_absent(job, missing)
    history = refs.history(job.remote, job.name)
    newest = refs.newest_like(history, job.manifest_sha, job.tag)
    number = newest.number if newest else (history[-1].number if history else 0) + 1
    return _report(
        job, f"{job.name}@{number}", newest is None, {key: job.objects[key].digest.size for key in missing}, dry_run=True
    )  # fmt: skip


def _report(job: _Job, reference: str, new: bool, sent: dict[str, int], *, dry_run: bool) -> PushReport:
    return PushReport(
        reference, job.manifest.identity, job.manifest_sha, job.tag, new, len(job.objects), _size(job), len(sent),
        sum(sent.values()), dry_run,
    )  # fmt: skip


def _size(job: _Job) -> int:
    return sum(one.digest.size for one in job.objects.values())


@contextmanager
def _writable(remote: Remote) -> Iterator[None]:
    try:
        yield
    except RemoteAccessError as error:
        raise RemoteAccessError(
            f"push needs the right to write to {remote.url}: {error.message}",
            error.hint or "Use credentials that may write there; pull, ls and verify work with these.",
        ) from error
