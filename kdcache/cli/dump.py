"""``kdcache dump-teachers``: run each teacher once over the data, into a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli import stages
from kdcache.cli.options import RUNS, Json, OutputDir, RecipeFile, Settings, TeachersDir, open_job
from kdcache.cli.output import out
from kdcache.errors import RecipeError


def dump_teachers(
    recipe: RecipeFile,
    settings: Settings = None,
    output_dir: OutputDir = RUNS,
    teachers: TeachersDir = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Cache to write; default: that of the run.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be run and written; run only a warm-up batch.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Verify the cache first and dump again what is damaged.")
    ] = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Store text ids and targets, not the texts themselves.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Run share I of N (from 0) only; the cache is on a disk that all shards share.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Run each teacher once over the data and store soft labels and hidden states in a cache.

    If interrupted, run the same command again: it continues. In a finished cache, only new teachers, layers and texts
    are dumped; data that no longer match the recipe are refused with exit code 4.

    With --shard, N processes share the work; the one that ends last publishes the cache. Start a shard that failed
    again, or run the command without --shard for what is missing.

    Example: kdcache dump-teachers sst2.toml --dry-run

    Example: kdcache dump-teachers sst2.toml --shard $SLURM_ARRAY_TASK_ID/8

    Example: kdcache dump-teachers sst2.toml --repair
    """
    job = open_job(recipe, settings, output_dir, teachers=teachers, cache=cache)
    if dry_run:
        from kdcache.dump.dry_run import estimate_dump

        plan = estimate_dump(job.recipe, job.teachers, job.cache, progress=job.progress)
        out.document(plan.as_dict())
        for line in plan.lines():
            out.text(line)
        return
    if shard is not None:
        if repair:
            raise RecipeError("--repair and --shard were both given", "Repair in one process: leave out --shard.")
        report = stages.dump_shard(job, shard, no_text=no_text)
    else:
        report = stages.dump(job, repair=repair, no_text=no_text)
    out.document(report.as_dict())
    for line in (*report.counts.lines(), *report.lines()):
        out.text(line)
    if not report.published:
        out.hint("The shard that ends last publishes the cache; or run this without --shard for what is missing.")
        return
    out.hint(f"Distil a student from it: kdcache distill {recipe} --cache {job.cache}")
