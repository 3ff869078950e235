"""``kdcache run``: all stages of a recipe, finished ones skipped, and the results table."""

from __future__ import annotations

from typing import Annotated

import typer

from kdcache.cli import report, stages
from kdcache.cli.options import RUNS, Json, OutputDir, RecipeFile, Settings, open_job
from kdcache.training.processes import check_alone


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
    stages.join_processes()
    check_alone("kdcache run")
    job = open_job(recipe, settings, output_dir)
    stages.run_all(job, baseline_too=not no_baseline, replace=replace)
    report.report_run(job.run)
