"""Merges the additions of two writers to the same cache, each in its own directory, without running a teacher.

Two colleagues extend the same version, and one publishes first. The files of the other stay valid, because a component
depends only on the texts and on its teacher. ``merge`` hard-links these files into a copy of the newer version. The
result equals one dump with the additions of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache import layout
from kdcache.cache.card import cache_card, subtable
from kdcache.cache.contents import PartInfo
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.journal import Journal
from kdcache.cache.manifest import read_manifest
from kdcache.cache.spec import needs_tokens
from kdcache.cache.writer import open_writer
from kdcache.errors import MismatchError
from kdcache.files import share_file
from kdcache.progress import counted

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.writer import CacheWriter, PartTask
    from kdcache.files import FileDigest


def merge(target: Path, source: Path, base: Contents) -> Manifest:
    """Add the additions of the cache in ``source`` to the cache in ``target``, and publish the result there.

    Args:
        target: A copy of the newest version. Its components stay as they are.
        source: A directory in which teachers, layers or other examples were added to ``base``.
        base: The contents that both versions started from.

    Returns:
        The new manifest of ``target``.

    Raises:
        MismatchError: Texts, settings, a teacher, a layer or a split of the two differ. Then nothing changes.
        DamageError: A file of ``source`` is missing or damaged.
        StorageError: The disk is full or not writable.
    """
    made, newest = read_manifest(source), read_manifest(target)
    for now, here in differences(newest.contents, made.contents):
        raise MismatchError(
            f"the additions belong to a cache with {here}; the newest version has {now}",
            "Run the same command again: teachers do not run again over texts that they have run over.",
        )
    files, contents = CheckedFiles(source, made.contents.files), newest.contents
    _refuse_other_examples(contents, made.contents, base)
    with open_writer(target, contents.task, contents.settings, store_text=contents.has_text) as writer:
        for spec in _added(made.contents, base):
            tokenizer = files.read(layout.tokenizer_file(spec.name)).decode("utf-8")
            writer.declare_teacher(spec, tokenizer)
            take(writer, source, made.contents, spec)
        for name, split in made.contents.splits.items():
            if split not in (base.splits.get(name), contents.splits.get(name)):
                writer.journal.add_split(
                    name, split, _share(writer, files, {split.file: made.contents.files[split.file]})
                )
                writer.contents.splits[name] = split
        return writer.publish(_provenance(newest.provenance, made, base), card=cache_card)


def differences(first: Contents, second: Contents) -> Iterator[tuple[str, str]]:
    """The reasons why two caches cannot be merged, as a pair of phrases each: what either cache has. Texts are last."""
    old, new = first.settings_record(), second.settings_record()
    for key in old:
        if old[key] != new[key]:
            yield f"{_PHRASES[key]} {old[key]}", f"{_PHRASES[key]} {new[key]}"
    if not same_texts(first, second):
        here, there = (
            f"{counted(sum(part.texts for part in contents.parts), 'text')} in {counted(len(contents.parts), 'part')}"
            for contents in (first, second)
        )
        yield here, there if here != there else "as many other texts"


_PHRASES = {  # of the keys of a settings record
    "text_columns": "the text columns",
    "label_names": "the labels",
    "seed": "the seed",
    "part_size": "the part size",
    "text": "texts that are",
}


def same_texts(first: Contents, second: Contents) -> bool:
    """Whether both have the same texts in the same parts."""
    return first.parts == second.parts and all(_same_part(part, first, second) for part in first.parts)


def contents_so_far(root: Path) -> Contents:
    """The contents of a directory, including the commit records of an interrupted writer.

    Raises DamageError, MismatchError.
    """
    manifest = read_manifest(root)
    contents, journal = manifest.contents.copy(), Journal(root)
    begun = journal.base()
    if begun is not None and begun["identity"] == manifest.identity:
        journal.apply(contents)
    return contents


def take(writer: CacheWriter, source: Path, contents: Contents, spec: TeacherSpec) -> int:
    """Hard-link the components that ``writer`` still misses of a declared teacher, as far as ``source`` has them.

    A component is taken only if the teacher was run with the same settings on the same texts. ``contents`` are those of
    ``source``. Returns the number of parts that got a component. Raises DamageError, StorageError.
    """
    theirs = contents.teachers.get(spec.name)
    tokenizer = layout.tokenizer_file(spec.name)
    if theirs is None or _apart_from_layers(theirs) != _apart_from_layers(spec):
        return 0
    if contents.files.get(tokenizer) != writer.contents.files.get(tokenizer):
        return 0
    files = CheckedFiles(source, contents.files)
    same = {layer for layer, layer_spec in spec.layers.items() if theirs.layers.get(layer) == layer_spec}
    layers = {
        layer
        for layer in sorted(same)
        if theirs.sample_texts == spec.sample_texts and _take_basis(writer, files, contents, spec.name, layer)
    }
    return sum(_take_part(writer, files, contents, spec, task, layers) for task in writer.missing(spec.name))


def _take_basis(writer: CacheWriter, files: CheckedFiles, contents: Contents, name: str, layer: int) -> bool:
    """Take the basis if it is missing; returns whether both then have the same one, on which hidden states depend."""
    path = layout.basis_file(name, layer)
    theirs, known = contents.files.get(path), writer.contents.files.get(path)
    if theirs is not None and known is None:
        writer.journal.add_basis(name, layer, _share(writer, files, {path: theirs}))
    return theirs is not None and known in (None, theirs)


def _take_part(
    writer: CacheWriter, files: CheckedFiles, contents: Contents, spec: TeacherSpec, task: PartTask, layers: set[int]
) -> bool:
    part = PartInfo(task.part.name, task.part.scope, len(task.part.text_ids))
    if part not in contents.parts or not _same_part(part, writer.contents, contents):
        return False
    paths: list[str] = []
    if task.outputs and contents.has_outputs(spec.name, part):
        paths.append(layout.outputs_file(spec.name, part.name))
    known = writer.contents.files.get(layout.tokens_file(spec.name, part.name))
    tokens = contents.files.get(layout.tokens_file(spec.name, part.name))
    stored = {
        layer: spec.layers[layer]
        for layer in task.layers
        if layer in layers and contents.has_layer(spec.name, part, layer)
    }
    if needs_tokens(stored) and known not in (None, tokens):
        stored = {layer: layer_spec for layer, layer_spec in stored.items() if layer_spec.per_text}
    for layer, layer_spec in stored.items():
        rows = contents.rows(spec.name, part, layer_spec) or 0
        paths += layout.layer_files(spec.name, part.name, layer, layer_spec, rows)
    if stored:
        paths.append(layout.group_file(spec.name, part.name))
    count = None
    if known is None and tokens is not None and task.part.scope == "full" and needs_tokens(spec.layers):
        paths.append(layout.tokens_file(spec.name, part.name))
        count = contents.tokens[spec.name][part.name]
    if paths:
        shared = _share(writer, files, {path: contents.files[path] for path in paths})
        writer.journal.add_teacher_part(spec.name, part.name, count, shared)
    if count is not None:
        writer.contents.tokens.setdefault(spec.name, {})[part.name] = count
    return bool(paths)


def _share(writer: CacheWriter, files: CheckedFiles, digests: Mapping[str, FileDigest]) -> Mapping[str, FileDigest]:
    """Hard-link files into the writer's directory. The caller writes the commit record."""
    for path in digests:
        files.check_present(path)
        share_file(files.root / path, writer.root / path)
    writer.contents.files.update(digests)
    return digests


