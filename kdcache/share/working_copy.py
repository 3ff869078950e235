"""A version of a remote's cache in a directory where it can grow: what is read of it arrives, and is linked, not
copied.

The copy begins with the manifest alone. A file that the writer wants to read comes through the local store and gets a
second name here; what the writer adds lies here only. So the old version stays as it is, unchanged files are shared,
and a push of the copy sends what is new. A copy that was left by an interruption is gone on with.
"""

from __future__ import annotations

import contextlib
import os
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
    """``path``: a cache directory of which little is there; ``arrivals`` brings what is wanted of the rest.

    ``manifest`` is that of the version on the remote, whatever was added in ``path`` since.
    """

    path: Path
    arrivals: Arrivals
    manifest: Manifest


@contextlib.contextmanager
def working_copy(
    remote: Remote, ref: Ref, *, store: LocalStore, progress: Progress | None = None
) -> Iterator[WorkingCopy]:
    """Raises LockedError where another process works on the same version; what ``read_through`` raises."""
    path = store.root / "extending" / f"{ref.name}-{ref.identity[:16]}"
    with attempt(store.root / "locks" / f"extending-{path.name}") as free:
        if not free:
            raise LockedError(
                f"another process is extending {ref.pinned}", "Wait until it is done, and extend what it makes."
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
    """Copies of other versions of a name in which work was left, held while the block runs.

    Those that others hold are left out.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for path in sorted((store.root / "extending").glob(f"{name}-*")):
            same_name = (
                path.name.rpartition("-")[0] == name and path != copy.path and (path / layout.MANIFEST).is_file()
            )
            if same_name and stack.enter_context(attempt(store.root / "locks" / f"extending-{path.name}")):
                found.append(path)
        yield tuple(found)


@dataclass(frozen=True)
class _Linking:
    """Arrivals of another directory, which get a second name in this one."""

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
