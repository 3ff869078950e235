"""Push: publish a cache under a name. Only missing objects are sent: files, then the manifest, then the ref.

The order of steps keeps a push and a gc apart (docs/decisions/0010): write an intent, wait until no mark is alive, ask
which objects exist, send the others, write the ref, and ask once more for the objects that were not sent. If the lease
expires (the machine was suspended), the push starts again by asking which objects exist.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout as cache_layout
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.layout import text_file
from kdcache.cache.manifest import Manifest, make_manifest, read_manifest
from kdcache.cache.selection import local_selection
from kdcache.errors import MismatchError, RemoteAccessError, RemoteError
from kdcache.files import digest_bytes
from kdcache.progress import SilentProgress
from kdcache.share import keys as layout
from kdcache.share import refs
from kdcache.share.intents import Lease, LeaseTiming, hold, wait_until_none
from kdcache.share.parallel import WORKERS, SharedProgress, Stop, for_each
from kdcache.share.presence import missing_of
from kdcache.share.transfer import send_file

if TYPE_CHECKING:
    from kdcache.files import FileDigest
    from kdcache.progress import Progress
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote


_ROUNDS = 5  # attempts, each of which ends if the lease expires


@dataclass(frozen=True)
class PushReport:
    """What a push did, or with ``dry_run`` would do. Counts each content once, including the manifest."""

    reference: str  # name@number; with dry_run the number it would get
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
    """An object that must be on the remote: a local file, or the manifest."""

    digest: FileDigest
    path: Path | None  # None: the manifest, or a file that was not pulled
    data: bytes | None = None


@dataclass
class _Job:
    """A push in progress."""

    remote: Remote
    name: str
    tag: str | None
    manifest: Manifest
    objects: dict[str, _Object]  # by key; the manifest is the last one
    timing: LeaseTiming
    progress: Progress
    workers: int
    after: Collection[Ref] | None
    sent: dict[str, int] = field(default_factory=dict)  # key -> bytes

    @property
    def manifest_sha(self) -> str:
        """sha256 of the bytes of the manifest."""
        return next(reversed(self.objects.values())).digest.sha256

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every object, by key."""
        return {key: item.digest.size for key, item in self.objects.items()}

    def missing(self, keys: Collection[str]) -> dict[str, int]:
        """Those of ``keys`` that the remote lacks, with their sizes. MismatchError if one is not here either."""
        sizes = self.sizes
        missing = missing_of(self.remote, {key: sizes[key] for key in keys}, self.workers)
        _refuse_absent(self, missing)
        return {key: sizes[key] for key in missing}


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
    timing: LeaseTiming | None = None,
    workers: int = WORKERS,
) -> PushReport:
    """Publish a cache as the newest version of a name. Pushing the same content again makes no new version.

    Args:
        remote: The remote to publish on.
        cache_dir: Directory of the cache.
        name: The name on the remote.
        tag: A tag for the version.
        with_text: Whether to publish the texts; ids, labels and targets always are.
        dry_run: Report what would be sent, and send nothing.
        after: The refs that must be the newest version until this one is made.
        progress: Reports bytes sent.
        timing: Intervals of the lease.
        workers: Threads that send.

    Returns:
        What was sent, and the version's reference.

    Raises:
        OvertakenError: ``after`` is not the newest version.
        DamageError: A local file is missing or altered.
        MismatchError: The remote lacks files that were not pulled; or another version has the tag.
        LockedError: A gc is in progress and does not end.
        RemoteAccessError: The credentials are read-only.
        RemoteError: The remote failed, or the lease expired too often.
    """
    layout.check_name(name)
    if tag:
        layout.check_tag(tag)
    manifest, objects = _objects(cache_dir, with_text)
    job = _Job(
        remote, name, tag, manifest, objects, timing or LeaseTiming(), progress or SilentProgress(), workers, after
    )
    if dry_run:
        return _would(job)
    with _writable(remote), hold(remote, "intent", job.timing) as lease:
        ref, new = _publish(job, lease)
    return _report(job, ref.pinned, new, job.sent, dry_run=False)


def _objects(root: Path, with_text: bool) -> tuple[Manifest, dict[str, _Object]]:
    """The manifest to publish, and the objects of ``_Job``. Raises DamageError for a file that should be here."""
    manifest = read_manifest(root)
    data = (root / cache_layout.MANIFEST).read_bytes()
    if not with_text:
        manifest = without_text(manifest)
        data = manifest.to_bytes()
    contents = manifest.contents
    local = local_selection(root, contents)
    here = contents.files.keys() if local is None else local.selection.covers(contents)
    files = CheckedFiles(root, contents.files)
    objects: dict[str, _Object] = {}
    for path, digest in contents.files.items():
        needed = path in here and (local is None or local.complete)
        if needed or (root / path).exists():  # files added to a partly pulled cache need not be in its selection
            files.check_present(path)
            objects[layout.file_key(digest.sha256)] = _Object(digest, root / path)
        else:
            objects.setdefault(layout.file_key(digest.sha256), _Object(digest, None))
    digest = digest_bytes(data)
    objects[layout.manifest_key(digest.sha256)] = _Object(digest, None, data)
    return manifest, objects


