"""Plots accuracy of students and variance kept by bytes per token and layer (logarithmic), as SVG."""

from __future__ import annotations

import html
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WIDTH, LEFT, RIGHT, HEIGHT, GAP, TOP = 720, 60, 170, 200, 46, 30
STYLE = (
    "text{font:11px sans-serif;fill:#57606a}path{fill:none;stroke:#8c959f}line{stroke-width:1.2}"
    "svg{background:#fff}rect{fill:#fff}"
)
COLOURS = ("#1f6feb", "#d9822b", "#7a8794", "#2f9e63", "#a04bbd", "#b8860b")  # families take turns


def family_colours(families: Iterable[str]) -> dict[str, str]:
    """A colour for each distinct family, in the order of their names."""
    return dict(zip(sorted(set(families)), itertools.cycle(COLOURS), strict=False))


@dataclass(frozen=True)
class Point:
    """A format: ``accuracies`` by seed, ``kept`` by layer."""

    name: str
    title: str
    family: str
    bytes: float
    accuracies: Sequence[float]
    kept: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """A panel of the picture: values from ``low`` to ``high`` between ``top`` and ``top + HEIGHT``."""

    top: float
    low: float
    high: float

    def place(self, value: float) -> float:
        return self.top + HEIGHT * (self.high - value) / ((self.high - self.low) or 1.0)


def plot(points: Sequence[Point], references: Mapping[str, float]) -> str:
    """``references``: mean accuracy of students without hidden states, drawn as horizontal lines."""
    sizes = [point.bytes for point in points]
    low, high = math.log2(min(sizes)) - 0.3, math.log2(max(sizes)) + 0.3

    def across(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(size) - low) / (high - low)

    scores = [score for point in points for score in point.accuracies] + list(references.values())
    above = Panel(TOP, min(scores) - 0.003, max(scores) + 0.003)
    below = Panel(TOP + HEIGHT + GAP, min(0.95, *(min(point.kept) for point in points)) - 0.02, 1.0)
    drawn = [
        *axes(above, "test accuracy: mean, and every seed"),
        *axes(below, "variance kept on unseen rows: mean, least and most of the layers"),
    ]
    drawn += [
        _text(across(2.0**power), below.top + HEIGHT + 16, f"{2**power}", "middle")
        for power in range(math.ceil(low), math.floor(high) + 1)
    ]
    drawn.append(_text(WIDTH - RIGHT, below.top + HEIGHT + 32, "bytes per token and layer", "end"))
    for name, score in references.items():
        at = above.place(score)
        drawn.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#57606a" stroke-dasharray="4 '
            '3"/>'
        )
        drawn.append(_text(WIDTH - RIGHT + 6, at + 4, name, "start"))
    there = family_colours(point.family for point in points)
    for number, (family, colour) in enumerate(there.items()):
        mine = sorted((point for point in points if point.family == family), key=lambda point: point.bytes)
        drawn.append(_text(WIDTH - RIGHT + 6, below.top + 14 + 16 * number, family, "start", colour))
        drawn += [*marks(mine, above, across, colour, "accuracies"), *marks(mine, below, across, colour, "kept")]
    whole = below.top + HEIGHT + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole:.0f}" width="{WIDTH}" '
        f'height="{whole:.0f}" role="img">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{whole:.0f}"/>{"".join(drawn)}</svg>'
    )


def axes(panel: Panel, title: str) -> Iterator[str]:
    bottom = panel.top + HEIGHT
    yield f'<path d="M{LEFT} {panel.top:.1f}V{bottom:.1f}H{WIDTH - RIGHT}"/>'
    yield _text(LEFT, panel.top - 8, title, "start")
    for value in (panel.low, (panel.low + panel.high) / 2, panel.high):
        yield _text(LEFT - 6, panel.place(value) + 4, f"{value:.3f}", "end")


def marks(
    points: Sequence[Point], panel: Panel, across: Callable[[float], float], colour: str, what: str
) -> Iterator[str]:
    """A line through the means, with a bar from the smallest to the largest value at each."""
    values = [(across(point.bytes), point, list(getattr(point, what))) for point in points]
    line = " ".join(f"{x:.1f},{panel.place(statistics.mean(found)):.1f}" for x, _, found in values)
    yield f'<polyline points="{line}" style="fill:none;stroke:{colour};stroke-width:1.5"/>'
    for x, point, found in values:
        low, high = panel.place(min(found)), panel.place(max(found))
        said = html.escape(
            f"{point.title}: {point.bytes:.0f} bytes, {statistics.mean(found):.4f} ({min(found):.4f} to "
            f"{max(found):.4f})"
        )
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
        y = panel.place(statistics.mean(found))
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{said}</title></circle>'
        if what == "accuracies":
            yield from (f'<circle cx="{x:.1f}" cy="{panel.place(one):.1f}" r="1.6" fill="{colour}"/>' for one in found)


def _text(x: float, y: float, words: str, anchor: str, colour: str | None = None) -> str:
    look = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{html.escape(words)}</text>'
