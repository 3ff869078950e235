"""Read-through: open a cache on a remote at once, and fetch its files while a student trains.

    with read_through(remote, "sst2-3t", store=default_store(), progress=progress) as cache:
        distill(recipe, cache, ...)

The manifest is fetched first. The reader announces what it needs (``select``) and in which order (``expect``). A few
threads fetch files in that order; a reader that needs a file now fetches it itself. Files are kept in the local store,
so a second run fetches nothing and an interrupted one continues. Cache and loader do not depend on remotes: they use
the protocol ``kdcache.cache.digests.Arrivals``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.selection import Selection
from kdcache.errors import RemoteError
from kdcache.progress import SilentProgress, format_bytes
from kdcache.share.local_store import default_store, has_manifest, is_here
from kdcache.share.transfer import fetch_file

if TYPE_CHECKING:
    from pathlib import Path

    from kdcache.cache.manifest import Manifest
    from kdcache.files import FileDigest
    from kdcache.progress import Progress
    from kdcache.share.local_store import LocalStore
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote

WORKERS = 4  # files fetched at once, besides the one that the reader waits for
_HINT = "Run the same command again: it continues from its checkpoint, and fetches nothing that has arrived."


@dataclass(frozen=True)
class RemoteCache:
    """A version of a cache on a remote."""

    remote: Remote
    ref: Ref

    def read(self, progress: Progress) -> contextlib.AbstractContextManager[Cache]:
        """``read_through`` with the local store of this user."""
        return read_through(self.remote, self.ref, store=default_store(), progress=progress)


@contextlib.contextmanager
def read_through(
    remote: Remote, ref: Ref, *, store: LocalStore, progress: Progress | None = None, workers: int = WORKERS
) -> Iterator[Cache]:
    """Open a version of a cache for reading while its files are fetched.

    At the end of the block, unless it raised, the rest of the selection is fetched. Raises RemoteError, DamageError (an
    object of the remote is missing or altered), MismatchError, StorageError.
    """
    from kdcache.share.pull import fetch_manifest

    with store.use(ref.identity) as place:
        if not has_manifest(place, ref.identity):
            store.begin(fetch_manifest(remote, ref), ref.pinned)
        manifest = open_cache(place, incomplete=True).manifest
        arrivals = Arriving(remote, ref, manifest, store, progress or SilentProgress(), workers)
        try:
            yield open_cache(place, arrivals=arrivals)
            arrivals.finish()
        finally:
            arrivals.close()


class Arriving:
    """Fetches the files of one cache into the local store; implements ``Arrivals``."""

    def __init__(
        self,
        remote: Remote,
        ref: Ref,
        manifest: Manifest,
        store: LocalStore,
        progress: Progress,
        workers: int = WORKERS,
    ) -> None:
        self._remote, self._ref, self._manifest, self._store, self._progress = remote, ref, manifest, store, progress
        self._files = manifest.contents.files
        place = store.directory(manifest.identity)
        self._here = {path for path, digest in self._files.items() if is_here(place, path, digest)}
        self._queue: dict[str, None] = {}  # ordered: fetched from the front
        self._in_progress: set[str] = set()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._workers, self._threads = workers, list[threading.Thread]()
        self._failed: BaseException | None = None
        self.fetched = 0  # files that came over the network
        self._request(sorted(Selection({}, text=False).covers(manifest.contents)))

    def select(self, selection: Selection) -> None:
        """Queue the files of a selection behind those already expected. StorageError if the local store has no room."""
        wanted = self._store.select(self._manifest, selection, self._ref.pinned).covers(self._manifest.contents)
        coming = sum(self._files[path].size for path in wanted - self._here)
        if coming:
            there = sum(self._files[path].size for path in wanted & self._here)
            self._progress.note(
                f"{self._ref.pinned}: {format_bytes(coming)} are fetched while the student trains, "
                f"{format_bytes(there)} are here (kept in {self._store.root})"
            )
        self._request(_natural_order(wanted, self._manifest))

    def expect(self, paths: Sequence[str]) -> None:
        """Fetch these next, in this order."""
        with self._changed:
            first = dict.fromkeys(path for path in paths if self._is_to_come(path))
            self._queue = first | {path: None for path in self._queue if path not in first}
        self._start()

    def wait_for(self, path: str) -> None:
        """Return once a file is here; fetches it unless another thread does.

        Raises RemoteError, DamageError, StorageError.
        """
        with self._changed:
            while path in self._in_progress:
                self._changed.wait()
            if path in self._here and is_here(self._store.directory(self._manifest.identity), path, self._files[path]):
                return
            self._here.discard(path)
            self._queue.pop(path, None)
            self._in_progress.add(path)
        try:
            self._bring(path)
        except RemoteError as error:
            raise type(error)(error.message, " ".join(part for part in (error.hint, _HINT) if part)) from error
        self._start()

    def finish(self) -> None:
        """Wait until all selected files are here; what could not be fetched is noted and left to the next run."""
        self._start()
        with self._changed:
            while (self._queue or self._in_progress) and self._failed is None:
                self._changed.wait()
        if not self._store.finish(self._manifest, self._ref.pinned):
            reason = f" ({self._failed})" if self._failed is not None else ""
            self._progress.note(
                f"{self._ref.pinned}: some files that were not needed yet could not be fetched{reason}; the next run "
                "fetches them"
            )

    def close(self) -> None:
        """End the threads; a fetch in progress is abandoned."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(2.0)  # daemon threads: one that waits for the network ends with the process

    def _request(self, paths: Sequence[str]) -> None:
        with self._changed:
            self._queue |= {path: None for path in paths if self._is_to_come(path) and path not in self._queue}
        self._start()

    def _is_to_come(self, path: str) -> bool:
        return path not in self._here and path not in self._in_progress

    def _start(self) -> None:
        """Start as many threads as there are files to fetch; a failed one is replaced when another file has arrived."""
        with self._changed:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._failed = None
            for _ in range(min(self._workers, len(self._queue)) - len(self._threads)):
                thread = threading.Thread(target=self._work, name="kdcache-fetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._changed:
                path = next(iter(self._queue), None)
                if path is None or self._failed is not None:
                    return
                del self._queue[path]
                self._in_progress.add(path)
            try:
                self._bring(path)
            except _GivenUpError:
                return
            except BaseException as error:  # the reader that needs the file tries again and gets the error
                with self._changed:
                    self._queue[path] = None
                    self._failed = error
                    self._changed.notify_all()
                return

    def _bring(self, path: str) -> None:
        try:
            self._store.bring(self._manifest.identity, path, self._files[path], self._fetch, self._check)
            with self._changed:
                self._here.add(path)
        finally:
            with self._changed:
                self._in_progress.discard(path)
                self._changed.notify_all()

    def _fetch(self, digest: FileDigest, target: Path) -> None:
        self.fetched += 1
        fetch_file(self._remote, digest, target, lambda _: self._check())

    def _check(self) -> None:
        if self._stop.is_set():
            raise _GivenUpError


class _GivenUpError(Exception):
    """The reader was closed."""


def _natural_order(paths: set[str], manifest: Manifest) -> list[str]:
    """Small files and logits of validation and test texts, which are read before training; then part by part."""
    logits = {part.name for part in manifest.contents.parts if part.scope == "logits"}

    def key(path: str) -> tuple[int, str, str]:
        part = next((step[:10] for step in path.split("/") if step.startswith("part-")), "")
        return (0 if not part or part in logits else 1, part, path)

    return sorted(paths, key=key)
