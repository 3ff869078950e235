"""The page of a sweep: one self-contained HTML file with the table, a plot for each swept key, and the cost."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.report.frontier import family_colours
from kdcache.report.page import html_table, whole_page
from kdcache.report.sweep import short, sweep_lines, sweep_table, varying_keys

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 520, 260, 56, 30, 40
_LOG_FROM = 20  # ratio of the largest to the smallest value from which an axis is logarithmic
_MOST_COLOURS = 6


@dataclass(frozen=True)
class Dot:
    """A cell in a plot: its place on the x axis as given, mean and spread, colour group and tooltip."""

    at: Any
    mean: float
    spread: float
    group: str
    title: str


def sweep_page(document: Mapping[str, Any]) -> str:
    """The whole HTML document, from the contents of sweep.json."""
    name = f"{document['name']}: sweep"
    parts = [f"<h1>{html.escape(name)}</h1>", html_table(*sweep_table(document))]
    parts += [f"<p>{html.escape(line)}</p>" for line in sweep_lines(document)]
    keys = varying_keys(document)
    for key in keys:
        others = [other for other in keys if other != key]
        found = dots(document, key, _colour_key(document, others))
        if found:
            parts.append(f"<h2>{html.escape(key)}</h2>{plot(found, document['metric'], key)}")
    parts += ["<h2>Cost</h2>", _cost_table(document)]
    return whole_page(name, parts)


def dots(document: Mapping[str, Any], key: str, colour_by: str | None) -> list[Dot]:
    """The cells that have a score and a value for ``key``."""
    return [
        Dot(
            cell["settings"][key],
            cell["mean"],
            cell["spread"] or 0.0,
            "" if colour_by is None else f"{colour_by.rpartition('.')[2]} = {short(cell['settings'].get(colour_by))}",
            f"{cell['cell']}: {', '.join(f'{name} = {short(value)}' for name, value in cell['settings'].items())}: "
            f"{cell['mean']:.4f}",
        )
        for cell in document["cells"]
        if cell["mean"] is not None and cell["settings"].get(key) is not None
    ]


def plot(found: Sequence[Dot], metric: str, key: str) -> str:
    """Mean score of each cell against the value of ``key``, with one standard deviation up and down."""
    low = min(dot.mean - dot.spread for dot in found)
    high = max(dot.mean + dot.spread for dot in found)
    places, ticks = _across([dot.at for dot in found])
    colours = family_colours(dot.group for dot in found)
    drawn = [_axes(f"{metric} against {key}", low, high, ticks)]
    for dot, across in zip(found, places, strict=True):
        x = _LEFT + 16 + across * (_WIDTH - _LEFT - 40)
        y, top, bottom = (_up(value, low, high) for value in (dot.mean, dot.mean + dot.spread, dot.mean - dot.spread))
        style = f"stroke:{colours[dot.group]};fill:{colours[dot.group]}"
        bar = f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" style="{style}"/>'
        drawn.append(
            f'{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="{style}"><title>{html.escape(dot.title)}</title>'
            "</circle>"
        )
    for number, (group, colour) in enumerate(colours.items()):
        drawn.append(
            f'<text x="{_WIDTH - 8}" y="{_TOP + 14 * number}" text-anchor="end" style="fill:{colour}">'
            f"{html.escape(group)}</text>"
        )
    label = html.escape(f"{metric} against {key}")
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _across(values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Places in 0..1 and the labels of the axis: numbers to scale, logarithmic over a wide range; others in order."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        log = low > 0 and high / low >= _LOG_FROM
        scaled = [math.log(value) if log else float(value) for value in values]
        first, width = min(scaled), (max(scaled) - min(scaled)) or 1.0
        return [(value - first) / width for value in scaled], {0.0: f"{low:g}", 1.0: f"{high:g}" if high > low else ""}
    names = list(dict.fromkeys(short(value) for value in values))
    width = max(1, len(names) - 1)
    return [names.index(short(value)) / width for value in values], {
        place / width: name for place, name in enumerate(names)
    }


def _axes(title: str, low: float, high: float, ticks: Mapping[float, str]) -> str:
    texts: list[tuple[float, float, str, str]] = [
        (_LEFT, 16, "start", title),
        (_LEFT - 4, _up(high, low, high) + 4, "end", f"{high:.4f}"),
        (_LEFT - 4, _up(low, low, high) + 4, "end", f"{low:.4f}"),
    ]
    texts += [
        (_LEFT + 16 + across * (_WIDTH - _LEFT - 40), _HEIGHT - _BOTTOM + 16 + 12 * (number % 2), "middle", text)
        for number, (across, text) in enumerate(ticks.items())
    ]
    words = "".join(
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
        for x, y, anchor, text in texts
    )
    return f'<path class="axis" d="M{_LEFT} {_TOP - 6}V{_HEIGHT - _BOTTOM}H{_WIDTH - 8}"/>{words}'


def _up(value: float, low: float, high: float) -> float:
    share = (value - low) / ((high - low) or 1.0)
    return _HEIGHT - _BOTTOM - 8 - share * (_HEIGHT - _BOTTOM - _TOP - 16)


def _colour_key(document: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    for key in keys:
        if len({short(cell["settings"].get(key)) for cell in document["cells"]}) <= _MOST_COLOURS:
            return key
    return None


def _cost_table(document: Mapping[str, Any]) -> str:
    cells = document["cost"].get("cells", {})
    rows = [[name, cost["students"], round(cost["seconds"], 1), cost["texts"]] for name, cost in cells.items()]
    return html_table(("cell", "students", "seconds", "texts read"), rows)
