"""``kdcache report``: the HTML page of a run, or of several runs that it compares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.cli.options import Json
from kdcache.cli.output import out

if TYPE_CHECKING:
    from kdcache.runs import RunDirectory


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories: runs/NAME.", show_default=False)
    ],
    page: Annotated[
        Path | None,
        typer.Option(
            "--page",
            metavar="FILE",
            help="Where the page is written: by default RUN/report.html, for several runs comparison.html beside the "
            "first.",
            show_default=False,
        ),
    ] = None,
    predict: Annotated[
        bool,
        typer.Option(
            "--predict", help="First let the saved student answer validation and test again, for runs without answers."
        ),
    ] = False,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Print the results table of a run and write its page; with several runs, compare them.

    The page says how good the student is beside its teachers, what it costs, where it is wrong, whether the teachers
    agree, whether the loss terms are balanced, and what the cache holds. It is one file that opens offline.

    Example: kdcache report runs/sst2

    Example: kdcache report runs/sst2 runs/sst2-seed1 --page compared.html
    """
    from kdcache.runs import RunDirectory

    directories = [RunDirectory(run) for run in runs]
    if predict:
        _predict(directories)
    if len(directories) == 1:
        report_run(directories[0], page)
    else:
        _compare(directories, page or directories[0].root.resolve().parent / "comparison.html")


def report_run(directory: RunDirectory, page: Path | None = None) -> None:
    """The table of one run, and its page."""
    from kdcache.report.loaded import read_results
    from kdcache.report.page import write_page
    from kdcache.report.same_student import not_compared, other_settings
    from kdcache.report.table import data_notes, remarks, result_rows, table, verdict

    results = read_results(directory)
    baseline = read_results(directory.baseline) if directory.baseline.results.exists() else None
    written = write_page(directory, page)
    out.document({"results": results, "baseline": baseline, "page": str(written)})
    out.table(*table(result_rows(results, baseline)))
    other = [] if baseline is None else other_settings(directory, results, baseline)
    lines = [*remarks(results, None if other else baseline), *data_notes(results)]
    if lines:
        out.text()
    for line in lines:
        out.text(line)
    if baseline is not None:
        out.text()
        out.text(not_compared(other) if other else verdict(results, baseline))
    out.note(f"page: {written}")


def _compare(directories: list[RunDirectory], page: Path) -> None:
    from dataclasses import replace

    from kdcache.report.comparison import load_runs, write_comparison
    from kdcache.report.table import result_rows, table

    runs = load_runs(directories)
    written = write_comparison(directories, page)
    out.document({"runs": {name: dict(loaded.results) for name, loaded in runs.items()}, "page": str(written)})
    out.table(*table([replace(result_rows(loaded.results)[-1], model=name) for name, loaded in runs.items()]))
    out.note(f"page: {written}")


def _predict(directories: list[RunDirectory]) -> None:
    """Make the kept answers of each run, and of its student without teachers, again."""
    from kdcache.distill.predictions import predict_again
    from kdcache.progress import RichProgress

    progress = RichProgress()
    for run in directories:
        for each in (run, run.baseline) if run.baseline.results.exists() else (run,):
            predict_again(each, progress)
