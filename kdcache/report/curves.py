"""Curves of the logged loss terms as inline SVG, and their scales as numbers.

Which term drives the training is seen, not guessed.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 340, 150, 52, 18
_BOOKKEEPING = {"stage", "event", "step", "epoch", "steps"}


@dataclass(frozen=True)
class Curve:
    """One logged number over optimizer steps."""

    stage: str
    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def read_curves(metrics: Path, event: str) -> list[Curve]:
    """Curves of ``metrics.jsonl`` for the lines of one ``event`` ('steps' or 'epoch'), by stage, in the order of
    appearance.

    Evaluations within epochs belong to 'epoch'.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a partial line of a killed run
            continue
        if {"evaluation": "epoch"}.get(entry.get("event"), entry.get("event")) != event:
            continue
        for name, value in entry.items():
            if name not in _BOOKKEEPING and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault((str(entry.get("stage", "")), name), []).append((float(entry["step"]), float(value)))
    return [
        Curve(stage, name, tuple(step for step, _ in found), tuple(value for _, value in found))
        for (stage, name), found in points.items()
    ]


def scales(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Per curve: its first and last value, median and largest magnitude."""
    rows = []
    for curve in curves:
        sizes = sorted(abs(value) for value in curve.values)
        rows.append(
            {
                "term": curve.name,
                "first": curve.values[0],
                "last": curve.values[-1],
                "median": sizes[len(sizes) // 2],
                "largest": sizes[-1],
            }
        )
    return rows


def svg(curve: Curve) -> str:
    """A line over steps with the ends of both axes labelled."""
    low, high = min(curve.values), max(curve.values)
    first, last = curve.steps[0], curve.steps[-1]
    across = (_WIDTH - _LEFT - 8) / ((last - first) or 1.0)
    up = (_HEIGHT - _BOTTOM - 26) / ((high - low) or 1.0)
    points = " ".join(
        f"{_LEFT + (step - first) * across:.1f},{_HEIGHT - _BOTTOM - (value - low) * up:.1f}"
        for step, value in zip(curve.steps, curve.values, strict=True)
    )
    labels = {
        (_LEFT - 4, 30, "end"): f"{high:.4g}",
        (_LEFT - 4, _HEIGHT - _BOTTOM, "end"): f"{low:.4g}",
        (_LEFT, _HEIGHT - 3, "start"): f"step {first:.0f}",
        (_WIDTH - 8, _HEIGHT - 3, "end"): f"{last:.0f}",
        (_LEFT, 14, "start"): curve.name,
    }
    texts = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'
        for (x, y, anchor), text in labels.items()
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{html.escape(curve.name)}">'
        f'<path class="axis" d="M{_LEFT} 22V{_HEIGHT - _BOTTOM}H{_WIDTH - 8}"/><polyline '
        f'points="{points}"/>{texts}</svg>'
    )


def by_stage(curves: Sequence[Curve]) -> Mapping[str, list[Curve]]:
    """Curves grouped by the stage that logged them."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.stage, []).append(curve)
    return groups
