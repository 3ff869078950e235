"""Repair: files that are damaged count as missing, so that the dump lists them again and nothing else.

The metadata of zarr arrays follows from shapes and is written again at once. A layer whose basis is lost is listed in every
part: a basis that came back with one other bit would silently belong to other hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.files import write_file
from kdcache.cache.hidden import known_files
from kdcache.errors import DamageError

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.journal import Journal


def drop_damaged(root: Path, contents: Contents, journal: Journal) -> None:
    """Take damaged files out of ``contents``, durably. Every file is read."""
    files = CheckedFiles(root, contents.files, trust_earlier=False)
    damaged = {path for path in list(contents.files) if not _is_whole(files, path)}
    for teacher in contents.teachers.values():
        for part, tokens in contents.tokens.get(teacher.name, {}).items():
            for path, data in known_files(teacher, part, tokens).items():
                if path in damaged:
                    write_file(root / path, data)
                    damaged.discard(path)
        for layer, spec in teacher.layers.items():
            if layout.basis_file(teacher.name, layer) in damaged:
                for part, tokens in contents.tokens.get(teacher.name, {}).items():
                    damaged |= contents.files.keys() & set(layout.layer_files(teacher.name, part, layer, spec, tokens))
    lost = {path: contents.files.pop(path) for path in sorted(damaged)}
    contents.lost.update(lost)
    journal.add_damaged(lost)


def _is_whole(files: CheckedFiles, path: str) -> bool:
    try:
        files.check(path)
    except DamageError:
        return False
    return True
