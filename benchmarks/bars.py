"""Bars with their spread as a standalone SVG file: the figures of the table above it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, LEFT, ROW = 720, 210, 22
Across = Callable[[float], float]
STYLE = (
    "svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}"
    "rect{fill:#1f6feb}.ours{fill:#d9822b}path{stroke:#24292f;fill:none}.goal{stroke:#cf222e;stroke-dasharray:4 3}"
)


def short(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bars(
    title: str, found: Mapping[str, Mapping[str, float]], *, ours: Sequence[str] = (), goal: float | None = None
) -> str:
    """One bar per entry of ``found``, {name: {'median', 'spread'}}, and a line at ``goal``.

    Entries in ``ours`` have another colour. The scale is logarithmic, and the title says so, if the largest value is
    more than thirty times the smallest.
    """
    values = [entry["median"] for entry in found.values()]
    low, high = min(value for value in values if value > 0), max([*values, goal or 0])
    logarithmic = high > 30 * low
    origin = math.log10(low / 3) if logarithmic else 0.0
    end = math.log10(high) if logarithmic else high

    def across(value: float) -> float:
        at = math.log10(max(value, low / 3)) if logarithmic else value
        return LEFT + (WIDTH - LEFT - 90) * (at - origin) / ((end - origin) or 1.0)

    height = 40 + ROW * len(found)
    drawn = [f'<text class="title" x="8" y="18">{html.escape(title)}{" (logarithmic)" if logarithmic else ""}</text>']
    for row, (name, entry) in enumerate(found.items()):
        drawn.append(_bar(name, entry, 30 + ROW * row, across, ours=name in ours))
    if goal is not None:
        drawn.append(f'<path class="goal" d="M{across(goal):.1f} 26V{height - 8}"/>')
        drawn.append(f'<text x="{across(goal) + 4:.1f}" y="{height - 2}">{goal:g}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" '
        f'aria-label="{html.escape(title)}"><style>{STYLE}</style>{"".join(drawn)}</svg>\n'
    )


def _bar(name: str, entry: Mapping[str, float], top: int, across: Across, *, ours: bool) -> str:
    median, half = entry["median"], entry.get("spread", 0.0) / 2
    start, stop, middle = across(0), across(median), top + 8
    whisker = f'<path d="M{across(median - half):.1f} {middle}H{across(median + half):.1f}"/>' if half else ""
    return (
        f'<text x="{LEFT - 6}" y="{top + 12}" text-anchor="end">{html.escape(name)}</text>'
        f'<rect class="{"ours" if ours else "theirs"}" x="{start:.1f}" y="{top}" width="{max(stop - start, 1):.1f}" '
        'height="16"/>'
        f'{whisker}<text x="{max(stop, across(median + half)) + 5:.1f}" y="{top + 12}">{short(median)}</text>'
    )
