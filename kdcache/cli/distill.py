"""``kdcache distill``: train a student from a cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli import stages
from kdcache.cli.options import (
    RUNS,
    Json,
    OutputDir,
    RecipeFile,
    RemoteUrl,
    Settings,
    TargetsCache,
    find_cache,
    open_job,
)
from kdcache.cli.output import out

if TYPE_CHECKING:
    from kdcache.runs import RunDirectory


def distill(
    recipe: RecipeFile,
    settings: Settings = None,
    output_dir: OutputDir = RUNS,
    cache: TargetsCache = None,
    live_teachers: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Run the teachers of this directory in every step instead, for comparison.",
            show_default=False,
        ),
    ] = None,
    remote: RemoteUrl = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a student made with other settings.")] = False,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Train the recipe's student on targets streamed from a cache; no teacher is loaded.

    With a name, the needed files are fetched while the student trains, and kept. If interrupted, run the same command
    again: it continues. Start it with torchrun to train in several processes.

    Example: kdcache distill sst2.toml --cache sst2-3t

    Example: torchrun --nproc-per-node 4 -m kdcache distill sst2.toml --cache sst2-3t

    Example: kdcache distill sst2.toml --cache runs/sst2/cache --set distill.seed=1 --set name="sst2-seed1"
    """
    from kdcache.methods.registry import check_method
    from kdcache.report.loaded import read_results
    from kdcache.report.table import data_notes, remarks, result_rows, table

    stages.join_processes()
    job = open_job(recipe, settings, output_dir, cache=None if cache is None else find_cache(cache, remote))
    job.recipe.require_student()
    for stage in (job.recipe.distill, *job.recipe.distill.in_stages()):
        check_method(stage.method)  # before the run that is there is asked what differs
    if stages.is_finished(job, "student", live=live_teachers is not None) and not replace:
        job.progress.note("student: finished already with these settings, skipped")
    else:
        stages.distill(job, live_teachers=live_teachers, replace=replace)
    if out.quiet:  # the first process says what came of it
        return
    results = read_results(job.run)
    out.document(results)
    out.table(*table(result_rows(results)))
    for line in (*remarks(results), *_beside_baseline(job.run, results), *data_notes(results)):
        out.text(line)
    out.note(f"student: {job.run.student}")
    out.hint(f"Score it elsewhere with: kdcache evaluate {job.run.student} --data FILE")


def _beside_baseline(run: RunDirectory, results: Mapping[str, Any]) -> list[str]:
    """What the student without teachers says of the teachers, or that it is another student; empty without one."""
    from kdcache.report.loaded import read_results
    from kdcache.report.same_student import not_compared, other_settings
    from kdcache.report.table import weak_teachers

    if not run.baseline.results.exists():
        return []
    baseline = read_results(run.baseline)
    other = other_settings(run, results, baseline)
    return [not_compared(other)] if other else weak_teachers(results, baseline)
