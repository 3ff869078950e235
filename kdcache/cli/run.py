"""``kdcache run``: all stages of a recipe, finished ones skipped, and the results table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from kdcache.cli import report, stages
from kdcache.cli.options import RUNS, Job, Json, OutputDir, RecipeFile, Settings, open_job
from kdcache.training.processes import check_alone

_DOES = {
    "teachers": "co-finetuning under one shared head",
    "cache": "each teacher runs once over the data",
    "baseline": "the student without teachers, for comparison",
    "student": "the student is trained",
}


def run(
    recipe: RecipeFile,
    settings: Settings = None,
    output_dir: OutputDir = RUNS,
    no_baseline: Annotated[
        bool, typer.Option("--no-baseline", help="Leave out the same student without teachers.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a student made with other settings.")] = False,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Co-finetune, dump, distill and evaluate; stages that are finished with the same settings are skipped.

    It also trains the same student without teachers, for comparison. If interrupted, run the same command again.

    Example: kdcache run quickstart/quickstart.toml

    Example: kdcache run sst2.toml --set distill.seed=1 --set name="sst2-seed1"
    """
    from kdcache.distill.objective import objective_settings
    from kdcache.training.trackers import check_trackers

    stages.join_processes()
    check_alone("kdcache run")
    job = open_job(recipe, settings, output_dir)
    for part in (job.recipe.distill, *job.recipe.distill.in_stages()):
        objective_settings(part)  # fail before teachers are trained
    check_trackers(job.recipe.cofinetune, "cofinetune")
    check_trackers(job.recipe.distill, "distill")
    _check_student(job)
    todo: dict[Any, Callable[[], object]] = {
        "teachers": lambda: stages.cofinetune(job),
        "cache": lambda: stages.dump(job),
        "baseline": lambda: stages.baseline(job, replace=replace),
        "student": lambda: stages.distill(job, replace=replace),
    }
    if not job.recipe.teachers:
        del todo["teachers"], todo["cache"]
    if no_baseline or job.recipe.distill.method == "fine-tune":
        del todo["baseline"]
    for stage, work in todo.items():
        if stages.is_finished(job, stage):
            job.progress.note(f"{stage}: finished already, skipped")
        else:
            job.progress.note(f"{stage}: {_DOES[stage]}")
            work()
    report.report_run(job.run)


def _check_student(job: Job) -> None:
    """Refuse a model that cannot be a student before teachers are trained for it."""
    job.recipe.require_student()
    if not job.recipe.teachers or stages.is_finished(job, "cache"):
        return  # the student is trained next, which checks it
    from kdcache.students.build import check_student

    check_student(job.recipe, job.teachers)
