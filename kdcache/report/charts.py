"""The charts of a page, as Vega-Lite specifications: plain data, which the page draws with the script it carries.

Colours are CSS variables of the page, so a chart follows its light and dark style. Names of models, labels and texts
occur as values of fields only, never as names of fields, because Vega-Lite reads dots and brackets there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.report.losses import Shares
    from kdcache.report.rows import Calibration

Spec = dict[str, Any]
Row = Mapping[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name of the version: nothing is loaded from it
COLOURS = [f"var(--c{number})" for number in range(1, 9)]
_OF_ROLES = {  # the same on all charts
    "student": COLOURS[0],
    "student without teachers": COLOURS[3],
    "teacher": COLOURS[1],
    "mean of teachers": COLOURS[2],
    "weighted mean of teachers": COLOURS[2],
    "chosen": COLOURS[0],
    "baseline": COLOURS[3],
    "cell": COLOURS[6],
}
_POINTS = 160  # of a curve, at most: more are averaged
_TICKS = 9  # values of a setting, up to which each has a tick
_ROW = 26  # pixels of a bar or of a model's line
_LOG_FROM = 20  # ratio of the largest to the smallest value from which an axis is logarithmic
_NARROW = 520  # pixels of a plot, below which fewer names have room; the pointer shows the others
_TALL = 180  # pixels between the lowest and the highest point of a plot with names
_CELL = 30  # pixels of a cell of a matrix


def chart(rows: Sequence[Row], height: int, colour: Spec | None = None, **parts: Any) -> Spec:
    """A specification with its data, as wide as the page allows. ``colour``: the channel that the legend explains."""
    scale = {"domain": [], "range": []} if colour is None else colour["scale"]
    return {
        "usermeta": {"legend": [list(pair) for pair in zip(scale["domain"], scale["range"], strict=True)]},
        "$schema": SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "data": {"values": [{key: rounded(value) for key, value in row.items()} for row in rows]},
        **parts,
    }


def rounded(value: Any) -> Any:
    """A number with six significant digits; what JSON cannot express becomes null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def axis(field: str, title: str | None, *, zero: bool = False, **more: Any) -> Spec:
    """A quantitative channel."""
    return {"field": field, "type": "quantitative", "title": title, "scale": {"zero": zero, "nice": True}, **more}


def named(field: str, order: Sequence[str] | None, title: str | None = None, **more: Any) -> Spec:
    """A channel of names, in the order given."""
    return {"field": field, "type": "nominal", "title": title, "sort": None if order is None else list(order), **more}


def coloured(field: str, order: Sequence[str]) -> Spec:
    """Colours by name, in the order given. The page draws the legend: Vega clips one that needs several lines."""
    free = [colour for colour in COLOURS if colour not in {_OF_ROLES.get(name) for name in order}] or COLOURS
    others = [name for name in order if name not in _OF_ROLES]
    colours = [_OF_ROLES.get(name) or free[others.index(name) % len(free)] for name in order]
    return {
        "field": field,
        "type": "nominal",
        "sort": list(order),
        "scale": {"domain": list(order), "range": colours},
        "legend": None,
    }


def score_intervals(rows: Sequence[Row], metric: str) -> Spec:
    """One line for each model: its score and the interval over rows. Rows: model, role, value, low, high."""
    order, roles = [str(row["model"]) for row in rows], list(dict.fromkeys(str(row["role"]) for row in rows))
    y, colour = named("model", order, axis={"labelLimit": 180}), coloured("role", roles)
    tips = _tips(("model", None), ("value", ".4f"), ("low", ".4f"), ("high", ".4f"))
    layers = [
        {
            "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.55},
            "encoding": {"x": axis("low", metric), "x2": {"field": "high"}, "y": y, "color": colour},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
            "encoding": {"x": axis("value", metric), "y": y, "color": colour, "tooltip": tips},
        },
    ]
    return chart(rows, 44 + _ROW * len(rows), layer=layers)


