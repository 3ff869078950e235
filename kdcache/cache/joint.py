"""Several processes write one cache in one directory: the members of a joint dump.

    with member(root) as joint:
        with joint.planning():
            writer = joint.open(task, settings)       # add texts, declare teachers
        writer.write_part(...)                        # at the same time as other members
        with joint.planning():
            joint.open(task, settings).publish(...)   # whoever finds everything complete

All members hold the lock of the directory shared, which a plain writer holds alone. ``planning`` is for one member at a
time. A part is committed in a short turn of its own: the member reads the part's commit record again and writes only
components that the record lacks. So the first of two members that run the same part wins, also where their results
differ in the last bits. A member whose dump was published or replaced meanwhile writes nothing more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.canonical import canonical_json
from kdcache.cache.journal import Journal
from kdcache.cache.opening import holder, open_contents, refuse_links, refuse_other_directory, state_directory
from kdcache.cache.selection import local_selection
from kdcache.cache.writer import CacheWriter
from kdcache.errors import KdcacheError, LockedError
from kdcache.files import remove_temporaries, write_file
from kdcache.locks import attempt, hold

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.spec import Settings, TaskSpec

_TURNS = 64  # lock files for turns: two parts seldom share one
_PATIENCE = 1800.0  # seconds that a member waits for another one that plans or publishes


class SupersededError(KdcacheError):
    """The dump of this member was published, or replaced, by another process."""


@contextlib.contextmanager
def member(root: Path) -> Iterator[Joint]:
    """Be a member of the joint dump in ``root`` while the block runs; makes the directory.

    Raises LockedError if a plain writer holds the directory, and MismatchError or DamageError as ``open_writer``.
    """
    refuse_other_directory(root)
    refuse_links(root)
    state = state_directory(root)
    with contextlib.ExitStack() as stack:
        with planning(root):
            with attempt(state / "lock") as alone:
                if alone:
                    remove_temporaries(root)
            if not stack.enter_context(attempt(state / "lock", shared=True)):
                raise LockedError(
                    f"cache '{root}' is being written by {holder(state)}, which does not share the work",
                    "Wait until it is done, or stop that process and run the same command again.",
                )
            write_file(state / "holder.json", canonical_json({"host": socket.gethostname(), "pid": os.getpid()}))
        yield Joint(root)
    with planning(root), attempt(state / "lock") as alone:
        if alone:  # the last one removes what killed members left
            remove_temporaries(root)


class Joint:
    """One member. ``identity``: of the manifest that the dump starts from; empty if there is none."""

    def __init__(self, root: Path, identity: str = "") -> None:
        self.root = root
        self.identity = identity

    def planning(self) -> AbstractContextManager[None]:
        """Be the only member that adds texts, declares teachers or publishes. Raises as the function."""
        return planning(self.root)

    def open(self, task: TaskSpec, settings: Settings, *, store_text: bool = True) -> CacheWriter:
        """All that is published or committed by now, for writing; called within ``planning``. Raises as
        ``open_writer``.
        """
        base, contents, journal = open_contents(self.root, task, settings, store_text, repair=False, alone=False)
        local = local_selection(self.root, base.contents) if base is not None else None
        self.identity = base.identity if base is not None else ""
        return CacheWriter(self.root, base, contents, journal, local, joint=self)

    def writer_of(self, contents: Contents) -> CacheWriter:
        """A writer that knows only ``contents``, such as those of one part."""
        return CacheWriter(self.root, None, contents, Journal(self.root), joint=self)

    def turn(self, teacher: str, part: str | None) -> AbstractContextManager[None]:
        """Be the only member that writes this part of a teacher, or, without ``part``, that fits its bases."""
        state = self.root / layout.STATE
        if part is None:
            return hold(state / f"fit-{teacher}")
        return hold(state / "turns" / f"{zlib.crc32(f'{teacher}/{part}'.encode()) % _TURNS:02d}")

    def check_current(self, journal: Journal) -> None:
        """Raises SupersededError if the dump was published or replaced; called after a commit record was read.

        Records are removed after ``base.json``. So if a record was missing because of that, this notices.
        """
        begun = journal.base()
        if begun is None or begun["identity"] != self.identity:
            raise SupersededError(
                f"cache '{self.root}' was published by another process meanwhile", "Run the same command again."
            )


@contextlib.contextmanager
def planning(root: Path) -> Iterator[None]:
    """Be the only process that plans or publishes in ``root``. Raises LockedError after half an hour."""
    state, began = root / layout.STATE, time.monotonic()

    def check() -> None:
        if time.monotonic() - began > _PATIENCE:
            raise LockedError(
                f"another process has planned or published in '{root}' for {_PATIENCE / 60:.0f} minutes; the last one "
                f"to begin was {holder(state)}",
                "Wait until it is done, or stop that process and run the same command again.",
            )

    with hold(state / "plan", check=check):
        yield
