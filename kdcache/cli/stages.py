"""The stages of a run, as commands start them: each is timed, and recorded in the run directory when it is complete.

``is_finished`` compares that record with the recipe, so a finished stage can be skipped. The stages themselves check
with fingerprints whether existing teachers and caches can be used. A student made with other settings is kept unless
``--replace`` is given.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cli.options import Job, default_url, open_team
from kdcache.cli.output import out
from kdcache.errors import MismatchError, RecipeError
from kdcache.share.keys import check_name, check_tag
from kdcache.training import processes

if TYPE_CHECKING:
    from kdcache.distill.stage import DistillResult
    from kdcache.dump.stage import DumpJob, DumpReport
    from kdcache.runs import Inputs, RunDirectory, Stage
    from kdcache.teachers.cofinetune import CofinetuneResult


def join_processes() -> None:
    """Find the processes that torchrun started with this one. Only the first of them prints, but for errors."""
    group = processes.join()
    out.quiet = not group.first
    if group.world > 1:
        out.note(f"{group.world} processes were started; each gets its share of the work")


def cofinetune(job: Job, *, add: str | None = None) -> CofinetuneResult:
    """Co-finetune all teachers, or ``add`` one to the existing ones."""
    from kdcache.runs import stage_inputs
    from kdcache.teachers import cofinetune as stage

    processes.join()
    work = job.run.checkpoints / "cofinetune"
    with _recorded(job, job.run, "teachers", stage_inputs(job.recipe, "teachers")):
        if add is None:
            return stage.cofinetune(job.recipe, job.teachers, work, progress=job.progress, metrics=job.run.metrics)
        return stage.add_teacher(job.recipe, add, job.teachers, work, progress=job.progress, metrics=job.run.metrics)


@dataclass(frozen=True)
class Where:
    """Where a dump runs, and where its cache goes: the options of ``dump-teachers``."""

    shard: str | None = None
    engine: str = "local"
    address: str | None = None
    workers: int = 0
    cpus: float = 1.0
    gpus: float | None = None
    to: str | None = None
    tag: str | None = None
    remote: str | None = None

    def check(self, *, repair: bool) -> None:
        """Raises RecipeError for options that exclude each other."""
        if self.engine not in ("local", "ray"):
            raise RecipeError(f"--engine is '{self.engine[:40]}'; expected local or ray", "Such as: --engine ray")
        together = [
            (repair, "--repair", [(self.shard, "--shard"), (self.engine == "ray", "--engine ray"), (self.to, "--to")]),
            (self.shard, "--shard", [(self.engine == "ray", "--engine ray"), (self.to, "--to")]),
        ]
        for given, name, others in together:
            for other, its_name in others:
                if given and other:
                    raise RecipeError(f"{name} and {its_name} were both given", f"Leave out {its_name}.")
        if self.engine != "ray" and (self.address or self.workers or self.gpus is not None):
            raise RecipeError("--address, --workers and --worker-gpus are for Ray", "Add --engine ray.")
        if self.to is not None:
            check_name(self.to)
            check_tag(self.tag or "latest")
        if self.to is None and (self.tag or self.remote):
            raise RecipeError("--tag and --remote are for a dump to a remote", "Add --to NAME.")


def dump(job: Job, *, repair: bool = False, no_text: bool = False, where: Where | None = None) -> DumpReport:
    """Run each teacher once over the data, here or ``where`` else; existing parts of the cache are kept."""
    where = where or Where()
    where.check(repair=repair)
    if where.shard is not None:
        return _dump_shard(job, where.shard, no_text)
    if where.engine != "local" or where.to is not None:
        return _dump_on_workers(job, where, no_text)
    from kdcache.dump.stage import dump_teachers

    with _recorded(job, job.run, "cache", _cache_inputs(job)):
        return dump_teachers(
            job.recipe,
            job.teachers,
            job.cache,
            progress=job.progress,
            repair=repair,
            no_text=no_text,
            provenance=provenance(),
        )


def _dump_shard(job: Job, shard: str, no_text: bool) -> DumpReport:
    """The run directory records the stage when the cache is published."""
    from kdcache.cache.joint import planning
    from kdcache.dump.engines import shards

    started = time.perf_counter()
    chosen = shards.parse_shard(shard)
    job.run.create()
    report = shards.dump_shard(_prepared(job, no_text), chosen)
    if report.published:
        with planning(job.cache):  # two shards may find the cache complete
            _record(job, job.run, "cache", _cache_inputs(job), started)
    return report


def _dump_on_workers(job: Job, where: Where, no_text: bool) -> DumpReport:
    from kdcache.dump.engines import cluster
    from kdcache.dump.engines.local import LocalEngine
    from kdcache.dump.engines.ray_actors import RayEngine, check_engine

    engine: cluster.Engine = LocalEngine()
    if where.engine == "ray":
        engine = ray = RayEngine(where.address, where.workers, where.cpus, where.gpus)
        check_engine(ray)
    target = None
    if where.to is not None:
        remote = open_team(where.remote)
        url = where.remote or default_url()
        here = url if "://" in url else str(Path(url).expanduser().absolute())  # as workers open it
        target = cluster.Target(remote, here, where.to, where.tag)
    with _recorded(job, job.run, "cache", _cache_inputs(job)):
        asked = _prepared(job, no_text)
        if target is None:
            return cluster.dump_on_shared_disk(asked, engine)
        report, pushed = cluster.dump_to_remote(asked, engine, target)
    job.progress.note(f"{pushed.reference} is on {target.remote.url}")
    return report


def _prepared(job: Job, no_text: bool) -> DumpJob:
    from kdcache.dump.stage import prepare_dump

    return prepare_dump(
        job.recipe, job.teachers, job.cache, progress=job.progress, no_text=no_text, provenance=provenance()
    )


def distill(job: Job, *, live_teachers: Path | None = None, replace: bool = False) -> DistillResult:
    """Train the recipe's student from the cache, or with the teachers running live."""
    from kdcache.distill.stage import distill as train

    group = processes.join()
    inputs = student_inputs(job, live=live_teachers is not None)
    group.from_first(lambda: _keep_or_replace(job.run, "student", inputs, replace=replace))
    source = job.remote_cache.read(job.progress) if job.remote_cache else nullcontext(cache_at_hand(job))
    with _recorded(job, job.run, "student", inputs), source as cache:
        return train(job.recipe, cache, job.run.root, live_teachers=live_teachers, progress=job.progress)