def cost(rows: Sequence[Row], metric: str) -> Spec:
    """Score against latency, the area of a circle is the number of parameters.

    Rows: model, role, value, low, high, latency, parameters, size (as shown). Low and high may be absent.
    """
    roles = list(dict.fromkeys(str(row["role"]) for row in rows))
    x = axis("latency", "milliseconds per text, one at a time")
    x["scale"] = _latencies([float(row["latency"]) for row in rows])
    y, colour = axis("value", metric), coloured("role", roles)
    y["scale"] = {"zero": False, "nice": True, "padding": 16}
    largest = max((float(row["parameters"] or 0) for row in rows), default=1.0) or 1.0
    area = {"type": "linear", "domain": [0, largest], "range": [30, 700]}
    size = {"field": "parameters", "type": "quantitative", "scale": area, "legend": None}
    tips = _tips(("model", None), ("value", ".4f"), ("latency", ".3~f"), ("size", None))
    layers: list[Spec] = [
        {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "rule", "opacity": 0.5},
            "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour},
        },
        {
            "mark": {"type": "point", "filled": True, "opacity": 0.85},
            "encoding": {"x": x, "y": y, "size": size, "color": colour, "tooltip": tips},
        },
    ]
    words = _placed(rows)
    for align, side in itertools.product(sorted({row["align"] for row in words}), ("above", "below")):
        mark = {"type": "text", "align": align, "dy": -19 if side == "above" else 21, "limit": 190}
        test = f"datum.align === '{align}' && (width < {_NARROW} ? datum.narrow : datum.wide) === '{side}'"
        text = {"x": x, "y": y, "text": {"field": "model"}}
        layers.append({"transform": [{"filter": test}], "mark": mark, "encoding": text})
    return chart(words, 300, colour, layer=layers)


def _latencies(times: Sequence[float]) -> Spec:
    """From 0 to beyond the slowest; logarithmic where they differ much."""
    if max(times) >= _LOG_FROM * min(times):
        return {"type": "log", "domain": [rounded(min(times) / 1.6), rounded(max(times) * 1.6)], "nice": False}
    return {"domain": [0, rounded(1.12 * max(times))], "nice": False}


def _placed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The points, and on which side of each its name stands, on a wide and on a narrow page."""
    times = [float(row["latency"]) for row in rows]
    low, high = _latencies(times)["domain"]
    log = low > 0
    values = [float(row["value"]) for row in rows]
    height = (max(values) - min(values)) or 1.0
    points = [
        {
            **row,
            "across": math.log(time / low) / math.log(high / low) if log else time / high,
            "up": (value - min(values)) / height,
        }
        for row, time, value in sorted(
            zip(rows, times, values, strict=True), key=lambda each: (each[1], each[0]["model"])
        )
    ]
    for point in points:
        share = point["across"]
        point["align"] = "left" if share < 0.22 else "right" if share > 0.67 else "center"
    wide, narrow = _sides(points, _NARROW), _sides(points, _NARROW // 2)
    hidden = ("across", "up")
    return [
        {key: value for key, value in point.items() if key not in hidden} | {"wide": one, "narrow": two}
        for point, one, two in zip(points, wide, narrow, strict=True)
    ]


def _sides(points: Sequence[Row], width: int) -> list[str]:
    """For each point the first side on which its name meets no circle and no other name, in a plot ``width`` wide."""
    places = [(point["across"] * width, point["up"] * _TALL) for point in points]
    circles = [(x - 12, x + 12, y - 12, y + 12) for x, y in places]
    names: list[tuple[float, float, float, float]] = []
    sides = []
    for number, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        length = 6.2 * min(len(str(point["model"])), 30)
        left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[point["align"]] * length
        boxes = {"above": (left, left + length, y + 14, y + 26), "below": (left, left + length, y - 27, y - 15)}
        others = [*circles[:number], *circles[number + 1 :], *names]
        free = [side for side, box in boxes.items() if not any(_meet(box, other) for other in others)]
        sides.append(free[0] if free else "none")
        names += [boxes[side] for side in free[:1]]
    return sides


def _meet(one: tuple[float, float, float, float], two: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (left, right, bottom, top) overlap."""
    return one[0] < two[1] and two[0] < one[1] and one[2] < two[3] and two[2] < one[3]


