"""Putting together what two writers added to the same cache, each in a directory of its own, without running a teacher.

Two colleagues extend the same version; one publishes first. The other's files are as good as they were: components
depend on the texts and on their teacher alone. So they are taken over, by hard link, into a copy of what was published
meanwhile, and the result is what one dump of everything together would have been.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache import layout
from kdcache.cache.card import cache_card
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.journal import Journal
from kdcache.cache.manifest import read_manifest
from kdcache.cache.spec import needs_tokens
from kdcache.cache.writer import open_writer
from kdcache.errors import MismatchError
from kdcache.files import share_file
from kdcache.progress import counted

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents, PartInfo
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.writer import CacheWriter, PartTask
    from kdcache.files import FileDigest


def merge(target: Path, source: Path, base: Contents) -> Manifest:
    """Add to the cache in ``target`` what the one in ``source`` has beyond ``base``, from which both grew; publish it
    there.

    Teachers, layers of teachers and replaced examples are taken over; what ``target`` has already stays as it is.
    Raises MismatchError where the texts or settings of the two differ, or a teacher, a layer or a split does; then
    nothing changes.
    """
    made, newest = read_manifest(source), read_manifest(target)
    for now, here in differences(newest.contents, made.contents):
        raise MismatchError(
            f"what was added belongs to a cache with {here}; the newest version has {now}",
            "Run the same command again: what was run over the same texts is kept, and is not run again.",
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


def differences(one: Contents, other: Contents) -> Iterator[tuple[str, str]]:
    """What keeps two caches from being one, as each has it; texts last."""
    pairs: dict[str, tuple[Any, Any]] = {
        "the text columns": (one.task.text_columns, other.task.text_columns),
        "the labels": (one.task.label_names, other.task.label_names),
        "the seed": (one.settings.seed, other.settings.seed),
        "the part size": (one.settings.part_size, other.settings.part_size),
        "texts that are stored:": ("yes" if one.has_text else "no", "yes" if other.has_text else "no"),
    }
    yield from ((f"{what} {pair[0]}", f"{what} {pair[1]}") for what, pair in pairs.items() if pair[0] != pair[1])
    if not same_texts(one, other):
        told = [
            f"{counted(sum(part.texts for part in contents.parts), 'text')} in {counted(len(contents.parts), 'part')}"
            for contents in (one, other)
        ]
        yield told[0], told[1] if told[0] != told[1] else "as many others"


def same_texts(one: Contents, other: Contents) -> bool:
    """Whether both have the same texts in the same parts."""
    return one.parts == other.parts and all(_same_part(part, one, other) for part in one.parts)


def contents_so_far(root: Path) -> Contents:
    """What a directory holds, the commit records of an interrupted writer included.

    Raises DamageError, MismatchError.
    """
    manifest = read_manifest(root)
    contents, journal = manifest.contents.copy(), Journal(root)
    begun = journal.base()
    if begun is not None and begun["identity"] == manifest.identity:
        journal.apply(contents)
    return contents


def take(writer: CacheWriter, source: Path, contents: Contents, spec: TeacherSpec) -> int:
    """Take over what is still missing of a declared teacher and what the cache in ``source`` has of it, run alike on
    the same texts.

    ``contents``: of ``source``. Gives back the number of parts of which something came. Raises DamageError,
    StorageError.
    """
    theirs = contents.teachers.get(spec.name)
    tokenizer = layout.tokenizer_file(spec.name)
    if theirs is None or _apart_from_layers(theirs) != _apart_from_layers(spec):
        return 0
    if contents.files.get(tokenizer) != writer.contents.files.get(tokenizer):
        return 0
    files = CheckedFiles(source, contents.files)
    layers = {
        layer
        for layer, one in spec.layers.items()
        if theirs.layers.get(layer) == one and theirs.sample_texts == spec.sample_texts
    }
    layers = {layer for layer in layers if _take_basis(writer, files, contents, spec.name, layer)}
    return sum(_take_part(writer, files, contents, spec, task, layers) for task in writer.missing(spec.name))


def _take_basis(writer: CacheWriter, files: CheckedFiles, contents: Contents, name: str, layer: int) -> bool:
    """Whether both have the same basis afterwards: hidden states depend on it."""
    path = layout.basis_file(name, layer)
    theirs, known = contents.files.get(path), writer.contents.files.get(path)
    if theirs is not None and known is None:
        writer.journal.add_basis(name, layer, _share(writer, files, {path: theirs}))
    return theirs is not None and known in (None, theirs)


def _take_part(
    writer: CacheWriter, files: CheckedFiles, contents: Contents, spec: TeacherSpec, task: PartTask, layers: set[int]
) -> bool:
    part = next((one for one in contents.parts if one.name == task.part.name and one.scope == task.part.scope), None)
    if (
        part is None
        or writer.contents.files.get(layout.ids_file(part.name)) != contents.files[layout.ids_file(part.name)]
    ):
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
        stored = {layer: one for layer, one in stored.items() if one.per_text}
    for layer, one in stored.items():
        rows = contents.rows(spec.name, part, one) or 0
        paths += layout.layer_files(spec.name, part.name, layer, one, rows)
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
    """Give files a second name in the writer's directory. The caller commits them with a record."""
    for path in digests:
        files.check_present(path)
        share_file(files.root / path, writer.root / path)
    writer.contents.files.update(digests)
    return digests


def _same_part(part: PartInfo, one: Contents, other: Contents) -> bool:
    return one.files[layout.ids_file(part.name)] == other.files[layout.ids_file(part.name)]


def _added(contents: Contents, base: Contents) -> Iterator[TeacherSpec]:
    """The teachers that ``base`` lacks, and those that it has with the layers that it lacks of them."""
    for name, spec in contents.teachers.items():
        known = base.teachers.get(name)
        layers = {layer: one for layer, one in spec.layers.items() if known is None or layer not in known.layers}
        if known is None or layers:
            yield replace(spec, layers=layers)


def _apart_from_layers(spec: TeacherSpec) -> TeacherSpec:
    return replace(spec, layers={}, sample_texts=0)


def _refuse_other_examples(newest: Contents, made: Contents, base: Contents) -> None:
    for name in made.splits:
        before, now, here = (contents.splits.get(name) for contents in (base, newest, made))
        if before not in (now, here) and now != here:
            raise MismatchError(
                f"the examples of '{name}' were changed here and by somebody else, differently",
                "Run the same command again: the examples of the recipe replace those of the cache.",
            )


def _provenance(newest: Mapping[str, Any], made: Manifest, base: Contents) -> dict[str, Any]:
    """How the newest version came about, and then the extension; of the newest one's teachers its own records."""
    added = {spec.name for spec in _added(made.contents, base)}
    of_newest, of_made = (_teachers(one) for one in (newest, made.provenance))
    teachers = {
        **of_newest,
        **{name: record for name, record in of_made.items() if name in added or name not in of_newest},
    }
    return {**newest, **made.provenance, "teachers": teachers}


def _teachers(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    found = provenance.get("teachers")
    return found if isinstance(found, Mapping) else {}
