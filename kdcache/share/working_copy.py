"""A version of a remote cache in a local directory where it can be extended; its files are hard links, not copies.

    store/extending/<name>-<identity, 16 hex>-<what is added, 12 hex>/

The working copy starts with the manifest alone. A file that the writer reads is fetched into the local store and
hard-linked here; files that the writer adds are here only. So the old version does not change, unchanged files are
shared, and a push of the working copy sends the new ones. An interrupted extension continues in the same copy. One
that adds something else has a copy of its own, so it does not publish what was left behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.selection import Selection, write_selection
from kdcache.errors import LockedError
from kdcache.files import make_directory, write_file
from kdcache.locks import attempt
from kdcache.share.reading_through import read_through

if TYPE_CHECKING:
    from kdcache.cache.digests import Arrivals
    from kdcache.cache.manifest import Manifest
    from kdcache.progress import Progress
    from kdcache.share.local_store import LocalStore
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote


@dataclass(frozen=True)
class WorkingCopy:
    """``path``: the directory; ``arrivals`` fetches further files; ``manifest``: that of the version on the remote."""

    path: Path
    arrivals: Arrivals
    manifest: Manifest


@contextlib.contextmanager
def working_copy(
    remote: Remote, ref: Ref, added: str, *, store: LocalStore, progress: Progress | None = None
) -> Iterator[WorkingCopy]:
    """Open the working copy for what ``added``, a digest in hex, stands for.

    Raises LockedError if another process has the same one open, and as ``read_through``.
    """
    path = store.root / "extending" / f"{ref.name}-{ref.identity[:16]}-{added[:12]}"
    with attempt(store.root / "locks" / f"extending-{path.name}") as free:
        if not free:
            raise LockedError(
                f"another process is extending {ref.pinned}", "Wait until it is done, then extend its result."
            )
        with read_through(remote, ref, store=store, progress=progress) as cache:
            assert cache.arrivals is not None
            linking = _Linking(cache.arrivals, cache.path, path)
            for name in sorted(Selection({}, text=False).covers(cache.manifest.contents)):
                linking.wait_for(name)
            if not (path / layout.MANIFEST).is_file():
                write_selection(path, Selection({}, text=False), complete=False, origin=ref.pinned)
                write_file(path / layout.MANIFEST, cache.manifest.to_bytes())
            yield WorkingCopy(path, linking, cache.manifest)


@contextlib.contextmanager
def other_copies(name: str, copy: WorkingCopy, *, store: LocalStore) -> Iterator[tuple[Path, ...]]:
    """Other working copies of versions of the name, locked while the block runs; those in use are left out."""
    of_name = re.compile(rf"{re.escape(name)}-[0-9a-f]{{16}}(-[0-9a-f]{{12}})?")  # 0.1.0 had one for each version
    with contextlib.ExitStack() as stack:
        copies = []
        for path in sorted((store.root / "extending").glob(f"{name}-*")):
            there = of_name.fullmatch(path.name) and path != copy.path and (path / layout.MANIFEST).is_file()
            if there and stack.enter_context(attempt(store.root / "locks" / f"extending-{path.name}")):
                copies.append(path)
        yield tuple(copies)


@dataclass(frozen=True)
class _Linking:
    """Fetches into ``source`` and hard-links into ``target``."""

    arrivals: Arrivals
    source: Path
    target: Path

    def wait_for(self, path: str) -> None:
        self.arrivals.wait_for(path)
        make_directory((self.target / path).parent)
        with contextlib.suppress(FileExistsError):
            try:
                os.link(self.source / path, self.target / path)
            except FileExistsError:
                raise
            except OSError:
                shutil.copyfile(self.source / path, self.target / path)

    def select(self, selection: Selection) -> None:
        self.arrivals.select(selection)

    def expect(self, paths: Sequence[str]) -> None:
        self.arrivals.expect(paths)
