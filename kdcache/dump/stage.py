"""The dump, from recipe and teachers to a published cache.

    kdcache dump-teachers RECIPE

First texts are assigned to parts, and every teacher is checked against the cache. Then one teacher after the other runs
over its missing parts; a part is written while the next one runs. The same command continues an interrupted dump and
extends a finished one: what exists is never run again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.card import cache_card
from kdcache.cache.ids import id_list, ids_digest
from kdcache.cache.layout import MANIFEST
from kdcache.cache.manifest import read_manifest
from kdcache.cache.writer import open_writer
from kdcache.data.task import load_task
from kdcache.dump.dry_run import check_free_space
from kdcache.dump.provenance import dump_provenance, forget_runs, remember_run, with_folds
from kdcache.dump.run import OpenTeacher, TeacherRun, lacks_bases, lacks_speed, open_teacher, run_teacher
from kdcache.dump.specs import (
    NO_IDS,
    check_counts,
    check_task,
    folds_notes,
    prepare_teachers,
    scopes,
    settings_of,
    task_spec,
)
from kdcache.errors import DamageError, MismatchError
from kdcache.progress import counted
from kdcache.teachers.bundle import read_bundle

if TYPE_CHECKING:
    from kdcache.cache.spec import Settings, TaskSpec
    from kdcache.cache.writer import CacheWriter, PartTask
    from kdcache.data.counts import DataCounts
    from kdcache.data.task import TaskData
    from kdcache.dump.specs import PreparedTeacher, TextScopes
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.teachers.bundle import Bundle


@dataclass(frozen=True)
class DumpReport:
    """The result of a dump. ``runs`` has one entry per teacher that ran here.

    ``identity`` is empty if parts are still missing, which other processes run: then nothing is published yet.
    """

    cache: Path
    identity: str
    texts: int
    parts: int
    runs: tuple[TeacherRun, ...]
    seconds: float
    counts: DataCounts
    missing: int = 0  # parts of teachers

    @property
    def published(self) -> bool:
        """Whether the cache is complete and published."""
        return bool(self.identity)

    def as_dict(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "cache": str(self.cache),
            "identity": self.identity or None,
            "missing_parts": self.missing,
            "texts": self.texts,
            "parts": self.parts,
            "teachers": {run.teacher: run.as_dict() for run in self.runs},
            "seconds": round(self.seconds, 1),
            "data": self.counts.as_dict(),
        }

    def lines(self) -> list[str]:
        """Text for the terminal."""
        ran = [run.line() for run in self.runs] or ["nothing was missing: no teacher ran"]
        end = (
            f"identity {self.identity}"
            if self.published
            else f"not published yet: {counted(self.missing, 'part')} of teachers are missing"
        )
        return [*ran, f"{counted(self.texts, 'text')} in {counted(self.parts, 'part')}", end]


def dump_teachers(
    recipe: Recipe,
    teachers_dir: Path,
    cache_dir: Path,
    *,
    progress: Progress,
    repair: bool = False,
    no_text: bool = False,
    provenance: Mapping[str, Any] | None = None,
    opener: OpenTeacher = open_teacher,
) -> DumpReport:
    """Write all that the recipe asks for to the cache in ``cache_dir``, and publish it.

    Args:
        recipe: teachers, data and storage formats.
        teachers_dir: the bundle that co-finetuning wrote.
        cache_dir: a new or existing cache; what it has is not run again.
        progress: shows texts per second and bytes.
        repair: verify everything first, and dump damaged files again.
        no_text: do not store the texts; a cache without texts stays without them.
        provenance: goes into the manifest, outside the identity, e.g. the command.
        opener: overrides how a teacher is loaded and run.

    Raises:
        MismatchError: (exit 4) before anything runs, if the existing cache was made from other inputs.
        StorageError, NonFiniteError, LockedError: as they occur; committed parts stay.
    """
    job = prepare_dump(
        recipe, teachers_dir, cache_dir, progress=progress, no_text=no_text, provenance=provenance, opener=opener
    )
    with open_writer(cache_dir, job.task_spec, job.settings, store_text=job.store_text, repair=repair) as writer:
        plan_dump(writer, job)
        runs = run_missing(writer, job.teachers, teachers_dir, recipe.dump.batch_tokens, progress, opener)
        return publish_dump(writer, job, runs)


@dataclass(frozen=True)
class DumpJob:
    """What is to be dumped where, before the cache is opened. ``started``: seconds of ``time.perf_counter``."""

    recipe: Recipe
    task: TaskData
    bundle: Bundle
    teachers: Sequence[PreparedTeacher]
    teachers_dir: Path
    cache_dir: Path
    settings: Settings
    store_text: bool
    provenance: Mapping[str, Any]
    progress: Progress
    opener: OpenTeacher
    started: float

    @property
    def task_spec(self) -> TaskSpec:
        return task_spec(self.task)


def prepare_dump(
    recipe: Recipe,
    teachers_dir: Path,
    cache_dir: Path,
    *,
    progress: Progress,
    no_text: bool = False,
    provenance: Mapping[str, Any] | None = None,
    opener: OpenTeacher = open_teacher,
) -> DumpJob:
    """Read data and teachers, and check that they fit; writes nothing. Arguments as of ``dump_teachers``."""
    started = time.perf_counter()
    task = load_task(recipe.data)
    for line in task.counts.notes():
        progress.note(line)
    bundle = read_bundle(teachers_dir)
    check_task(task, bundle, teachers_dir)
    teachers = prepare_teachers(recipe, bundle, teachers_dir, len(task.label_names))
    for line in folds_notes(teachers):
        progress.note(line)
    settings = settings_of(recipe.dump, len(task.texts), cache_dir)
    store_text = not no_text and _has_text(cache_dir)
    return DumpJob(
        recipe, task, bundle, teachers, teachers_dir, cache_dir, settings, store_text, provenance or {}, progress,
        opener, started,
    )  # fmt: skip


def plan_dump(writer: CacheWriter, job: DumpJob) -> dict[str, tuple[PartTask, ...]]:
    """Assign the texts to parts and declare the teachers; returns what is missing of each. MismatchError if stale."""
    texts = scopes(job.task, job.recipe.dump.hidden_transfer, texts_in_full(writer))
    check_counts(job.settings, job.teachers, texts)
    refuse_stale(writer, job.teachers)
    refuse_forgotten_teachers(writer, job.teachers, texts)
    writer.add_texts(texts.full, texts.evaluation, texts.transfer)
    return declare(writer, job.teachers)


def publish_dump(writer: CacheWriter, job: DumpJob, runs: Sequence[TeacherRun]) -> DumpReport:
    """Write examples, card and manifest. Raises KdcacheError if a part is missing."""
    write_examples(writer, job.task)
    record = with_folds(dump_provenance(job.recipe, job.bundle, job.cache_dir, job.provenance), job.teachers)
    record["text_ids"] = ids_digest(part.text_ids for part in writer.parts)
    manifest = writer.publish(record, card=cache_card)
    forget_runs(job.cache_dir, manifest.contents.teachers)
    return report_dump(writer, job, runs, manifest.identity)


def report_dump(
    writer: CacheWriter, job: DumpJob, runs: Sequence[TeacherRun], identity: str = "", missing: int = 0
) -> DumpReport:
    """The report of a dump; without ``identity`` there are ``missing`` parts of teachers."""
    count = sum(len(part.text_ids) for part in writer.parts)
    seconds = time.perf_counter() - job.started
    return DumpReport(job.cache_dir, identity, count, len(writer.parts), tuple(runs), seconds, job.task.counts, missing)


def declare(writer: CacheWriter, teachers: Sequence[PreparedTeacher]) -> dict[str, tuple[PartTask, ...]]:
    """Declare the teachers; returns what is missing of each."""
    return {teacher.name: writer.declare_teacher(teacher.spec, teacher.tokenizer_json) for teacher in teachers}


def run_missing(
    writer: CacheWriter,
    teachers: Sequence[PreparedTeacher],
    teachers_dir: Path,
    tokens_per_batch: int | None,
    progress: Progress,
    opener: OpenTeacher = open_teacher,
) -> tuple[TeacherRun, ...]:
    """Run one teacher after the other over its missing parts; complete teachers are not loaded.

    Only one that an interrupted dump completed, and did not time, is loaded and timed.
    """
    missing = declare(writer, teachers)
    check_free_space(writer, teachers, missing)
    runs = []
    for teacher in teachers:
        if missing[teacher.name] or lacks_bases(writer, teacher) or lacks_speed(writer, teacher.name):
            run = run_teacher(
                writer, as_declared(writer, teacher), missing[teacher.name], teachers_dir, tokens_per_batch, progress,
                opener,
            )  # fmt: skip
            remember_run(writer.root, run)
            runs.append(run)
    return tuple(runs)


def as_declared(writer: CacheWriter, teacher: PreparedTeacher) -> PreparedTeacher:
    """A declared teacher with the precision of the data that the cache has of it: its head may not be in float32."""
    declared = writer.contents.teachers[teacher.name]
    return replace(teacher, spec=replace(teacher.spec, precision=declared.precision))


def refuse_stale(writer: CacheWriter, teachers: Sequence[PreparedTeacher]) -> None:
    """MismatchError if a teacher differs from the cache's; called before new texts are assigned to parts."""
    for teacher in teachers:
        with contextlib.suppress(DamageError):  # under repair: lost text ids come back with the texts
            writer.declare_teacher(teacher.spec, teacher.tokenizer_json)


