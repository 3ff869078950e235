"""Growing a cache: teachers, layers and rows are added, and nothing that is there is run or written again.

    kdcache cache extend REF --teacher deberta=DIR

A newcomer is run as the teachers of the cache were, unless a recipe says otherwise. What a teacher lacks is found by
the cache's own rules: layers by number, rows by text id. The old manifest stays valid until the new one is published,
and all that did not change is the same file in both.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.card import cache_card
from kdcache.cache.ids import ids_digest
from kdcache.cache.manifest import read_manifest
from kdcache.cache.merge import contents_so_far, take
from kdcache.cache.writer import open_writer
from kdcache.data.labels import mismatch_cure
from kdcache.dump.additions import open_additions, validation_scores
from kdcache.dump.layers import check_layer, spec_like
from kdcache.dump.provenance import extended_provenance, forget_runs, inherit_run
from kdcache.dump.specs import PreparedTeacher, layer_specs, prepare, scopes, student_depth
from kdcache.dump.stage import refuse_stale, run_missing, write_examples
from kdcache.errors import DamageError, MismatchError, RecipeError
from kdcache.methods.parts.layer_map import even_layers
from kdcache.progress import listed, listed_apart
from kdcache.recipe.sections import DumpSection, TeacherSection

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.digests import Arrivals
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.spec import TaskSpec, TeacherSpec
    from kdcache.cache.writer import CacheWriter
    from kdcache.codecs.base import LayerSpec
    from kdcache.data.task import TaskData
    from kdcache.dump.additions import Addition
    from kdcache.dump.run import TeacherRun
    from kdcache.dump.specs import Texts
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.teachers.bundle import TeacherRecord
    from kdcache.teachers.teacher import Teacher


@dataclass(frozen=True)
class Wanted:
    """What is to be added: teachers by name and directory, ``layers`` of them, and the rows of ``recipe``'s data."""

    teachers: Mapping[str, Path]
    layers: tuple[int, ...] | None = None
    recipe: Recipe | None = None


@dataclass(frozen=True)
class ExtendReport:
    """What was added.

    ``runs`` has an entry for each teacher that ran; ``bytes_new`` are of files that the old version lacks.
    """

    cache: Path
    before: str
    identity: str
    new_texts: int
    runs: tuple[TeacherRun, ...]
    bytes_new: int
    bytes_shared: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; what ``--json`` prints."""
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
    """Add what is wanted to the cache in ``cache_dir`` and publish it there; interrupted, the same call continues.

    ``earlier``: directories in which another version of the cache was extended; what they have of the same teachers,
    run alike on the same texts, is taken over. ``like``: contents after whose teachers newcomers are run, where not
    after the cache's. Raises MismatchError (exit 4) where the cache was made otherwise, where new rows would be lacking
    of a teacher that is not given, where something has to be read that was not pulled, or a cache without texts is
    given no data; what ``dump_teachers`` raises.
    """
    started = time.perf_counter()
    old = read_manifest(cache_dir)
    contents = old.contents
    task = _data(wanted.recipe, contents, progress)
    full, logits_only = ({}, {}) if task is None else scopes(task)
    if not wanted.teachers and task is None:
        raise RecipeError(
            "nothing to add was named", "Name a teacher with --teacher NAME=DIR, or new rows with --recipe RECIPE."
        )
    max_length = _max_length(wanted, like or contents)
    with (
        open_additions(
            wanted.teachers, contents.task, max_length, progress, wanted.recipe.trusted() if wanted.recipe else ()
        ) as additions,
        open_writer(
            cache_dir, contents.task, contents.settings, store_text=contents.has_text, arrivals=arrivals
        ) as writer,
    ):
        new_texts = _new_texts(writer, full, logits_only)
        _refuse_lacking_teachers(writer, additions, new_texts)
        _refuse_without_text(writer, task)
        teachers = [_prepare(one, wanted, contents, like or contents, new_texts > 0) for one in additions.values()]
        refuse_stale(writer, teachers)
        writer.add_texts(full, logits_only)
        _take_over(writer, earlier, teachers)
        runs = _run(writer, teachers, additions, wanted, progress)
        if task is not None:
            write_examples(writer, task)
        records = {name: _scored(writer, name, one.record, contents) for name, one in additions.items()}
        record = extended_provenance(old.provenance, records, cache_dir, provenance or {})
        record["text_ids"] = ids_digest(part.text_ids for part in writer.parts)
        new = writer.publish(record, card=cache_card)
        forget_runs(cache_dir)
    shared, added = shared_bytes(old, new)
    return ExtendReport(
        cache_dir, old.identity, new.identity, new_texts, runs, added, shared, time.perf_counter() - started
    )


def _scored(writer: CacheWriter, name: str, record: TeacherRecord, old: Contents) -> TeacherRecord:
    """A classifier of one's own brings no scores: what is stored of the newcomer says how well it does."""
    if record.scores or name in old.teachers:
        return record
    return replace(record, scores=validation_scores(writer, name))


def shared_bytes(old: Manifest, new: Manifest) -> tuple[int, int]:
    """Bytes of the files of ``new`` that ``old`` has as well, and of those that it has not; each content once."""
    known = {digest.sha256 for digest in old.contents.files.values()}
    sizes = {digest.sha256: digest.size for digest in new.contents.files.values()}
    shared = sum(size for sha, size in sizes.items() if sha in known)
    return shared, sum(sizes.values()) - shared