def baseline(job: Job, *, replace: bool = False) -> DistillResult:
    """Train the same student without teachers in ``baseline/``: same seed and order of rows, settings of [baseline]."""
    from kdcache.distill.stage import distill as train

    inputs = baseline_inputs(job)
    _keep_or_replace(job.run, "baseline", inputs, replace=replace)
    alone = job.recipe.model_copy(update={"distill": job.recipe.without_teachers(), "baseline": None})
    with _recorded(replaced(job, recipe=alone), job.run.baseline, "baseline", inputs):
        return train(alone, cache_at_hand(job), job.run.baseline.root, progress=job.progress)


_DOES: dict[Stage, str] = {
    "teachers": "co-finetuning under one shared head",
    "cache": "each teacher runs once over the data",
    "baseline": "the student without teachers, for comparison",
    "student": "the student is trained",
}


def run_all(job: Job, *, baseline_too: bool = True, replace: bool = False) -> None:
    """All stages of a recipe; those that are finished with the same settings are skipped.

    What can be refused is refused before teachers are trained. Raises KdcacheError, one of its classes.
    """
    from kdcache.distill.objective import objective_settings
    from kdcache.training.trackers import check_trackers

    for part in job.recipe.distill.in_stages():
        objective_settings(part)
    check_trackers(job.recipe.cofinetune, "cofinetune")
    check_trackers(job.recipe.distill, "distill")
    _check_student(job)
    todo: dict[Stage, Callable[[], object]] = {
        "teachers": lambda: cofinetune(job),
        "cache": lambda: dump(job),
        "baseline": lambda: baseline(job, replace=replace),
        "student": lambda: distill(job, replace=replace),
    }
    if not job.recipe.teachers:
        del todo["teachers"], todo["cache"]
    if not baseline_too or job.recipe.distill.method == "fine-tune":
        del todo["baseline"]
    for stage, work in todo.items():
        if is_finished(job, stage):
            job.progress.note(f"{stage}: finished already, skipped")
        else:
            job.progress.note(f"{stage}: {_DOES[stage]}")
            work()


def _check_student(job: Job) -> None:
    """Refuse a model that cannot be a student before teachers are trained for it."""
    job.recipe.require_student()
    if not job.recipe.teachers or is_finished(job, "cache"):
        return  # the student is trained next, which checks it
    from kdcache.students.build import check_student

    check_student(job.recipe, job.teachers)