def matrix(
    cells: Sequence[Row], rows: Sequence[str], columns: Sequence[str], titles: tuple[str, str], *, digits: str
) -> Spec:
    """A table of numbers with shaded cells. Cells: row, column, shade (0 to 1), value; ``digits`` formats the value."""
    many, flat = len(columns) > 20, len(columns) < 8
    longest = max((len(word) for name in columns for word in name.split(" ")), default=0)
    step = max(56, min(100, 10 + 6 * longest))
    labels: Spec = {"labelAngle": 0 if flat else -90, "labelLimit": step - 4 if flat else 110}
    if flat:  # one line for each word
        labels |= {"labelExpr": "slice(split(datum.label, ' '), 0, 3)", "labelLineHeight": 12}
    words = max((len(name.split(" ")[:3]) for name in columns), default=1) if flat else 1
    x = named("column", columns, titles[1], axis=labels | {"labelOverlap": False})
    y = named("row", rows, titles[0], axis={"labelLimit": 130, "labelOverlap": False})
    squares = {
        "mark": {"type": "rect", "fill": "var(--accent)", "stroke": "var(--bg)", "strokeWidth": 1},
        "encoding": {
            "x": x,
            "y": y,
            "fillOpacity": {
                "field": "shade",
                "type": "quantitative",
                "scale": {"domain": [0, 1], "range": [0.04, 0.9]},
                "legend": None,
            },
            "tooltip": _tips(("row", None), ("column", None), ("value", digits)),
        },
    }
    numbers = {
        "mark": {"type": "text", "fontSize": 11},
        "encoding": {
            "x": x,
            "y": y,
            "text": {"field": "value", "type": "quantitative", "format": digits},
            "color": {
                "condition": {"test": "datum.shade > 0.55", "value": "var(--on-accent)"},
                "value": "var(--fg)",
            },
        },
    }
    height = (30 + 12 * words if flat else 130) + (12 if many else _CELL) * len(rows)
    spec = chart(cells, height, layer=[squares] if many else [squares, numbers])
    least, most = (13, 26) if many else (step, 110) if flat else (40, 64)
    names = min(150, 20 + 6 * max((len(name) for name in rows), default=0))
    return spec | {"usermeta": {"legend": [], "least": names + len(columns) * least, "most": 150 + len(columns) * most}}


def reliability(curves: Mapping[str, Calibration]) -> Spec:
    """Share of right answers against confidence, in bins; the diagonal is perfect calibration."""
    rows = [
        {"model": name, "confidence": each.confidence, "accuracy": each.accuracy, "rows": each.rows}
        for name, found in curves.items()
        for each in found.bins
    ]
    lowest = min((min(each[:2]) for found in curves.values() for each in found.bins), default=0.0)
    low = max(0.0, lowest - 0.03)
    scale = {"domain": [rounded(low), 1], "nice": False, "zero": False}
    x = axis("confidence", "mean confidence") | {"scale": scale}
    y = axis("accuracy", "share of right answers") | {"scale": scale}
    diagonal = {
        "data": {"values": [{"confidence": rounded(low), "accuracy": rounded(low)}, {"confidence": 1, "accuracy": 1}]},
        "mark": {"type": "line", "color": "var(--muted)", "strokeDash": [4, 4], "strokeWidth": 1},
        "encoding": {"x": x, "y": y},
    }
    colour = coloured("model", list(curves))
    tips = _tips(("model", None), ("confidence", ".3f"), ("accuracy", ".3f"), ("rows", ","))
    lines = {
        "mark": {"type": "line", "strokeWidth": 2, "point": {"filled": True, "size": 36}},
        "encoding": {"x": x, "y": y, "color": colour, "tooltip": tips},
    }
    return chart(rows, 320, colour, layer=[diagonal, lines])


