"""Adds teachers, layers and rows to a cache; nothing that it has is run or written again.

    kdcache cache extend REF --teacher deberta=DIR

A new teacher gets the settings of the cache's teachers, unless a recipe says otherwise. Missing parts are found by
layer number and text id. The old manifest stays valid until the new one is published; both share unchanged files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.card import cache_card
from kdcache.cache.ids import ids_digest
from kdcache.cache.manifest import read_manifest
from kdcache.cache.merge import contents_so_far, take
from kdcache.cache.spec import check_same_task
from kdcache.cache.writer import open_writer
from kdcache.dump.additions import open_additions, validation_scores
from kdcache.dump.imported import imported_record, refuse_missing, write_answers
from kdcache.dump.layers import check_layer, spec_like
from kdcache.dump.provenance import extended_provenance, forget_runs, inherit_run, with_folds
from kdcache.dump.specs import PreparedTeacher, TextScopes, layer_specs, prepare, scopes, student_depth
from kdcache.dump.stage import as_declared, count_new_texts, refuse_stale, run_missing, texts_in_full, write_examples
from kdcache.errors import DamageError, MismatchError, RecipeError
from kdcache.methods.parts.layer_map import even_layers
from kdcache.recipe import DumpSection, TeacherSection

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.digests import Arrivals
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.writer import CacheWriter
    from kdcache.codecs.base import LayerSpec
    from kdcache.data.task import TaskData
    from kdcache.dump.additions import Addition
    from kdcache.dump.imported import ImportedTeacher
    from kdcache.dump.run import TeacherRun
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.teachers.bundle import TeacherRecord
    from kdcache.teachers.teacher import Teacher


@dataclass(frozen=True)
class Wanted:
    """What to add: teachers by name and directory, ``layers`` of them, and the rows of ``recipe``'s data.

    ``answers``: teachers whose logits come from a file, by name.
    """

    teachers: Mapping[str, Path]
    layers: tuple[int, ...] | None = None
    recipe: Recipe | None = None
    answers: Mapping[str, ImportedTeacher] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 of what is added, in hex: another teacher or file under the same name has another one."""
        asked = {
            "teachers": {name: _stamp(path) for name, path in sorted(self.teachers.items())},
            "layers": self.layers,
            "recipe": None if self.recipe is None else self.recipe.model_dump(mode="json", include=_RECIPE_PARTS),
            "answers": {name: imported.answers.fingerprint for name, imported in sorted(self.answers.items())},
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


_RECIPE_PARTS = {"data", "teachers", "dump", "student"}  # those that decide what is stored


def _stamp(directory: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of each file of a teacher."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


@dataclass(frozen=True)
class ExtendReport:
    """The result: one of ``runs`` per teacher that ran; ``bytes_new`` in files that the old version lacks."""

    cache: Path
    before: str
    identity: str
    new_texts: int
    runs: tuple[TeacherRun, ...]
    bytes_new: int
    bytes_shared: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "cache": str(self.cache),
            "before": self.before,
            "identity": self.identity,
            "new_texts": self.new_texts,
            "teachers": {run.teacher: run.as_dict() for run in self.runs},
            "bytes_new": self.bytes_new,
            "bytes_shared": self.bytes_shared,
            "seconds": round(self.seconds, 1),
        }


def extend_cache(
    cache_dir: Path,
    wanted: Wanted,
    *,
    progress: Progress,
    arrivals: Arrivals | None = None,
    provenance: Mapping[str, Any] | None = None,
    earlier: Sequence[Path] = (),
    like: Contents | None = None,
) -> ExtendReport:
    """Add ``wanted`` to the cache in ``cache_dir`` and publish it; after an interruption, the same call continues.

    Args:
        cache_dir: a published cache; it may be a working copy without all its files.
        wanted: teachers, layers and rows to add.
        progress: shows texts per second and bytes.
        arrivals: fetches files of a working copy.
        provenance: goes into the manifest, outside the identity.
        earlier: directories in which another version of the cache was extended. Outputs of the same teachers, with the
            same settings on the same texts, are taken from there.
        like: contents whose teachers set the settings of new teachers; those of ``cache_dir`` if None.

    Raises:
        MismatchError: (exit 4) if the cache was made with other inputs, if a teacher that is not given would lack the
            new rows, if a needed file was not pulled, or if a cache without texts is given no data.
        KdcacheError: as ``dump_teachers``.
    """
    started = time.perf_counter()
    old = read_manifest(cache_dir)
    contents = old.contents
    task = _data(wanted.recipe, contents, progress)
    if not wanted.teachers and not wanted.answers and task is None:
        raise RecipeError(
            "nothing to add was named", "Name a teacher with --teacher NAME=DIR, or new rows with --recipe RECIPE."
        )
    max_length = _max_length(wanted, like or contents)
    trusted = wanted.recipe.trusted() if wanted.recipe else ()
    with (
        open_additions(wanted.teachers, contents.task, max_length, progress, trusted) as additions,
        open_writer(
            cache_dir, contents.task, contents.settings, store_text=contents.has_text, arrivals=arrivals
        ) as writer,
    ):
        texts = _texts(writer, wanted.recipe, task)
        new_texts = count_new_texts(writer, texts)
        _refuse_lacking_teachers(writer, {*additions, *wanted.answers}, new_texts)
        if additions:
            _refuse_without_text(writer, task)
        teachers = [
            _prepare(addition, wanted, contents, like or contents, new_texts > 0) for addition in additions.values()
        ]
        refuse_stale(writer, teachers)
        teachers = [as_declared(writer, teacher) for teacher in teachers]
        for name, imported in wanted.answers.items():
            refuse_missing(name, imported, cache_dir, writer, task)
        writer.add_texts(texts.full, texts.evaluation, texts.transfer)
        _take_over(writer, earlier, teachers)
        runs = _run(writer, teachers, additions, wanted, progress)
        runs += tuple(write_answers(writer, name, imported) for name, imported in wanted.answers.items())
        if task is not None:
            write_examples(writer, task)
        records = {name: _scored(writer, name, addition.record, contents) for name, addition in additions.items()}
        records |= {name: imported_record(writer, name, imported) for name, imported in wanted.answers.items()}
        record = with_folds(extended_provenance(old.provenance, records, cache_dir, provenance or {}), teachers)
        record["text_ids"] = ids_digest(part.text_ids for part in writer.parts)
        new = writer.publish(record, card=cache_card)
        forget_runs(cache_dir, new.contents.teachers)
    shared, added = shared_bytes(old, new)
    return ExtendReport(
        cache_dir, old.identity, new.identity, new_texts, runs, added, shared, time.perf_counter() - started
    )


def _scored(writer: CacheWriter, name: str, record: TeacherRecord, old: Contents) -> TeacherRecord:
    """The record of a new teacher; a classifier without scores is scored by its stored logits."""
    if record.scores or name in old.teachers:
        return record
    return replace(record, scores=validation_scores(writer, name))


def shared_bytes(old: Manifest, new: Manifest) -> tuple[int, int]:
    """Bytes of the files of ``new`` that ``old`` has, and of those that it lacks; each content once."""
    known = {digest.sha256 for digest in old.contents.files.values()}
    sizes = {digest.sha256: digest.size for digest in new.contents.files.values()}
    shared = sum(size for sha, size in sizes.items() if sha in known)
    return shared, sum(sizes.values()) - shared


def _data(recipe: Recipe | None, contents: Contents, progress: Progress) -> TaskData | None:
    if recipe is None:
        return None
    from kdcache.data.task import load_task

    task = load_task(recipe.data)
    cure = "Set data.text and data.labels to those of the cache, or dump into a new directory."
    check_same_task(task, contents.task, ("the data", "the cache"), cure)
    for line in task.counts.notes():
        progress.note(line)
    return task


def _texts(writer: CacheWriter, recipe: Recipe | None, task: TaskData | None) -> TextScopes:
    """The texts of the recipe's data; none without a recipe."""
    if recipe is None or task is None:
        return TextScopes({}, {}, {})
    return scopes(task, recipe.dump.hidden_transfer, texts_in_full(writer))


def _max_length(wanted: Wanted, contents: Contents) -> int:
    """Tokens per text of a new teacher: the recipe's max_length, else that of the cache's teachers."""
    if wanted.recipe is not None:
        return wanted.recipe.data.max_length
    return max((spec.max_length for spec in contents.teachers.values() if not spec.imported), default=128)


def _take_over(writer: CacheWriter, earlier: Sequence[Path], teachers: Sequence[PreparedTeacher]) -> None:
    """Take over the outputs of ``teachers`` from ``earlier`` directories; unreadable ones are ignored."""
    for place in earlier:
        with contextlib.suppress(DamageError):
            there = contents_so_far(place)
            for teacher in teachers:
                if take(writer, place, there, teacher.spec):
                    inherit_run(place, writer.root, teacher.spec.name)


def _prepare(
    addition: Addition, wanted: Wanted, contents: Contents, others: Contents, with_rows: bool
) -> PreparedTeacher:
    """A known teacher with its settings and new layers, or a new one with the recipe's or others' settings."""
    name, recipe = addition.name, wanted.recipe
    known = contents.teachers.get(name)
    section = _section(name, recipe)
    like = known or _example(others)
    dump = recipe.dump if recipe is not None and known is None else _settings_of(like, contents)
    if known is not None:
        dump = dump.model_copy(update={"out_of_fold": known.folds is not None})
    max_length = known.max_length if known else (section.max_length if section else None) or _max_length(wanted, others)

    def layers(teacher: Teacher) -> dict[int, LayerSpec]:
        new = _new_layers(teacher, wanted, section, known, like)
        kept = dict(known.layers) if known is not None and (with_rows or not new) else {}
        return dict(sorted({**kept, **new}.items()))

    return prepare(
        name,
        addition.directory,
        dump,
        len(contents.task.label_names),
        max_length=max_length,
        layers=layers,
        trust_remote_code=section is not None and section.trust_remote_code,
    )


def _section(name: str, recipe: Recipe | None) -> TeacherSection | None:
    return next((section for section in recipe.teachers if section.name == name), None) if recipe is not None else None


def _new_layers(
    teacher: Teacher,
    wanted: Wanted,
    section: TeacherSection | None,
    known: TeacherSpec | None,
    like: TeacherSpec | None,
) -> dict[int, LayerSpec]:
    """The layers to add: ``--layers`` or all of the recipe's or the other teachers', in their storage formats."""
    recipe, there = wanted.recipe, known.layers if known is not None else {}
    if recipe is not None and (section is not None or known is None):
        section = section or TeacherSection(name=teacher.name, model=teacher.name)
        if wanted.layers is not None:
            section = section.model_copy(update={"layers": list(wanted.layers)})
        specs = layer_specs(recipe, section, teacher, student_depth(recipe, {teacher.name: teacher.depth}))
        return {layer: spec for layer, spec in specs.items() if layer not in there}
    specs_like = [spec for _, spec in sorted(like.layers.items())] if like is not None else []
    if wanted.layers is not None:
        numbers = sorted(wanted.layers)
    else:
        numbers = _same_depths(like, teacher.depth) if known is None and like is not None else []
    new = [check_layer(layer, teacher.depth, teacher.name) for layer in numbers if layer not in there]
    if new and not specs_like:
        raise RecipeError(
            "no teacher of the cache stores hidden states, so the storage format of new layers is not known",
            "Give the format with --recipe RECIPE.",
        )
    matching = len(specs_like) == len(new)
    return {
        layer: spec_like(specs_like[place if matching else 0], teacher.name, layer, teacher.width)
        for place, layer in enumerate(new)
    }


def _same_depths(like: TeacherSpec, depth: int) -> list[int]:
    """The layers of a teacher with ``depth`` blocks at the relative depths of those that ``like`` stores."""
    stored = sorted(like.layers)
    if stored == sorted(set(even_layers(like.depth, len(stored)))):  # as a dump with layers = "even" has them
        return sorted(set(even_layers(depth, len(stored))))
    return sorted({max(min(layer, 1), round(layer * depth / like.depth)) for layer in stored})


def _example(contents: Contents) -> TeacherSpec | None:
    """The teacher whose settings a new teacher gets: the first with hidden states, else the first."""
    specs = [spec for spec in contents.teachers.values() if not spec.imported]
    return next((spec for spec in specs if spec.layers), specs[0] if specs else None)


def _settings_of(like: TeacherSpec | None, contents: Contents) -> DumpSection:
    """The settings of a teacher's dump, without its layers."""
    if like is None:
        return DumpSection(seed=contents.settings.seed)
    return DumpSection.model_validate(
        {
            "backend": like.backend, "precision": like.encoder_precision, "compile": like.compiled,
            "pooled": like.pooled is not None, "seed": contents.settings.seed,
            "sample_texts": max(1, like.sample_texts),
        }
    )  # fmt: skip


def _refuse_lacking_teachers(writer: CacheWriter, additions: Collection[str], new_texts: int) -> None:
    known = writer.base.contents.teachers if writer.base is not None else {}
    lacking = [name for name in known if name not in additions]
    imported = [name for name in lacking if known[name].imported]
    if new_texts and imported:
        raise MismatchError(
            f"the data have {new_texts:,} texts that the cache lacks; teacher '{imported[0]}' was imported from a file "
            "and cannot be run on them",
            "Dump the data into a new directory, and import a file with answers for all texts: kdcache cache import",
        )
    if new_texts and lacking:
        flags = " ".join(f"--teacher {name}=DIR" for name in lacking)
        raise MismatchError(
            f"the data have {new_texts:,} texts that the cache lacks; teacher '{lacking[0]}' would not be run on them",
            f"Give every teacher of the cache: {flags}",
        )


def _refuse_without_text(writer: CacheWriter, task: TaskData | None) -> None:
    if task is None and writer.base is not None and not writer.base.contents.has_text:
        raise MismatchError(
            f"cache '{writer.root}' does not store its texts, which a teacher needs",
            "Give the data that it was made from: --recipe RECIPE",
        )


def _run(
    writer: CacheWriter,
    teachers: Sequence[PreparedTeacher],
    additions: Mapping[str, Addition],
    wanted: Wanted,
    progress: Progress,
) -> tuple[TeacherRun, ...]:
    tokens = (wanted.recipe.dump if wanted.recipe is not None else DumpSection()).batch_tokens
    runs: list[TeacherRun] = []
    for teacher in teachers:
        runs += run_missing(writer, [teacher], additions[teacher.name].directory, tokens, progress)
    return tuple(runs)
