"""Bytes and kept variance of storage formats, as inline SVG.

One chart per teacher, from the document of a storage plan.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 240, 44, 24, 34
_COLOURS = ("#1f6feb", "#d9822b", "#7a8794", "#2f9e63", "#a04bbd", "#b8860b")  # families take turns

Point = tuple[float, float, str, str]  # bytes per row, share kept, family, form


def frontier_charts(plan: Mapping[str, Any]) -> list[str]:
    """A chart for each teacher of ``plan``.

    Bytes per row (logarithmic) against the share of variance kept, mean over layers.
    """
    teachers = list(dict.fromkeys(layer["teacher"] for layer in plan["layers"]))
    return [_chart(name, _points(name, plan["layers"]), _recommended(name, plan)) for name in teachers]


def family_colours(families: Iterable[str]) -> dict[str, str]:
    """A colour for each distinct family, in the order of their names."""
    return dict(zip(sorted(set(families)), itertools.cycle(_COLOURS), strict=False))


def _points(teacher: str, layers: Sequence[Mapping[str, Any]]) -> list[Point]:
    found: dict[str, list[tuple[float, float]]] = {}
    for form in (form for layer in layers if layer["teacher"] == teacher for form in layer["forms"]):
        found.setdefault(form["form"], []).append((float(form["bytes_per_row"]), float(form["explained"])))
    return [
        (rows[0][0], sum(kept for _, kept in rows) / len(rows), _family(form), form) for form, rows in found.items()
    ]


def _family(form: str) -> str:
    """``trellis``, ``cut, int8`` or ``whole width``, from a form as a plan names it.

    ``trellis 96``, ``pca 128 int8``.
    """
    first, *rest = form.split()
    return "whole width" if first == "none" else f"cut, {rest[-1]}" if len(rest) > 1 else first


def _recommended(teacher: str, plan: Mapping[str, Any]) -> set[str]:
    layers = (plan.get("recommendation") or {}).get("layers", [])
    return {layer["form"] for layer in layers if layer["teacher"] == teacher}


def _chart(teacher: str, points: Sequence[Point], recommended: set[str]) -> str:
    low, high = math.log2(min(point[0] for point in points)), math.log2(max(point[0] for point in points))
    floor = max(0.0, min(point[1] for point in points) - 0.02)

    def place(size: float, kept: float) -> tuple[float, float]:
        across = (math.log2(size) - low) / ((high - low) or 1.0)
        up = (kept - floor) / ((1.0 - floor) or 1.0)
        return _LEFT + 8 + across * (_WIDTH - _LEFT - 24), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    drawn = [_axes(teacher, floor)]
    for number, (family, colour) in enumerate(family_colours(point[2] for point in points).items()):
        mine = sorted(point for point in points if point[2] == family)
        line = " ".join("{:.1f},{:.1f}".format(*place(size, kept)) for size, kept, _, _ in mine)
        drawn.append(f'<polyline points="{line}" style="stroke:{colour}"/>')
        drawn += [
            _dot(place(size, kept), size, kept, form, colour, form in recommended) for size, kept, _, form in mine
        ]
        drawn.append(
            f'<text x="{_WIDTH - 100}" y="{_HEIGHT - 92 + 15 * number}" '
            f'style="fill:{colour}">{html.escape(family)}</text>'
        )
    label = html.escape(f"{teacher}: share of variance kept against bytes per row")
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _dot(at: tuple[float, float], size: float, kept: float, form: str, colour: str, ring: bool) -> str:
    title = html.escape(f"{form}: {size:.0f} bytes, {kept:.4f} kept")
    look = f"fill:{colour};stroke:{colour};stroke-width:{5 if ring else 0};stroke-opacity:.35"
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3.5" style="{look}"><title>{title}</title></circle>'


def _axes(teacher: str, floor: float) -> str:
    texts = {
        (_LEFT, 14, "start"): f"{teacher}: variance kept on unseen rows, mean over layers (ring: recommended)",
        (_LEFT - 4, _TOP + 6, "end"): "1.00",
        (_LEFT - 4, _HEIGHT - _BOTTOM, "end"): f"{floor:.2f}",
        (_WIDTH - 8, _HEIGHT - 8, "end"): "bytes per row, logarithmic",
    }
    words = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'
        for (x, y, anchor), text in texts.items()
    )
    return f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - 8}"/>{words}'
