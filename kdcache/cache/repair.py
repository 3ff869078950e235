"""Repair: files that are damaged count as missing, so that the dump lists them again and nothing else.

The metadata of zarr arrays follows from shapes and is written again at once. A layer whose basis is lost is listed in every
part: a basis that came back with one other bit would silently belong to other hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.hidden import known_files
from kdcache.cache.selection import read_local
from kdcache.errors import DamageError, MismatchError
from kdcache.files import write_file

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.journal import Journal


def drop_damaged(root: Path, contents: Contents, journal: Journal) -> None:
    """Take damaged files out of ``contents``, durably. Every file is read."""
    local = read_local(root)
    files = CheckedFiles(root, contents.files, trust_earlier=False, local=local)
    damaged = {path for path in list(contents.files) if not _is_whole(files, path)}
    full = [part for part in contents.parts if part.scope == "full"]
    for teacher in contents.teachers.values():
        for part in full:
            for path, data in known_files(contents, teacher, part).items():
                if path in damaged:
                    write_file(root / path, data)
                    damaged.discard(path)
        for layer, spec in teacher.layers.items():
            if layout.basis_file(teacher.name, layer) in damaged:
                for part in full:
                    rows = contents.rows(teacher.name, part, spec)
                    paths = () if rows is None else layout.layer_files(teacher.name, part.name, layer, spec, rows)
                    damaged |= contents.files.keys() & set(paths)
    lost = {path: contents.files.pop(path) for path in sorted(damaged)}
    contents.lost.update(lost)
    journal.add_damaged(lost)


def _is_whole(files: CheckedFiles, path: str) -> bool:
    try:
        files.check(path)
    except DamageError:
        return False
    except MismatchError:  # not pulled: nothing can be said of it
        return True
    return True
