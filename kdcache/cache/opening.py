"""Opening a cache directory for writing: lock it, read its manifest and records, remove leftovers, find damage.

One process at a time may write. The lock is the operating system's, so it is released when its holder dies; a file
beside it names the holder for the error message.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcache.cache import layout
from kdcache.cache.canonical import NotCanonicalError, canonical_json, parse_json
from kdcache.cache.contents import Contents
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.journal import Journal
from kdcache.cache.manifest import Manifest, read_manifest
from kdcache.cache.selection import component, read_local
from kdcache.cache.spec import Settings, TaskSpec
from kdcache.cache.stale import check_task
from kdcache.errors import DamageError, MismatchError
from kdcache.files import make_directory, remove_file, remove_temporaries, write_file
from kdcache.locks import exclusive


@contextlib.contextmanager
def hold_lock(root: Path) -> Iterator[None]:
    """Hold the lock of a cache directory while the block runs. Raises LockedError, which names the holder."""
    state = state_directory(root)
    with exclusive(state / "lock", busy=lambda: f"cache '{root}' is being written by {holder(state)}"):
        write_file(state / "holder.json", canonical_json({"host": socket.gethostname(), "pid": os.getpid()}))
        yield


def state_directory(root: Path) -> Path:
    """The directory of locks and commit records, made if missing. Raises DamageError if it is a link."""
    state = root / layout.STATE
    if state.is_symlink() or (state / "lock").is_symlink():
        raise DamageError(f"'{state}' is a symbolic link to another place", "Remove it.")
    make_directory(state)
    return state


def holder(state: Path) -> str:
    """The process that locked a cache directory last, for messages."""
    try:
        holder = parse_json((state / "holder.json").read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, NotCanonicalError, KeyError, TypeError):
        return "another process"


def refuse_links(root: Path) -> None:
    """Raises DamageError if a cache contains a symbolic link: a write through it would go elsewhere."""
    for directory, directories, names in os.walk(root):
        for name in (*directories, *names):
            if (Path(directory) / name).is_symlink():
                raise DamageError(
                    f"'{Path(directory) / name}' is a symbolic link; a cache holds plain files only",
                    "Remove it, or name another directory.",
                )


def refuse_other_directory(root: Path) -> None:
    """Raises MismatchError if a directory holds something else than a cache, DamageError if its manifest is lost."""
    if root.exists() and not root.is_dir():
        raise MismatchError(f"'{root}' is a file, not a directory", "Name another directory for the cache.")
    if not root.is_dir():
        return
    # Names first, then the records, then the manifest: another process may begin or publish a dump meanwhile.
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    if (root / layout.STATE / "base.json").exists() or (root / layout.MANIFEST).exists():
        return
    if {"texts", "teachers"} & set(names):
        raise _lost_manifest(root)
    if names:
        raise MismatchError(
            f"directory '{root}' holds '{names[0]}' and no cache", "Name an empty directory, or a new one."
        )


def _lost_manifest(root: Path) -> DamageError:
    return DamageError(
        f"cache '{root}' has lost its {layout.MANIFEST}", "Restore it from a copy, or dump into a new directory."
    )


def open_contents(
    root: Path, task: TaskSpec, settings: Settings, has_text: bool, repair: bool, *, alone: bool = True
) -> tuple[Manifest | None, Contents, Journal]:
    """The manifest, if any, and the contents according to it and the commit records. The caller holds the lock.

    ``alone``: nobody else writes, so temporary files are leftovers and are removed.
    """
    base = read_manifest(root) if (root / layout.MANIFEST).exists() else None
    journal = Journal(root)
    begun = journal.base()
    identity = base.identity if base else ""
    if begun is not None and begun["identity"] != identity:
        if base is None:
            raise _lost_manifest(root)
        begun = None  # published already: the writer crashed before it removed its records
    contents = base.contents.copy() if base else _begun(begun) or Contents(task, settings, has_text)
    check_task(root, (contents.task, contents.settings, contents.has_text), (task, settings, has_text))
    if alone:
        remove_temporaries(root)
    if begun is None:
        journal.clear()
        for counts in journal.directory.glob("*.counts"):  # of runs that an earlier version of kdcache published
            remove_file(counts)
        journal.begin({"identity": identity, **contents.settings_record()})
    else:
        journal.apply(contents)
    if repair:
        drop_damaged(root, contents, journal)
    return base, contents, journal


def _begun(record: dict[str, Any] | None) -> Contents | None:
    if record is None:
        return None
    return Contents(
        TaskSpec(tuple(record["text_columns"]), tuple(record["label_names"])),
        Settings(record["seed"], record["part_size"]),
        record["text"] == "stored",
    )


def existing_settings(root: Path) -> Settings | None:
    """Seed and part size of a published cache, or of a dump that was begun in ``root``; None if there is neither."""
    if (root / layout.MANIFEST).is_file():
        return read_manifest(root).contents.settings
    begun = _begun(Journal(root).base())
    return None if begun is None else begun.settings


def drop_damaged(root: Path, contents: Contents, journal: Journal) -> None:
    """Read every file and remove the damaged ones from ``contents``, durably."""
    local = read_local(root)
    files = CheckedFiles(root, contents.files, trust_earlier=False, local=local)
    damaged = {path for path in list(contents.files) if not _is_whole(files, path)}
    for path, file in contents.expected_files().items():
        if path in damaged and file.data is not None:
            write_file(root / path, file.data)
            damaged.discard(path)
    layers = {component(path) for path in damaged if "/basis/" in path}  # their hidden states depend on the basis
    damaged |= {path for path in contents.files if component(path) in layers}
    lost = {path: contents.files.pop(path) for path in sorted(damaged)}
    contents.lost.update(lost)
    journal.add_damaged(lost)


def _is_whole(files: CheckedFiles, path: str) -> bool:
    with contextlib.suppress(MismatchError):  # not pulled, so not checked
        try:
            files.check(path)
        except DamageError:
            return False
    return True
