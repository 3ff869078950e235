"""``kdcache dump-teachers``: run each teacher once over the data, into a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli import stages
from kdcache.cli.options import RUNS, Json, OutputDir, RecipeFile, RemoteUrl, Settings, TeachersDir, open_job
from kdcache.cli.output import out


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
    engine: Annotated[str, typer.Option(metavar="local|ray", help="Where the teachers run.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The Ray cluster; default: this machine alone.", show_default=False),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, max=10_000, help="Ray workers; 0: as many as the cluster has room for.")
    ] = 0,
    worker_cpus: Annotated[float, typer.Option(min=0.01, help="CPUs of a Ray worker.")] = 1.0,
    worker_gpus: Annotated[
        float | None,
        typer.Option(min=0.0, help="GPUs of a Ray worker; default: 1 if the cluster has any.", show_default=False),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="NAME",
            help="Send the cache to the remote under this name; workers need no shared disk.",
            show_default=False,
        ),
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", help="With --to: a tag for the version.", show_default=False)
    ] = None,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Run each teacher once over the data and store soft labels and hidden states in a cache.

    If interrupted, run the same command again: it continues. In a finished cache, only new teachers, layers and texts
    are dumped; data that no longer match the recipe are refused with exit code 4.

    With --shard, N processes share the work; the one that ends last publishes the cache. Start a shard that failed
    again, or run the command without --shard for what is missing.

    With --engine ray, workers of a Ray cluster run the teachers and write to the disk that they share, or with --to
    send their files to the remote. With --to, this machine needs room for the texts only.

    Example: kdcache dump-teachers sst2.toml --dry-run

    Example: kdcache dump-teachers sst2.toml --shard $SLURM_ARRAY_TASK_ID/8

    Example: kdcache dump-teachers sst2.toml --engine ray --address head:6379 --to sst2-3t

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
    where = stages.Where(shard, engine, address, workers, worker_cpus, worker_gpus, to, tag, remote)
    report = stages.dump(job, repair=repair, no_text=no_text, where=where)
    out.document(report.as_dict())
    for line in (*report.counts.lines(), *report.lines()):
        out.text(line)
    if not report.published:
        out.hint("The shard that ends last publishes the cache; or run this without --shard for what is missing.")
        return
    out.hint(f"Distil a student from it: kdcache distill {recipe} --cache {to or job.cache}")
