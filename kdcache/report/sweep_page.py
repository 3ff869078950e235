"""The page of a sweep: the table, a chart of the cells, a chart for each swept key, and the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.report import charts
from kdcache.report.html import Block, Caution, Figure, Page, Section, Side, Table, Text, noted, render
from kdcache.report.sweep import settings_text, short, sweep_lines, sweep_table, varying_keys
from kdcache.report.table import millions

_LOG_FROM = 20  # ratio of the largest to the smallest value from which an axis is logarithmic
_MOST_COLOURS = 6
_NOT_SET = "not set"
_MOST_CELLS = 60  # in the chart of all cells


def sweep_page(document: Mapping[str, Any]) -> str:
    """The whole HTML document, from the contents of sweep.json."""
    keys = varying_keys(document)
    columns, rows = _joined(*sweep_table(document))
    strong = frozenset(place for place, cell in enumerate(document["cells"]) if cell["cell"] == document["chosen"])
    left = frozenset(range(1 + len(keys)))
    blocks: list[Block] = [Table(columns, rows, left, strong), *(Text(line) for line in sweep_lines(document))]
    scored = [cell for cell in document["cells"] if cell["mean"] is not None]
    if scored:
        title = f"{document['split'].capitalize()} {document['metric']} of each cell"
        note = "one standard deviation over seeds"
        blocks.insert(1, Figure(title, charts.score_intervals(_ranked(document, scored), document["metric"]), note))
    figures = [figure for key in keys if (figure := _by_key(document, key, keys)) is not None]
    sections = [
        Section("scores", "Which settings are best?", blocks),
        *([Section("settings", "What does each setting do?", [Side(figures)])] if figures else []),
        Section("cost", "What does it cost?", _cost(document)),
    ]
    warnings = [Caution(text) for text in document.get("warnings", [])]
    return render(Page(f"{document['name']}: sweep", sections, warnings, subtitle=_subtitle(document)))


def _joined(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[Any]]]:
    """The table with each interval below its difference, so that it fits the page."""
    at = columns.index("difference")
    joined = [[*row[:at], noted(row[at], row[at + 1]), *row[at + 2 :]] for row in rows]
    return [*columns[: at + 1], *columns[at + 2 :]], joined


def _subtitle(document: Mapping[str, Any]) -> str:
    cells, seeds = len(document["cells"]), len(document["seeds"])
    return f"{cells} cells, {seeds} seed{'' if seeds == 1 else 's'} each, chosen on {document['split']}"


def _ranked(document: Mapping[str, Any], scored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cells, the best first."""
    roles = {document["baseline"]: "baseline", document["chosen"]: "chosen"}
    sign = 1 if document["metric"] == "loss" else -1
    best = sorted(scored, key=lambda cell: sign * float(cell["mean"]))[:_MOST_CELLS]
    return [
        {
            "model": cell["cell"],
            "role": roles.get(cell["cell"], "cell"),
            "value": cell["mean"],
            "low": cell["mean"] - (cell["spread"] or 0.0),
            "high": cell["mean"] + (cell["spread"] or 0.0),
        }
        for cell in best
    ]


def _by_key(document: Mapping[str, Any], key: str, keys: Sequence[str]) -> Figure | None:
    """The scores of the cells against ``key``, coloured by another key with few values; None for a single value."""
    colour_by = next((other for other in keys if other != key and _few(document, other)), None)
    rows = [
        {
            "at": _place(cell["settings"][key]),
            "name": cell["cell"],
            "value": cell["mean"],
            "low": cell["mean"] - (cell["spread"] or 0.0),
            "high": cell["mean"] + (cell["spread"] or 0.0),
            "group": _group(cell, colour_by),
            "settings": settings_text(cell["settings"], cell["settings"]),
        }
        for cell in document["cells"]
        if cell["mean"] is not None
    ]
    if all(isinstance(row["at"], int | float) for row in rows if row["at"] != _NOT_SET):
        rows = [row for row in rows if row["at"] != _NOT_SET]  # an axis of numbers has no place for it
    else:
        rows = [row | {"at": str(row["at"])} for row in rows]
    if len({row["at"] for row in rows}) < 2:
        return None
    groups = list(dict.fromkeys(str(row["group"]) for row in rows))
    values = [row["at"] for row in rows if isinstance(row["at"], int | float)]
    log = len(values) == len(rows) and min(values) > 0 and max(values) / min(values) >= _LOG_FROM
    return Figure(key, charts.cells_by_setting(rows, key, document["metric"], groups, log=log))


def _place(value: Any) -> str | int | float:
    if value is None:
        return _NOT_SET
    return value if isinstance(value, int | float) and not isinstance(value, bool) else short(value)


def _group(cell: Mapping[str, Any], colour_by: str | None) -> str:
    return (
        ""
        if colour_by is None
        else f"{colour_by.rpartition('.')[2]} = {short(cell['settings'].get(colour_by)) or _NOT_SET}"
    )


def _few(document: Mapping[str, Any], key: str) -> bool:
    return len({short(cell["settings"].get(key)) for cell in document["cells"]}) <= _MOST_COLOURS


def _cost(document: Mapping[str, Any]) -> list[Block]:
    """Score against latency of cells and teachers, and the table of what the cells took."""
    cost, metric, split = document["cost"], document["metric"], document["split"]
    means = {cell["cell"]: cell["mean"] for cell in document["cells"]}
    roles = {document["baseline"]: "baseline", document["chosen"]: "chosen"}
    points = [
        _point(name, roles.get(name, "cell"), means.get(name), entry) for name, entry in cost.get("cells", {}).items()
    ]
    points += [
        _point(f"teacher {name}", "teacher", entry.get(split, {}).get(metric), entry)
        for name, entry in cost.get("teachers", {}).items()
    ]
    found = [point for point in points if point is not None]
    blocks: list[Block] = []
    if len({point["latency"] for point in found}) > 1:
        title = f"{split.capitalize()} {metric} against latency and size"
        blocks.append(Figure(title, charts.cost(found, metric), "the area of a circle is the number of parameters"))
    rows = [
        [name, entry["students"], f"{entry['seconds']:,.1f}", f"{entry['texts']:,}"]
        for name, entry in cost.get("cells", {}).items()
    ]
    return [*blocks, Table(["cell", "students", "seconds", "texts read"], rows)]


def _point(name: str, role: str, score: float | None, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    if score is None or not entry.get("latency_ms"):
        return None
    parameters = entry.get("parameters")
    return {
        "model": name,
        "role": role,
        "value": score,
        "latency": float(entry["latency_ms"]),
        "parameters": parameters,
        "size": f"{millions(parameters) or 'unknown number of'} parameters",
    }
