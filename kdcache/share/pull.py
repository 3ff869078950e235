"""Pull: a version of a name, or a part of it, into a directory.

The manifest is written last, so an interrupted pull leaves no directory that looks like a cache. A record in the
directory's state names the manifest that the files belong to, so the same command continues. To complete a partial
pull, the further files are fetched first, then the wider selection is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout as cache_layout
from kdcache.cache.canonical import NotCanonicalError, canonical_json, parse_json
from kdcache.cache.card import cache_card
from kdcache.cache.manifest import MAX_BYTES, parse_manifest, read_manifest
from kdcache.cache.opening import hold_lock, refuse_other_directory
from kdcache.cache.selection import Selection, local_selection, union, write_selection
from kdcache.errors import DamageError, MismatchError, MissingObjectError
from kdcache.files import FileDigest, make_directory, remove_file, remove_temporaries, write_file
from kdcache.progress import SilentProgress
from kdcache.share import keys as layout
from kdcache.share.parallel import WORKERS, SharedProgress, Stop, for_each
from kdcache.share.refs import Ref, resolve
from kdcache.share.transfer import copy_file, fetch_file, file_digest

if TYPE_CHECKING:
    from kdcache.cache.manifest import Manifest
    from kdcache.progress import Progress
    from kdcache.share.stores.base import Remote

__all__ = ["PullReport", "fetch_file", "fetch_manifest", "fetch_manifest_bytes", "pull"]

RECORD = "pull.json"  # in the state directory, until the first pull is complete
_READS = 3  # attempts to read a manifest with the right sha256


@dataclass(frozen=True)
class PullReport:
    """What a pull did; ``files_kept`` were not fetched: they were here already, or are copies of a fetched file."""

    reference: str  # name@number
    identity: str
    path: str
    files_fetched: int
    bytes_fetched: int
    files_kept: int
    bytes_kept: int
    selection: Selection | None  # the part of the cache that is here now; None: all of it


def fetch_manifest(remote: Remote, ref: Ref) -> Manifest:
    """The manifest of a version. Raises DamageError (missing, altered, invalid), MismatchError (newer format)."""
    return _parsed(remote, ref, fetch_manifest_bytes(remote, ref))


def fetch_manifest_bytes(remote: Remote, ref: Ref) -> bytes:
    """The bytes of a version's manifest, whose sha256 is right. Raises DamageError, RemoteError."""
    key = layout.manifest_key(ref.manifest)
    hint = "Push the cache again under that name, or pull another version."
    for _ in range(_READS):
        try:
            data = remote.read_bytes(key, MAX_BYTES)
        except MissingObjectError as error:
            raise DamageError(f"'{key}', the manifest of {ref.pinned}, is missing on {remote.url}", hint) from error
        if hashlib.sha256(data).hexdigest() == ref.manifest:
            return data
    raise DamageError(f"'{key}' on {remote.url} is altered: its sha256 differs from its name", hint)


def pull(
    remote: Remote,
    reference: str,
    target: Path,
    selection: Selection | None = None,
    *,
    progress: Progress | None = None,
    workers: int = WORKERS,
) -> PullReport:
    """Fetch a version of a cache, or a part of it, into a directory.

    Args:
        remote: The remote to fetch from.
        reference: NAME, NAME@3, NAME@TAG or NAME@DIGEST.
        target: The directory. Files that are there already are verified and kept.
        selection: The part to fetch, in addition to what was selected before; None for all of it.
        progress: Reports bytes fetched.
        workers: Threads that fetch.

    Returns:
        What was fetched and what was kept.

    Raises:
        MismatchError: There is no such version, or the directory holds something else.
        DamageError: An object of the remote is missing or altered.
        LockedError: Another process writes the directory.
        RemoteError: The remote failed.
        StorageError: The disk is full or not writable.
    """
    ref = resolve(remote, reference)
    data = fetch_manifest_bytes(remote, ref)
    manifest = _parsed(remote, ref, data)
    _refuse_other(target, ref)
    make_directory(target)
    with hold_lock(target):
        finished = _refuse_other(target, ref)
        remove_temporaries(target)
        wanted = _selection_after(target, manifest, selection, finished)
        if not finished:
            write_file(
                target / cache_layout.STATE / RECORD,
                canonical_json({"manifest": ref.manifest, "identity": ref.identity}),
            )
        fetched, kept = _fetch(remote, ref, manifest, wanted, target, progress or SilentProgress(), workers)
        write_selection(target, wanted, origin=ref.pinned)
        if not finished:
            write_file(target / cache_layout.CARD, cache_card(manifest, name=ref.name).encode("utf-8"))
            write_file(target / cache_layout.MANIFEST, data)
        remove_file(target / cache_layout.STATE / RECORD)
    shown = None if wanted.is_whole else wanted
    return PullReport(
        ref.pinned, ref.identity, str(target), len(fetched), _bytes(fetched), len(kept), _bytes(kept), shown
    )