def texts_in_full(writer: CacheWriter) -> np.ndarray:
    """Ids uint8 [n, 16] of the texts with hidden states in the cache, or to come; none where an id file is damaged."""
    with contextlib.suppress(DamageError):  # under repair: the ids come back with the texts
        return np.concatenate([NO_IDS, *(part.text_ids for part in writer.parts if part.scope == "full")])
    return NO_IDS


def refuse_forgotten_teachers(writer: CacheWriter, teachers: Sequence[PreparedTeacher], texts: TextScopes) -> None:
    """MismatchError if the cache has a teacher that would lack new texts because the recipe does not name it."""
    known = writer.base.contents.teachers if writer.base is not None else {}
    forgotten = sorted(known.keys() - {teacher.name for teacher in teachers})
    if not forgotten:
        return
    new = count_new_texts(writer, texts)
    if new:
        raise MismatchError(
            f"cache '{writer.root}' holds teacher '{forgotten[0]}', which the recipe does not name and which would "
            f"lack {new:,} new texts",
            f"Add teacher '{forgotten[0]}' to the recipe, or dump into a new directory.",
        )


def count_new_texts(writer: CacheWriter, texts: TextScopes) -> int:
    """How many texts the cache lacks, or has with logits only where they are wanted in full."""
    in_full = {one for part in writer.parts if part.scope == "full" for one in id_list(part.text_ids)}
    anywhere = in_full | {one for part in writer.parts for one in id_list(part.text_ids)}
    return len(texts.full.keys() - in_full) + len(texts.logits_only.keys() - anywhere)


def write_examples(writer: CacheWriter, task: TaskData) -> None:
    """Write labels and groups of every split, each time, because they can change without a dump."""
    for split, examples in task.splits.items():
        writer.write_examples(split, examples.text_ids, examples.labels, examples.groups)


def _has_text(cache_dir: Path) -> bool:
    """Whether a published cache has its texts; True for a new one."""
    return not (cache_dir / MANIFEST).is_file() or read_manifest(cache_dir).contents.has_text
