"""``kdcache report``: the HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli.options import Json
from kdcache.cli.output import out


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory: runs/NAME.", show_default=False)],
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Print the results table of a run and write its page: results, loss curves with the scale of each term, recipe.

    Example: kdcache report runs/sst2
    """
    from kdcache.report.page import read_results, write_page
    from kdcache.report.table import data_notes, remarks, result_rows, table, verdict
    from kdcache.runs import RunDirectory

    directory = RunDirectory(run)
    results = read_results(directory)
    baseline = read_results(directory.baseline) if directory.baseline.results.exists() else None
    out.document({"results": results, "baseline": baseline, "page": str(write_page(directory))})
    out.table(*table(result_rows(results, baseline)))
    lines = [*remarks(results, baseline), *data_notes(results)]
    if lines:
        out.text()
    for line in lines:
        out.text(line)
    if baseline is not None:
        out.text()
        out.text(verdict(results, baseline))
    out.note(f"page: {directory.report}")
