"""The stages of a run as the commands start them: skip what is finished, time what is not, record it.

Whether teachers and cache may be taken as they are is judged by the stages themselves, from fingerprints; the record of the run
directory only spares them the look. A student made with other settings is kept unless the user says ``--replace``.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache import __version__
from kdcache.cli.options import Job
from kdcache.errors import MismatchError

if TYPE_CHECKING:
    from kdcache.distill.stage import DistillResult
    from kdcache.dump.stage import DumpReport
    from kdcache.runs import Inputs, RunDirectory, Stage
    from kdcache.teachers.cofinetune import CofinetuneResult


def cofinetune(job: Job, *, add: str | None = None) -> CofinetuneResult:
    """Co-finetune all teachers, or ``add`` one to those that are there."""
    from kdcache.runs import mark_finished, stage_inputs
    from kdcache.teachers import cofinetune as stage

    started = time.perf_counter()
    work = job.run.checkpoints / "cofinetune"
    if add is None:
        result = stage.cofinetune(job.recipe, job.teachers, work, progress=job.progress, metrics=job.run.metrics)
    else:
        result = stage.add_teacher(job.recipe, add, job.teachers, work, progress=job.progress, metrics=job.run.metrics)
    mark_finished(job.run, "teachers", stage_inputs(job.recipe, "teachers"), time.perf_counter() - started)
    return result


def dump(job: Job, *, repair: bool = False) -> DumpReport:
    """Run each teacher once over the data; what the cache holds already is left."""
    from kdcache.dump.stage import dump_teachers
    from kdcache.runs import mark_finished

    started = time.perf_counter()
    inputs = _cache_inputs(job)
    report = dump_teachers(job.recipe, job.teachers, job.cache, progress=job.progress, repair=repair, provenance=provenance())
    mark_finished(job.run, "cache", inputs, time.perf_counter() - started)
    return report


def distill(job: Job, *, live_teachers: Path | None = None, replace: bool = False) -> DistillResult:
    """Train the recipe's student from the cache, or with the teachers running live."""
    from kdcache.distill import stage

    inputs = student_inputs(job, live=live_teachers is not None)
    _keep_or_replace(job.run, "student", inputs, replace=replace)
    return _train_student(job, job.run, "student", inputs, stage.distill, live_teachers)


def baseline(job: Job, *, replace: bool = False) -> DistillResult:
    """The same student without teachers, with the same seed and settings, in ``baseline/``."""
    from dataclasses import replace as changed

    from kdcache.distill import stage
    from kdcache.recipe import dump_toml
    from kdcache.runs import stage_inputs

    inputs = stage_inputs(job.recipe, "baseline")
    _keep_or_replace(job.run, "baseline", inputs, replace=replace)
    alone = job.recipe.model_copy(
        update={"distill": job.recipe.distill.model_copy(update={"method": "fine-tune", "paper": False})}
    )
    run = job.run.baseline
    run.create(dump_toml(alone))
    return _train_student(changed(job, recipe=alone), run, "baseline", inputs, stage.distill, None)


def is_finished(job: Job, stage: Stage, *, live: bool = False) -> bool:
    """The stage is recorded as finished with the inputs of now, and its result is there."""
    from kdcache.runs import changes, stage_inputs

    if stage == "cache":
        return (job.cache / "manifest.json").exists() and changes(job.run, stage, _cache_inputs(job)) == []
    if stage == "student":
        return job.run.results.exists() and changes(job.run, stage, student_inputs(job, live=live)) == []
    result = job.teachers / "teachers.json" if stage == "teachers" else job.run.baseline.results
    return result.exists() and changes(job.run, stage, stage_inputs(job.recipe, stage)) == []


def provenance() -> dict[str, Any]:
    """The command and where it ran: kept in the manifest, apart from identity."""
    import platform
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "command": shlex.join(["kdcache", *sys.argv[1:]]),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"kdcache": __version__} | {name: version(name) for name in packages},
    }


def _train_student(
    job: Job, run: RunDirectory, stage: Stage, inputs: Inputs, train: Any, live_teachers: Path | None
) -> DistillResult:
    from kdcache.runs import mark_finished

    started = time.perf_counter()
    result: DistillResult = train(job.recipe, job.cache, run.root, live_teachers=live_teachers, progress=job.progress)
    mark_finished(job.run, stage, inputs, time.perf_counter() - started)
    return result


def _keep_or_replace(run: RunDirectory, stage: Stage, inputs: Inputs, *, replace: bool) -> None:
    """MismatchError where a finished student was made with other inputs, unless it is to be replaced."""
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
            shutil.rmtree(made, ignore_errors=True)
        place.results.unlink(missing_ok=True)


def _cache_inputs(job: Job) -> Inputs:
    from kdcache.runs import file_identity, stage_inputs

    return stage_inputs(job.recipe, "cache", upstream=file_identity(job.teachers / "teachers.json"))


def student_inputs(job: Job, *, live: bool = False) -> Inputs:
    """The student depends on the cache through its identity, so a cache that moved or was repaired is the same cache."""
    from kdcache.cache.manifest import read_manifest
    from kdcache.runs import stage_inputs

    return stage_inputs(job.recipe, "student", upstream=read_manifest(job.cache).identity) | (
        {"live_teachers": "true"} if live else {}
    )