def _same_part(part: PartInfo, first: Contents, second: Contents) -> bool:
    return first.files.get(layout.ids_file(part.name)) == second.files[layout.ids_file(part.name)]


def _added(contents: Contents, base: Contents) -> Iterator[TeacherSpec]:
    """The teachers that ``base`` lacks, and the other teachers with the layers that ``base`` lacks."""
    for name, spec in contents.teachers.items():
        known = base.teachers.get(name)
        added = spec.layers.keys() - (known.layers if known else ())
        if known is None or added:
            yield replace(spec, layers={layer: spec.layers[layer] for layer in sorted(added)})


def _apart_from_layers(spec: TeacherSpec) -> TeacherSpec:
    return replace(spec, layers={}, sample_texts=0)


def _refuse_other_examples(newest: Contents, made: Contents, base: Contents) -> None:
    for name in made.splits:
        before, now, here = (contents.splits.get(name) for contents in (base, newest, made))
        if before not in (now, here) and now != here:
            raise MismatchError(
                f"the examples of '{name}' were changed here and by somebody else, in different ways",
                "Run the same command again: the examples of the recipe replace those of the cache.",
            )


def _provenance(newest: Mapping[str, Any], made: Manifest, base: Contents) -> dict[str, Any]:
    """The provenance of the newest version, updated by that of the extension; records of other teachers stay."""
    added = {spec.name for spec in _added(made.contents, base)}
    of_newest, of_made = (subtable(provenance, "teachers") for provenance in (newest, made.provenance))
    new = {name: record for name, record in of_made.items() if name in added or name not in of_newest}
    return {**newest, **made.provenance, "teachers": {**of_newest, **new}}