def _bytes(digests: Iterable[FileDigest]) -> int:
    return sum(digest.size for digest in digests)


def _parsed(remote: Remote, ref: Ref, data: bytes) -> Manifest:
    manifest = parse_manifest(data, f"'{layout.manifest_key(ref.manifest)}' on {remote.url}")
    if manifest.identity != ref.identity:
        raise DamageError(
            f"'{ref.key}' on {remote.url} says identity {ref.identity[:12]}, its manifest {manifest.identity[:12]}",
            "Push the cache again under that name, or pull another version.",
        )
    return manifest


def _refuse_other(target: Path, ref: Ref) -> bool:
    """Whether the directory holds this cache. MismatchError unless it is empty or holds a part of this pull."""
    if (target / cache_layout.MANIFEST).exists():
        identity = read_manifest(target).identity
        if identity != ref.identity:
            raise MismatchError(
                f"'{target}' holds another cache ({identity[:12]}) than {ref.pinned} ({ref.identity[:12]})",
                "Pull into a directory of its own: --to DIR",
            )
        return True
    record = target / cache_layout.STATE / RECORD
    if record.exists():
        begun = _read_record(record)
        if begun not in ("", ref.manifest):
            raise MismatchError(
                f"'{target}' holds an unfinished pull of manifest {begun[:12]}, not of {ref.manifest[:12]}",
                "Finish that one, remove the directory, or pull into another one: --to DIR",
            )
        return False
    refuse_other_directory(target)
    if (target / cache_layout.STATE / "base.json").exists():
        raise MismatchError(f"'{target}' holds an unfinished dump", "Pull into a directory of its own: --to DIR")
    return False


def _read_record(path: Path) -> str:
    """The manifest of an unfinished pull; empty if the record is unreadable: then only digests are compared."""
    try:
        record = parse_json(path.read_bytes()[:4096])
        return str(record["manifest"]) if isinstance(record, dict) else ""
    except (OSError, NotCanonicalError, KeyError):
        return ""


def _selection_after(target: Path, manifest: Manifest, selection: Selection | None, finished: bool) -> Selection:
    asked = selection or Selection()
    if not finished:
        return asked
    local = local_selection(target, manifest.contents)
    return Selection() if local is None else union(local.selection, asked)


def _fetch(
    remote: Remote, ref: Ref, manifest: Manifest, selection: Selection, target: Path, progress: Progress, workers: int
) -> tuple[list[FileDigest], list[FileDigest]]:
    """Fetch the files of the selection that are missing or altered; returns the fetched and the kept files.

    Content that occurs under several names is fetched once.
    """
    places: dict[FileDigest, list[str]] = {}
    for path in sorted(selection.covers(manifest.contents)):
        places.setdefault(manifest.contents.files[path], []).append(path)
    fetched, kept = list[FileDigest](), list[FileDigest]()
    progress.start(f"pull {ref.pinned}", sum(digest.size * len(paths) for digest, paths in places.items()), "bytes")
    shared = SharedProgress(progress)

    def bring(item: tuple[FileDigest, list[str]], stop: Stop) -> None:
        digest, paths = item

        def arrived(count: int) -> None:
            stop.check()
            shared.advance(count, bytes_done=count)

        there = [path for path in paths if _is_there(target, path, digest)]
        new = not there
        if new:
            fetch_file(remote, digest, target / paths[0], arrived)
            there = paths[:1]
        for path in paths:
            if path not in there:
                copy_file(target / there[0], digest, target / path)
        shared.advance(digest.size * (len(paths) - new))
        fetched.extend([digest] * new)
        kept.extend([digest] * (len(paths) - new))

    for_each(places.items(), bring, workers)
    progress.finish()
    return fetched, kept


def _is_there(target: Path, path: str, digest: FileDigest) -> bool:
    """Whether the file is there with the right bytes; DamageError if its path contains a symbolic link."""
    for place in _steps(target, path):
        if place.is_symlink():
            raise DamageError(
                f"'{place}' is a symbolic link; a cache holds plain files only",
                "Remove it, or pull into another directory.",
            )
    place = target / path
    if not place.is_file() or place.stat().st_size != digest.size:
        return False
    return file_digest(place) == digest


def _steps(target: Path, path: str) -> Iterable[Path]:
    place = target
    for step in path.split("/"):
        place = place / step
        yield place