def _data(recipe: Recipe | None, contents: Contents, progress: Progress) -> TaskData | None:
    if recipe is None:
        return None
    from kdcache.data.task import load_task

    task = load_task(recipe.data)
    of_cache: TaskSpec = contents.task
    if task.label_names != of_cache.label_names or task.text_columns != of_cache.text_columns:
        ours, theirs = listed_apart(task.label_names, of_cache.label_names)
        cure = "Set data.text and data.labels to those of the cache, or dump into a new directory."
        raise MismatchError(
            f"the data have the columns {listed(task.text_columns)} and the labels {ours}; the cache has "
            f"{listed(of_cache.text_columns)} and {theirs}",
            mismatch_cure(task.label_names, of_cache.label_names, cure),
        )
    for line in task.counts.notes():
        progress.note(line)
    return task


def _max_length(wanted: Wanted, contents: Contents) -> int:
    """What a newcomer reads at most, in tokens: what the recipe says, else what the others read."""
    if wanted.recipe is not None:
        return wanted.recipe.data.max_length
    return max((spec.max_length for spec in contents.teachers.values()), default=128)


def _take_over(writer: CacheWriter, earlier: Sequence[Path], teachers: Sequence[PreparedTeacher]) -> None:
    """What earlier work has of teachers; a directory that is not readable is as good as none."""
    for place in earlier:
        with contextlib.suppress(DamageError):
            there = contents_so_far(place)
            for teacher in teachers:
                if take(writer, place, there, teacher.spec):
                    inherit_run(place, writer.root, teacher.spec.name)


def _prepare(
    addition: Addition, wanted: Wanted, contents: Contents, others: Contents, with_rows: bool
) -> PreparedTeacher:
    """A teacher of the cache as it was run, with layers added.

    A newcomer as the recipe says, or as ``others`` were run.
    """
    name, recipe = addition.name, wanted.recipe
    known = contents.teachers.get(name)
    section = _section(name, recipe)
    like = known or _example(others)
    dump = recipe.dump if recipe is not None and known is None else _as_it_was(like, contents)
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
    """The layers to add.

    Those of ``--layers`` in the form of the recipe or of the others, else all that the recipe or they have.
    """
    recipe, there = wanted.recipe, known.layers if known is not None else {}
    if recipe is not None and (section is not None or known is None):
        section = section or TeacherSection(name=teacher.name, model=teacher.name)
        if wanted.layers is not None:
            section = section.model_copy(update={"layers": list(wanted.layers)})
        found = layer_specs(recipe, section, teacher, student_depth(recipe, {teacher.name: teacher.depth}))
        return {layer: spec for layer, spec in found.items() if layer not in there}
    forms = [spec for _, spec in sorted(like.layers.items())] if like is not None else []
    numbers = (
        sorted(wanted.layers or ())
        if wanted.layers is not None
        else _even(forms, teacher.depth)
        if known is None
        else []
    )
    new = [check_layer(layer, teacher.depth, teacher.name) for layer in numbers if layer not in there]
    if new and not forms:
        raise RecipeError(
            "no teacher of the cache has hidden states that say how to store a layer", "Say it with --recipe RECIPE."
        )
    matching = len(forms) == len(new)
    return {
        layer: spec_like(forms[place if matching else 0], teacher.name, layer, teacher.width)
        for place, layer in enumerate(new)
    }


def _example(contents: Contents) -> TeacherSpec | None:
    """The teacher whose settings a newcomer takes over: the first with hidden states, else the first."""
    specs = list(contents.teachers.values())
    return next((spec for spec in specs if spec.layers), specs[0] if specs else None)


def _as_it_was(like: TeacherSpec | None, contents: Contents) -> DumpSection:
    """The settings that a teacher of the cache was run with, its layers apart."""
    if like is None:
        return DumpSection(seed=contents.settings.seed)
    return DumpSection.model_validate(
        {
            "backend": like.backend, "precision": like.precision, "pooled": like.pooled is not None, "seed": contents.settings.seed,
            "sample_texts": max(1, like.sample_texts),
        }
    )  # fmt: skip


def _even(forms: Sequence[LayerSpec], depth: int) -> list[int]:
    """As many layers as the other teacher has, at the same relative depths."""
    return sorted(set(even_layers(depth, len(forms)))) if forms else []


def _new_texts(writer: CacheWriter, full: Texts, logits_only: Texts) -> int:
    in_full = {bytes(row) for part in writer.parts if part.scope == "full" for row in part.text_ids}
    anywhere = in_full | {bytes(row) for part in writer.parts for row in part.text_ids}
    return len(full.keys() - in_full) + len(logits_only.keys() - anywhere)


def _refuse_lacking_teachers(writer: CacheWriter, additions: Mapping[str, Addition], new_texts: int) -> None:
    known = writer.base.contents.teachers if writer.base is not None else {}
    lacking = [name for name in known if name not in additions]
    if new_texts and lacking:
        flags = " ".join(f"--teacher {name}=DIR" for name in lacking)
        raise MismatchError(
            f"the data have {new_texts:,} texts that the cache lacks, and they would be missing of teacher "
            f"'{lacking[0]}'",
            f"Give every teacher of the cache, so that each is run on them: {flags}",
        )


def _refuse_without_text(writer: CacheWriter, task: TaskData | None) -> None:
    if task is None and writer.base is not None and not writer.base.contents.has_text:
        raise MismatchError(
            f"cache '{writer.root}' does not store its texts, and a teacher has to read them",
            "Give the data that it was made from: --recipe RECIPE",
        )


def _run(
    writer: CacheWriter,
    teachers: Sequence[PreparedTeacher],
    additions: Mapping[str, Addition],
    wanted: Wanted,
    progress: Progress,
) -> tuple[TeacherRun, ...]:
    tokens = (wanted.recipe.dump if wanted.recipe is not None else DumpSection()).tokens_per_batch
    runs: list[TeacherRun] = []
    for teacher in teachers:
        runs += run_missing(writer, [teacher], additions[teacher.name].directory, tokens, progress)
    return tuple(runs)
