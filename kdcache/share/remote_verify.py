"""Verify that a version on a remote has all its objects, with the right size and, if asked, the right bytes.

Presence and size are checked for every object. The bytes of all files, or of a seeded share of them, can be read and
hashed; nothing is kept. Every problem is reported, not only the first.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kdcache.cache.verify import Damage
from kdcache.errors import DamageError
from kdcache.progress import SilentProgress
from kdcache.share import keys as layout
from kdcache.share.parallel import SharedProgress, Stop, for_each
from kdcache.share.presence import sizes_of
from kdcache.share.pull import fetch_manifest
from kdcache.share.transfer import check_object

if TYPE_CHECKING:
    from kdcache.files import FileDigest
    from kdcache.progress import Progress
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote


def verify_remote(
    remote: Remote,
    ref: Ref,
    *,
    share: float = 0.0,
    seed: str = "",
    progress: Progress | None = None,
) -> list[Damage]:
    """The damaged objects of a version, with reasons; empty if it is whole.

    Args:
        remote: The remote.
        ref: The version.
        share: Share of the files (0 to 1) whose bytes are read.
        seed: Selects these files, together with their digests.
        progress: Reports bytes read.

    Raises:
        RemoteError: The remote failed. Damage is returned, never raised.
    """
    try:
        manifest = fetch_manifest(remote, ref)
    except DamageError as error:
        return [Damage(layout.manifest_key(ref.manifest), error.message)]
    paths: dict[FileDigest, str] = {}
    for path, digest in sorted(manifest.contents.files.items()):
        paths.setdefault(digest, path)
    damages = _presence(remote, paths)
    chosen = {
        digest: path for digest, path in paths.items() if digest not in damages and _is_chosen(digest, share, seed)
    }
    damages |= _read(remote, chosen, progress or SilentProgress())
    return sorted(damages.values(), key=lambda damage: damage.file)


def _presence(remote: Remote, paths: Mapping[FileDigest, str]) -> dict[FileDigest, Damage]:
    there = sizes_of(remote, [layout.file_key(digest.sha256) for digest in paths])
    damages = {}
    for digest, path in paths.items():
        key = layout.file_key(digest.sha256)
        size = there.get(key)
        if size is None:
            damages[digest] = Damage(key, f"'{path}' is missing: there is no '{key}' on {remote.url}")
        elif size != digest.size:
            damages[digest] = Damage(key, f"'{path}' is damaged: '{key}' has {size} bytes, expected {digest.size}")
    return damages


def _read(remote: Remote, chosen: Mapping[FileDigest, str], progress: Progress) -> dict[FileDigest, Damage]:
    if not chosen:
        return {}
    damages: dict[FileDigest, Damage] = {}
    guard = threading.Lock()
    progress.start("verify", sum(digest.size for digest in chosen), "bytes")
    shared = SharedProgress(progress)

    def check(item: tuple[FileDigest, str], stop: Stop) -> None:
        digest, path = item

        def arrived(count: int) -> None:
            stop.check()
            shared.advance(count, bytes_done=count)

        key = layout.file_key(digest.sha256)
        try:
            check_object(remote, key, digest, arrived)
        except DamageError as error:
            with guard:
                damages[digest] = Damage(key, f"'{path}' is damaged: {error.message}")

    for_each(chosen.items(), check)
    progress.finish()
    return damages


def _is_chosen(digest: FileDigest, share: float, seed: str) -> bool:
    if share >= 1:
        return True
    drawn = hashlib.sha256(f"{seed}\n{digest.sha256}".encode()).digest()[:8]
    return int.from_bytes(drawn, "big") < share * 2**64
