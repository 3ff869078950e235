"""Verify: read every byte of a cache as a reader would, and say everything that is wrong with it.

Beyond digests it looks at meaning: texts must hash to their ids, examples must point at texts that are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """A file, by its path inside the cache, and what is wrong with it."""

    file: str
    reason: str


def verify(path: str | Path, *, on_bytes: Callable[[int], None] | None = None) -> list[Damage]:
    """Everything that is wrong with a cache; empty where it is whole. ``on_bytes`` hears of bytes as they are read.

    Of a part of a cache that was pulled, what is selected is verified; what is still to be fetched is no damage: see
    ``to_come``. Raises MismatchError for a newer format. Files that belong to nothing are no damage: see
    ``unreferenced``.
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
    found = {}
    for name in sorted(manifest.contents.files.keys() - absent):
        try:
            files.check(name, on_bytes)
        except DamageError as error:
            found[name] = Damage(name, error.message)
    cache = Cache(root, manifest, local=local)  # trusts what was digested a moment ago
    for name, check in _meanings(cache):
        if name not in found and name not in absent:
            try:
                check()
            except MismatchError:  # needs a file that is not here: nothing can be said of this one yet
                if local is None:
                    raise
            except DamageError as error:
                file = next((known for known in manifest.contents.files if f"'{root / known}'" in error.message), name)
                found.setdefault(file, Damage(file, error.message))
    return [found[name] for name in sorted(found)]


def to_come(path: str | Path) -> list[str]:
    """Files of an unfinished pull or reading through that are selected and not there yet. Raises as ``open_cache``."""
    root = Path(path)
    manifest = read_manifest(root)
    local = local_selection(root, manifest.contents)
    if local is None or local.complete:
        return []
    return [name for name in _absent(root, manifest, local) if local.selection.takes(name)]


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
    """Files in the directory that the manifest does not list.

    Superseded examples, leftovers, things of other programs.
    """
    root = Path(path)
    listed = read_manifest(root).contents.files
    found = []
    for directory, directories, names in os.walk(root):
        place = Path(directory)
        if place == root and layout.STATE in directories:
            directories.remove(layout.STATE)
        found += [(place / name).relative_to(root).as_posix() for name in names]
    return sorted(
        name for name in found if name not in listed and name not in (layout.MANIFEST, layout.CARD, SELECTION)
    )


def _meanings(cache: Cache) -> Iterator[tuple[str, Callable[[], object]]]:
    """Per file, a check of what it means; each raises DamageError."""
    for part in cache.parts:
        yield layout.ids_file(part.name), lambda part=part: cache.text_ids(part.name)  # type: ignore[misc]
        if cache.has_text:
            yield layout.text_file(part.name), lambda part=part: _check_texts(cache, part.name)  # type: ignore[misc]
    for split, info in cache.manifest.contents.splits.items():
        yield info.file, lambda split=split, info=info: _check_examples(cache, split, info.file)  # type: ignore[misc]
    for name, spec in cache.teachers.items():
        yield layout.tokenizer_file(name), lambda name=name: cache.tokenizer_json(name)  # type: ignore[misc]
        for layer in spec.layers:
            yield layout.basis_file(name, layer), lambda name=name, layer=layer: cache.basis(name, layer)  # type: ignore[misc]
        for part in cache.parts:
            yield from _part_meanings(cache, name, part.name)


def _part_meanings(cache: Cache, teacher: str, part: str) -> Iterator[tuple[str, Callable[[], object]]]:
    yield layout.outputs_file(teacher, part), lambda: cache.outputs(teacher, part)
    if part in cache.manifest.contents.tokens.get(teacher, {}):
        yield layout.tokens_file(teacher, part), lambda: cache.tokens(teacher, part)
    if next(one for one in cache.parts if one.name == part).scope != "full":
        return
    for layer, spec in cache.teachers[teacher].layers.items():
        paths = layout.layer_files(teacher, part, layer, spec, cache.row_count(teacher, part, layer))
        yield paths[-1], lambda layer=layer: cache.hidden(teacher, part, layer)  # type: ignore[misc]


def _check_texts(cache: Cache, part: str) -> None:
    for row, (one, text) in enumerate(zip(id_list(cache.text_ids(part)), cache.texts(part), strict=True)):
        if text_id(text) != one:
            raise DamageError(
                f"'{cache.path / layout.text_file(part)}' has a text in row {row} that is not the one of its id"
            )


def _check_examples(cache: Cache, split: str, file: str) -> None:
    parts, _ = cache.locate(cache.examples(split).text_ids)
    if (parts < 0).any():
        raise DamageError(f"'{cache.path / file}' has {int((parts < 0).sum())} examples whose text is not in the cache")