def _publish(job: _Job, lease: Lease) -> tuple[Ref, bool]:
    """Run the protocol; returns the ref and whether it is new."""
    history = refs.history(job.remote, job.name)
    before = {ref.key for ref in history}
    there = refs.newest_like(history, job.manifest_sha, job.tag)
    if there is None:  # before anything is sent; checked again when the ref is made
        refs.refuse_taken_tag(history, job.manifest_sha, job.tag)
        if job.after is not None:
            refs.check_newest(history, job.after)
    ref: Ref | None = None
    for _ in range(_ROUNDS):
        lease.renew()
        epoch = lease.epoch
        wait_until_none(job.remote, "mark", job.timing, lease, job.progress.note)
        _send_missing(job, job.objects, lease)
        if not lease.holds(epoch):
            continue
        ref = ref or refs.publish(
            job.remote, job.name, job.manifest_sha, job.manifest.identity, job.tag,
            size=sum(job.sizes.values()), files=len(job.objects) - 1, after=job.after, sleep=job.timing.sleep,
        )  # fmt: skip
        _send_missing(job, [key for key in job.objects if key not in job.sent], lease)
        if lease.holds(epoch):
            return ref, ref.key not in before
    raise RemoteError(
        f"the push of '{job.name}' lost its lease {_ROUNDS} times: was the machine suspended?",
        "Run it again on a machine that is not suspended meanwhile: what was sent is kept.",
    )


def _send_missing(job: _Job, keys: Collection[str], lease: Lease) -> None:
    """Send the objects of ``keys`` that are missing; the manifest last."""
    missing = job.missing(keys)
    if not missing:
        return
    job.progress.start(f"push {job.name}", sum(missing.values()), "bytes")
    shared = SharedProgress(job.progress)

    def send(key: str, stop: Stop) -> None:
        stop.check()
        item = job.objects[key]
        lease.beat()
        if item.data is not None:
            job.remote.write(key, item.data)
        else:
            assert item.path is not None
            send_file(job.remote, item.path, item.digest)
        job.sent[key] = item.digest.size
        shared.advance(item.digest.size, bytes_done=item.digest.size)

    for_each([key for key in missing if job.objects[key].data is None], send, job.workers)
    for_each([key for key in missing if job.objects[key].data is not None], send, 1)
    job.progress.finish()


def _refuse_absent(job: _Job, missing: Collection[str]) -> None:
    absent = {key for key in missing if job.objects[key].path is None and job.objects[key].data is None}
    if absent:
        files = job.manifest.contents.files
        paths = sorted(path for path, digest in files.items() if layout.file_key(digest.sha256) in absent)
        raise MismatchError(
            f"only a part of this cache was pulled: {len(paths)} other files are not on {job.remote.url} either, "
            f"such as '{paths[0]}'",
            "Pull the rest first, or push to the remote that it came from.",
        )


def _would(job: _Job) -> PushReport:
    missing = job.missing(job.objects)
    history = refs.history(job.remote, job.name)
    newest = refs.newest_like(history, job.manifest_sha, job.tag)
    if newest is None:
        refs.refuse_taken_tag(history, job.manifest_sha, job.tag)
    number = newest.number if newest else (history[-1].number if history else 0) + 1
    return _report(job, f"{job.name}@{number}", newest is None, missing, dry_run=True)


def _report(job: _Job, reference: str, new: bool, sent: dict[str, int], *, dry_run: bool) -> PushReport:
    return PushReport(
        reference, job.manifest.identity, job.manifest_sha, job.tag, new, len(job.objects), sum(job.sizes.values()),
        len(sent), sum(sent.values()), dry_run,
    )  # fmt: skip


@contextmanager
def _writable(remote: Remote) -> Iterator[None]:
    try:
        yield
    except RemoteAccessError as error:
        raise RemoteAccessError(
            f"push needs write access to {remote.url}: {error.message}",
            error.hint or "Use credentials that may write there; pull, ls and verify work without.",
        ) from error


def without_text(manifest: Manifest) -> Manifest:
    """The manifest of the same cache without texts, as ``dump-teachers --no-text`` makes it; keeps the provenance."""
    contents = manifest.contents
    if not contents.has_text:
        return manifest
    texts = {text_file(part.name) for part in contents.parts}
    files = {path: digest for path, digest in contents.files.items() if path not in texts}
    return make_manifest(replace(contents.copy(), has_text=False, files=files), manifest.provenance)