@contextmanager
def _recorded(job: Job, place: RunDirectory, stage: Stage, inputs: Inputs) -> Iterator[None]:
    """Make the run directory before a stage; write recipe, inputs and duration when it is complete.

    Of several processes, the first does.
    """
    from kdcache.files import replace_file
    from kdcache.recipe import dump_toml

    started, first = time.perf_counter(), processes.current().first
    if first:
        place.create()
    if first and not place.recipe_file.exists():
        replace_file(place.recipe_file, dump_toml(job.recipe).encode())
    yield
    if first:
        _record(job, place, stage, inputs, started)


def _record(job: Job, place: RunDirectory, stage: Stage, inputs: Inputs, started: float) -> None:
    from kdcache.files import replace_file
    from kdcache.recipe import dump_toml
    from kdcache.runs import mark_finished

    replace_file(place.recipe_file, dump_toml(job.recipe).encode())
    mark_finished(job.run, stage, inputs, time.perf_counter() - started)


def is_finished(job: Job, stage: Stage, *, live: bool = False, weights: bool = True) -> bool:
    """Whether the stage is recorded as finished with the current inputs, and its result exists.

    ``weights``: False where the scores of a student are enough, as in a sweep, whose students may be deleted.
    """
    from kdcache.runs import changes, stage_inputs

    if stage == "cache":
        return (job.cache / "manifest.json").exists() and changes(job.run, stage, _cache_inputs(job)) == []
    if stage == "teachers":
        made = (job.teachers / "teachers.json").exists()
        return made and changes(job.run, stage, stage_inputs(job.recipe, stage)) == []
    place = job.run if stage == "student" else job.run.baseline
    if not place.results.exists() or (weights and not (place.student / "config.json").exists()):
        return False
    inputs = student_inputs(job, live=live) if stage == "student" else baseline_inputs(job)
    return changes(job.run, stage, inputs) == []


def cache_at_hand(job: Job) -> Path | None:
    """The run's own cache if it exists; one named by a flag in any case, so that a missing one is an error."""
    return job.cache if job.cache != job.run.cache or job.cache.exists() else None


def provenance() -> dict[str, Any]:
    """The command and its machine, for the manifest; not part of the identity."""
    import platform

    return {
        "command": shlex.join(["kdcache", *sys.argv[1:]]),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _keep_or_replace(run: RunDirectory, stage: Stage, inputs: Inputs, *, replace: bool) -> None:
    """Raises MismatchError if a finished student has other inputs; with ``replace`` removes it."""
    from kdcache.files import remove_directory
    from kdcache.runs import changes, forget

    differing = changes(run, stage, inputs)
    place = run.baseline if stage == "baseline" else run
    if differing and not replace:
        shown = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise MismatchError(
            f"'{place.root}' holds a student made with other settings: {shown}",
            'Make a second one beside it with --set name="NEW", or replace this one with --replace.',
        )
    if replace:
        forget(run, stage)
        for made in (place.student, place.checkpoints / "distill"):
            if made.exists():
                remove_directory(made)
        place.results.unlink(missing_ok=True)
        place.predictions.unlink(missing_ok=True)


def _cache_inputs(job: Job) -> Inputs:
    from kdcache.runs import file_identity, stage_inputs

    return stage_inputs(job.recipe, "cache", upstream=file_identity(job.teachers / "teachers.json"))


def baseline_inputs(job: Job) -> Inputs:
    """Inputs of the student without teachers, with what it takes over from co-finetuned ones.

    A baseline that an earlier version recorded does not say from which teachers it started; it stays finished.
    """
    from kdcache.distill.teachers_at_hand import taken_over, teachers_beside_cache
    from kdcache.runs import stage_inputs

    cache = cache_at_hand(job)
    teachers = None if cache is None else teachers_beside_cache(cache)
    return stage_inputs(job.recipe, "baseline") | taken_over(job.recipe.require_student(), teachers)


def student_inputs(job: Job, *, live: bool = False) -> Inputs:
    """Inputs of the student. The cache counts by its identity, so a moved or repaired cache is the same."""
    from kdcache.cache.manifest import read_manifest
    from kdcache.runs import stage_inputs

    cache = cache_at_hand(job)
    if job.remote_cache is not None:
        upstream = job.remote_cache.ref.identity
    else:
        upstream = read_manifest(cache).identity if cache is not None else ""
    inputs = stage_inputs(job.recipe, "student", upstream=upstream)
    return inputs | ({"live_teachers": "true"} if live else {})
