"""A shard of a dump: ``kdcache dump-teachers RECIPE --shard 2/8``.

Every shard is started with the same recipe and directory, on a disk that all share. It runs its own pieces and commits
each. The shard that ends last finds the cache complete and publishes it. A shard that was killed is started again; one
that is started twice finds its pieces done. A dump without ``--shard`` runs all that is missing and publishes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache.joint import SupersededError, member
from kdcache.cache.layout import part_number
from kdcache.dump.dry_run import check_free_space
from kdcache.dump.provenance import remember_run
from kdcache.dump.run import TeacherRun, run_teacher
from kdcache.dump.stage import DumpReport, as_declared, declare, plan_dump, publish_dump, report_dump
from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.cache.joint import Joint
    from kdcache.cache.writer import CacheWriter, PartTask
    from kdcache.dump.stage import DumpJob


@dataclass(frozen=True)
class Shard:
    """Number ``index`` of ``count`` shards, from 0."""

    index: int
    count: int

    def own(self, tasks: Sequence[PartTask], teacher: int) -> tuple[PartTask, ...]:
        """Those of a teacher's parts that this shard runs; ``teacher``: its place in the recipe.

        They follow from the part's number, and not from what is missing, so shards agree at any time.
        """
        return tuple(task for task in tasks if (_number(task) + teacher) % self.count == self.index)


def parse_shard(text: str) -> Shard:
    """The shard that ``i/n`` means. Raises RecipeError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    if match is None or not int(match[1]) < int(match[2]):
        raise RecipeError(
            f"--shard is '{text[:40]}'; expected i/n with i from 0 to n - 1",
            "Such as: --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT for an array that begins with 0.",
        )
    return Shard(int(match[1]), int(match[2]))


def dump_shard(job: DumpJob, shard: Shard) -> DumpReport:
    """Run the pieces of ``shard``; publish the cache if no piece is missing then.

    Raises:
        MismatchError: before anything runs, as ``dump_teachers``.
        LockedError: a process that does not share the work writes the directory.
        StorageError, NonFiniteError: as they occur; committed parts stay.
    """
    with member(job.cache_dir) as joint:
        with joint.planning():
            writer = joint.open(job.task_spec, job.settings, store_text=job.store_text)
            missing = plan_dump(writer, job)
        own = {teacher.name: shard.own(missing[teacher.name], place) for place, teacher in enumerate(job.teachers)}
        check_free_space(writer, job.teachers, own)
        runs: list[TeacherRun] = []
        try:
            _run(writer, job, own, shard, runs)
        except SupersededError as error:
            job.progress.note(error.message)
        with joint.planning():
            return _end(joint, job, writer, missing, runs)


def _run(
    writer: CacheWriter, job: DumpJob, own: Mapping[str, Sequence[PartTask]], shard: Shard, runs: list[TeacherRun]
) -> None:
    """Run the shard's pieces. Shards begin with different teachers, so that bases of several are fitted at a time."""
    first = shard.index % len(job.teachers)
    for teacher in (*job.teachers[first:], *job.teachers[:first]):
        tasks = own[teacher.name]
        if tasks:
            tokens, declared = job.recipe.dump.shared_batch_tokens, as_declared(writer, teacher)
            runs.append(run_teacher(writer, declared, tasks, job.teachers_dir, tokens, job.progress, job.opener))


def _end(
    joint: Joint, job: DumpJob, writer: CacheWriter, missing: Mapping[str, Sequence[PartTask]], runs: list[TeacherRun]
) -> DumpReport:
    """Publish if nothing is missing. Records of parts are read only if each part has one."""
    for run in runs:
        remember_run(job.cache_dir, run, shared=True)
    recorded = {name: writer.journal.recorded_parts(name) for name in missing}
    left = sum(task.part.name not in recorded[name] for name, tasks in missing.items() for task in tasks)
    begun = writer.journal.base()
    if left and begun is not None and begun["identity"] == joint.identity:
        return report_dump(writer, job, runs, missing=left)
    writer = joint.open(job.task_spec, job.settings, store_text=job.store_text)
    left = sum(len(tasks) for tasks in declare(writer, job.teachers).values())
    return report_dump(writer, job, runs, missing=left) if left else publish_dump(writer, job, runs)


def _number(task: PartTask) -> int:
    return part_number(task.part.name) or 0