def loss_terms(shares: Shares) -> Spec:
    """The share of each weighted term in the loss over the steps, stacked to 100 %."""
    sizes = [abs(shares.values[:, place]) for place in range(len(shares.terms))]
    rows = []
    for first in range(0, len(shares.steps), piece := -(-len(shares.steps) // _POINTS) or 1):
        part = slice(first, first + piece)
        means = [float(values[part].mean()) for values in sizes]
        whole = sum(means) or 1.0
        rows += [
            {"step": int(shares.steps[part][-1]), "term": name, "share": value / whole, "size": value}
            for name, value in zip(shares.terms, means, strict=True)
        ]
    tips = _tips(("step", ","), ("term", None), ("share", ".1%"), ("size", ".4g"))
    colour = coloured("term", shares.terms)
    return chart(
        rows,
        240,
        colour,
        mark={"type": "area", "opacity": 0.9},
        encoding={
            "x": axis("step", "step") | {"scale": {"nice": False, "zero": False}},
            "y": axis("share", "share of the loss", stack="normalize", axis={"format": "%"}),
            "color": colour,
            "tooltip": tips,
        },
    )


def lines(
    rows: Sequence[Row], x: tuple[str, str], y: tuple[str, str], names: Sequence[str], *, points: bool = True
) -> Spec:
    """One line for each name. Rows: name, and the two fields; ``x`` and ``y`` are (field, title)."""
    tips = _tips(("name", None), (x[0], ".4~g"), (y[0], ".4~g"))
    mark: Spec = {"type": "line", "strokeWidth": 2} | ({"point": {"filled": True, "size": 36}} if points else {})
    across, up = axis(*x) | {"axis": {"tickMinStep": 1, "format": ",d"}}, axis(*y)
    if len(values := {row[y[0]] for row in rows}) == 1:  # a flat line needs an axis around it
        up["scale"] = {"domain": [rounded(value + space) for value in values for space in (-0.05, 0.05)]}
    colour = coloured("name", names)
    encoding = {"x": across, "y": up, "color": colour, "tooltip": tips}
    return chart(rows, 220, colour, mark=mark, encoding=encoding)


def thinned(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """A curve with at most ``_POINTS`` points, each the mean of its neighbours."""
    piece = -(-len(steps) // _POINTS) or 1
    return [
        (steps[min(first + piece, len(steps)) - 1], math.fsum(part) / len(part))
        for first in range(0, len(steps), piece)
        if (part := values[first : first + piece])
    ]


def bars(rows: Sequence[Row], names: Sequence[str], parts: Sequence[str], title: str, shown: str = ".3~s") -> Spec:
    """Stacked bars. Rows: name, part, value."""
    colour = coloured("part", parts)
    return chart(
        rows,
        50 + _ROW * len(names),
        colour,
        mark={"type": "bar", "stroke": "var(--bg)"},
        encoding={
            "x": axis("value", title, zero=True, axis={"format": shown, "tickCount": 5}),
            "y": named("name", names, axis={"labelLimit": 150}),
            "color": colour,
            "order": {"field": "place", "type": "quantitative"},
            "tooltip": _tips(("name", None), ("part", None), ("value", shown)),
        },
    )


def frontier(rows: Sequence[Row]) -> Spec:
    """Variance kept against bytes. Rows: form, family, bytes, kept, recommended."""
    families = sorted({str(row["family"]) for row in rows})
    x = axis("bytes", "bytes per row") | {"scale": {"type": "log", "base": 2, "nice": False, "padding": 12}}
    y, colour = axis("kept", "variance kept, mean over layers"), coloured("family", families)
    tips = _tips(("form", None), ("bytes", ",.0f"), ("kept", ".4f"))
    ring = {
        "transform": [{"filter": "datum.recommended"}],
        "mark": {"type": "point", "size": 260, "strokeWidth": 2, "filled": False},
        "encoding": {"x": x, "y": y, "color": colour, "tooltip": tips},
    }
    mark = {"type": "line", "strokeWidth": 1.5, "point": {"filled": True, "size": 40}}
    curve = {"mark": mark, "encoding": {"x": x, "y": y, "color": colour, "tooltip": tips}}
    return chart(rows, 260, colour, layer=[curve, ring])


def cells_by_setting(rows: Sequence[Row], key: str, metric: str, groups: Sequence[str], *, log: bool) -> Spec:
    """Cells of a sweep against one of its settings. Rows: at, name, value, low, high, group, settings."""
    numbers = all(isinstance(row["at"], int | float) for row in rows)
    x: Spec = axis("at", key) if numbers else named("at", list(dict.fromkeys(str(row["at"]) for row in rows)), key)
    if numbers:
        x["scale"] = {"type": "log", "nice": False, "padding": 24} if log else {"zero": False, "padding": 24}
        if len(values := sorted({row["at"] for row in rows})) <= _TICKS:
            x["axis"] = {"values": values, "format": ".6~g"}  # without digits, few ticks make 10 a 1e+1
    else:
        x["axis"] = {"labelAngle": 0 if len({row["at"] for row in rows}) < 5 else -30, "labelLimit": 140}
    y, colour = axis("value", metric), coloured("group", groups)
    beside = len({(row["at"], row["group"]) for row in rows}) > len({row["at"] for row in rows})
    across = {"xOffset": {"field": "group", "sort": list(groups)}} if beside and not numbers else {}
    tips = _tips(("name", None), ("settings", None), ("value", ".4f"), ("low", ".4f"), ("high", ".4f"))
    bar = {
        "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.5},
        "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour, **across},
    }
    dot = {
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 0.95},
        "encoding": {"x": x, "y": y, "color": colour, "tooltip": tips, **across},
    }
    return chart(rows, 280, colour, layer=[bar, dot])


def _tips(*fields: tuple[str, str | None]) -> list[Spec]:
    """What is shown under the pointer, with the format of each number."""
    return [
        {"field": name, "type": "nominal"} if form is None else {"field": name, "type": "quantitative", "format": form}
        for name, form in fields
    ]
