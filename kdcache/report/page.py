"""The page of a run: one self-contained HTML file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import DamageError, RecipeError
from kdcache.report.curves import by_stage, read_curves, scales, svg
from kdcache.report.frontier import frontier_charts
from kdcache.report.table import data_notes, remarks, result_rows, table, verdict
from kdcache.runs import RunDirectory, read_record

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2733; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dbe1; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e6eaee; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f5f7f9; padding: 1rem; overflow-x: auto; font-size: 13px; }
svg { margin: .3rem; background: #fafbfc; } svg text { font: 11px system-ui, sans-serif; fill: #51606f; }
svg polyline { fill: none; stroke: #1f6feb; stroke-width: 1.5; } svg .axis { fill: none; stroke: #c3ccd5; }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #d8dee6; } pre, svg { background: #1c2229; }
th, td, h2 { border-color: #303841; } svg text { fill: #9aa7b4; } svg polyline { stroke: #6ea8fe; } }
"""


def write_page(run: RunDirectory) -> Path:
    """Write ``report.html`` of a run directory; RecipeError if it has no results."""
    results, baseline = read_results(run), None
    if run.baseline.results.exists():
        baseline = read_results(run.baseline)
    run.report.write_text(page(run, results, baseline), encoding="utf-8")
    return run.report


def read_results(run: RunDirectory) -> dict[str, Any]:
    """``results.json`` of a run; RecipeError if it is missing, DamageError if it is unreadable."""
    try:
        document = json.loads(run.results.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(
            f"'{run.root}' holds no results.json", "Name the directory of a finished run: runs/NAME."
        ) from error
    except (OSError, ValueError) as error:
        raise DamageError(f"'{run.results}' is not readable: {error}", "Run the recipe again.") from error
    if not isinstance(document, dict):
        raise DamageError(f"'{run.results}' is not a results file", "Run the recipe again.")
    return document


def page(run: RunDirectory, results: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    """The whole HTML document."""
    name = html.escape(run.root.resolve().name)
    columns, rows = table(result_rows(results, baseline))
    parts = [f"<h1>{name}</h1>", html_table(columns, rows)]
    parts += [f"<p>{html.escape(line)}</p>" for line in (*remarks(results, baseline), *data_notes(results))]
    if baseline is not None:
        parts.append(f"<p>{html.escape(verdict(results, baseline))}</p>")
    parts += _loss_sections(run.metrics, "")
    parts += _loss_sections(run.baseline.metrics, " (student without teachers)")
    parts += _storage_section(run)
    parts += ["<h2>Stages</h2>", _stages(run)]
    if run.recipe_file.exists():
        parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(run.recipe_file.read_text(encoding='utf-8'))}</pre>"]
    return whole_page(run.root.resolve().name, parts)


def whole_page(title: str, parts: Sequence[str]) -> str:
    """A self-contained HTML document of these parts; the title is escaped here, the parts are HTML."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table with escaped cells."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _loss_sections(metrics: Path, suffix: str) -> list[str]:
    parts = []
    for stage, curves in by_stage(read_curves(metrics, "steps")).items():
        rows = [[row["term"], row["first"], row["last"], row["median"], row["largest"]] for row in scales(curves)]
        parts += [
            f"<h2>Loss terms: {html.escape(stage + suffix)}</h2>",
            html_table(("term", "first", "last", "median size", "largest"), rows),
        ]
        parts += [svg(curve) for curve in curves]
    for stage, curves in by_stage(read_curves(metrics, "epoch")).items():
        parts += [f"<h2>Epochs: {html.escape(stage + suffix)}</h2>", *(svg(curve) for curve in curves)]
    return parts


def _storage_section(run: RunDirectory) -> list[str]:
    """The measurements of ``kdcache plan``, if there are any."""
    if not run.plan.exists():
        return []
    try:
        plan = json.loads(run.plan.read_text(encoding="utf-8"))
        return ["<h2>Storage of hidden states</h2>", *frontier_charts(plan)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"'{run.plan}' is not readable: {error}", "Delete it, or make it again: kdcache plan RECIPE"
        ) from error


def _stages(run: RunDirectory) -> str:
    stages = read_record(run).get("stages", {})
    ordered = sorted(stages.items(), key=lambda item: str(item[1]["finished"]))
    return html_table(
        ("stage", "finished (UTC)", "seconds"), [[name, entry["finished"], entry["seconds"]] for name, entry in ordered]
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
