"""Verifies a cache: reads every byte as a reader does, and reports every fault.

Besides digests it checks the meaning: texts must hash to their ids, and examples must refer to texts of the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.ids import id_list, text_id
from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import Cache
from kdcache.cache.selection import SELECTION, local_selection
from kdcache.errors import DamageError, MismatchError

if TYPE_CHECKING:
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.selection import LocalSelection


@dataclass(frozen=True)
class Damage:
    """A damaged file, by its path inside the cache, and the fault."""

    file: str
    reason: str


def verify(path: str | Path, *, on_bytes: Callable[[int], None] | None = None) -> list[Damage]:
    """The damaged files of a cache; empty if there are none.

    Args:
        path: The directory. If a part of a cache was pulled, the selected files are verified. Files that are still to
            be fetched are no damage (``to_come``), and neither are other files (``unreferenced``).
        on_bytes: Called with the number of bytes of every block that was read.

    Returns:
        File and fault, sorted by path.

    Raises:
        MismatchError: The cache has a newer format.
    """
    root = Path(path)
    try:
        manifest = read_manifest(root)
    except DamageError as error:
        return [Damage(layout.MANIFEST, error.message)]
    try:
        local = local_selection(root, manifest.contents)
    except DamageError as error:
        return [Damage(SELECTION, error.message)]
    files = CheckedFiles(root, manifest.contents.files, trust_earlier=False)
    absent = set(_absent(root, manifest, local))
    damaged = {}
    for name in sorted(manifest.contents.files.keys() - absent):
        try:
            files.check(name, on_bytes)
        except DamageError as error:
            damaged[name] = Damage(name, error.message)
    cache = Cache(root, manifest, local=local)  # does not hash again the files that were hashed above
    for name, check in _checks(cache):
        if name not in damaged and name not in absent:
            try:
                check()
            except MismatchError:  # the check needs a file that is not here yet
                if local is None:
                    raise
            except DamageError as error:
                file = next((known for known in manifest.contents.files if f"'{root / known}'" in error.message), name)
                damaged.setdefault(file, Damage(file, error.message))
    return [damaged[name] for name in sorted(damaged)]


def to_come(path: str | Path) -> list[str]:
    """Selected files that an unfinished pull or read-through has not fetched yet. Raises as ``open_cache``."""
    root = Path(path)
    manifest = read_manifest(root)
    local = local_selection(root, manifest.contents)
    return [name for name in _absent(root, manifest, local) if local is not None and local.selection.takes(name)]


def _absent(root: Path, manifest: Manifest, local: LocalSelection | None) -> list[str]:
    """Files that need not be there and are not: outside the selection, or still to be fetched."""
    if local is None:
        return []
    names = sorted(manifest.contents.files)
    return [
        name
        for name in names
        if not (local.complete and local.selection.takes(name)) and not os.path.lexists(root / name)
    ]


def unreferenced(path: str | Path) -> list[str]:
    """Files in the directory that the manifest does not list: old examples, leftovers, files of other programs."""
    root = Path(path)
    listed = {*read_manifest(root).contents.files, layout.MANIFEST, layout.CARD, SELECTION}
    there = (file.relative_to(root) for file in root.rglob("*") if not file.is_dir())
    return sorted(file.as_posix() for file in there if file.parts[0] != layout.STATE and file.as_posix() not in listed)


def _checks(cache: Cache) -> Iterator[tuple[str, Callable[[], object]]]:
    """For every file a check of its content, which raises DamageError."""
    for part in cache.parts:
        yield layout.ids_file(part.name), partial(cache.text_ids, part.name)
        if cache.has_text:
            yield layout.text_file(part.name), partial(_check_texts, cache, part.name)
    for split, info in cache.manifest.contents.splits.items():
        yield info.file, partial(_check_examples, cache, split, info.file)
    for name, spec in cache.teachers.items():
        yield layout.tokenizer_file(name), partial(cache.tokenizer_json, name)
        for layer in spec.layers:
            yield layout.basis_file(name, layer), partial(cache.basis, name, layer)
        for part in cache.parts:
            yield layout.outputs_file(name, part.name), partial(cache.outputs, name, part.name)
            if part.name in cache.manifest.contents.tokens.get(name, {}):
                yield layout.tokens_file(name, part.name), partial(cache.tokens, name, part.name)
            for layer, layer_spec in spec.layers.items() if part.scope == "full" else ():
                rows = cache.row_count(name, part.name, layer)
                paths = layout.layer_files(name, part.name, layer, layer_spec, rows)
                yield paths[-1], partial(cache.hidden, name, part.name, layer)


def _check_texts(cache: Cache, part: str) -> None:
    for row, (identity, text) in enumerate(zip(id_list(cache.text_ids(part)), cache.texts(part), strict=True)):
        if text_id(text) != identity:
            raise DamageError(
                f"'{cache.path / layout.text_file(part)}' has a text in row {row} that is not the one of its id"
            )


def _check_examples(cache: Cache, split: str, file: str) -> None:
    parts, _ = cache.locate(cache.examples(split).text_ids)
    if (parts < 0).any():
        raise DamageError(f"'{cache.path / file}' has {int((parts < 0).sum())} examples whose text is not in the cache")
