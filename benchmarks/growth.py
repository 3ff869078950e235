"""What a cache of more rows than were measured needs, computed from the measured growth; and the plot of both.

Parts have their largest size from ten million rows on, so parts, files and bytes of the manifest grow with the rows
from there. Seconds of opening are those of the smallest cache, which any cache needs, and the rest grows with the rows.
Memory while a cache is opened is that of a row and of a file; the buckets of the join have the same size at any number.
Of the first batch only the order of the epoch grows. Memory is what stays of every further row and file.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
DECADES = (10**8, 10**9)
RESIDENT = {"row": 11, "file": 900}  # bytes: part, row, label and order; an entry of the manifest (decisions/0013)
JOINING = {"row": 13, "file": 900}  # bytes of the peak: places, label and marks of a row; buckets have one size
JOINED, JOINED_PEAK = "first process: open, s of the processor", "first process: peak while opening, MB"
MAPPING = {"row": 4, "file": 900}  # the parts of all rows are looked at
PEAK = "peak while opening, MB"
OPENED, BATCHED = "open, s of the processor", "first batch, s of the processor"
ORDERED = "order of an epoch, s of the processor"


def computed(found: Mapping[int, Report]) -> dict[str, Any]:
    """The decades after the largest of ``found`` {rows: measured}, whose parts have their largest size."""
    rows = max(found)
    least, last, report = found[min(found)], found[rows], {}
    for size in DECADES:
        times = size / rows
        files = round(last["files"] * times)
        new = {"row": size - rows, "file": files - last["files"]}
        report[f"{size} rows, computed"] = {
            "part size": last["part size"],
            "files": files,
            "data bytes": round(last["data bytes"] * times),
            "manifest bytes": round(last["manifest bytes"] * times),
            OPENED: least[OPENED] + (last[OPENED] - least[OPENED]) * times,
            BATCHED: last[BATCHED] + last[ORDERED] * (times - 1),
            ORDERED: last[ORDERED] * times,
            "resident, MB": last["resident, MB"] + _mb(RESIDENT, new),
            PEAK: last[PEAK] + _mb(MAPPING, new),
            JOINED: least[JOINED] + (last[JOINED] - least[JOINED]) * times,
            JOINED_PEAK: last[JOINED_PEAK] + _mb(JOINING, new),
        }
    return report


def _mb(bytes_of: Mapping[str, int], new: Mapping[str, int]) -> float:
    """What so many more rows and files need, MB."""
    return sum(bytes_of[what] * new[what] for what in bytes_of) / 1e6


WIDTH, HEIGHT, LEFT, GAP, TOP = 340, 190, 46, 40, 34
STYLE = (
    "svg{background:#fff}text{font:11px system-ui,sans-serif;fill:#57606a}.title{fill:#24292f;font-weight:600}"
    "path{fill:none;stroke:#8c959f}.ours{stroke:#1f6feb;stroke-width:1.6}.computed{stroke-dasharray:4 3}"
    ".goal{stroke:#cf222e;stroke-dasharray:2 3}.grid{stroke:#d8dee4}circle{fill:#1f6feb}circle.computed{fill:#fff;"
    "stroke:#1f6feb}"
)
PANELS = (  # title, key, what is subtracted, the bar for ten million rows
    ("seconds of the processor to open", OPENED, None, 3.0),
    ("seconds of the processor to the first batch", BATCHED, None, 5.0),
    ("resident memory above the libraries, MB", "resident, MB", "before opening, MB", 1000.0),
    ("manifest, MB", "manifest bytes", None, None),
)


def plot(report: Report) -> str:
    """Four panels, both axes logarithmic: measured sizes filled, computed ones hollow, the bars red."""
    sizes = {int(key.split()[0]): key for key in report if " rows" in key}
    libraries = next(report[key]["before opening, MB"] for key in sizes.values() if "computed" not in key)
    drawn = []
    for number, (title, key, without, bar) in enumerate(PANELS):
        points = [
            (
                rows,
                (report[name][key] - (libraries if without else 0)) / (1e6 if "bytes" in key else 1),
                "computed" in name,
            )
            for rows, name in sorted(sizes.items())
            if key in report[name]
        ]
        x, y = (number % 2) * (WIDTH + GAP) + LEFT, (number // 2) * (HEIGHT + GAP + TOP) + TOP
        drawn += _panel(title, points, bar, x, y)
    width, height = 2 * WIDTH + GAP + LEFT + 10, 2 * (HEIGHT + GAP + TOP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="Growth with the number of rows"><style>{STYLE}</style>{"".join(drawn)}</svg>\n'
    )


def _panel(title: str, points: Sequence[tuple[int, float, bool]], bar: float | None, x: int, y: int) -> list[str]:
    values = [value for _, value, _ in points] + ([bar] if bar else [])
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = math.log10(points[0][0]), math.log10(points[-1][0])

    def place(rows: float, value: float) -> tuple[float, float]:
        across = (math.log10(rows) - first) / ((last - first) or 1.0)
        return x + WIDTH * across * 0.94 + 8, y + HEIGHT * (high - math.log10(value)) / ((high - low) or 1)

    drawn = [f'<text class="title" x="{x}" y="{y - 10}">{html.escape(title)}</text>']
    for power in range(low, high + 1):
        height = place(points[0][0], 10.0**power)[1]
        drawn.append(f'<path class="grid" d="M{x} {height:.1f}h{WIDTH}"/>')
        drawn.append(f'<text x="{x - 5}" y="{height + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for rows, _, _ in points:
        across = place(rows, values[0])[0]
        drawn.append(f'<text x="{across:.1f}" y="{y + HEIGHT + 15}" text-anchor="middle">{_power(rows)}</text>')
    if bar:
        drawn.append(f'<path class="goal" d="M{x} {place(points[0][0], bar)[1]:.1f}h{WIDTH}"/>')
    for (rows, value, _), (later, more, guessed) in itertools.pairwise(points):
        start, end = place(rows, value), place(later, more)
        kind = "ours computed" if guessed else "ours"
        drawn.append(f'<path class="{kind}" d="M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"/>')
    for rows, value, guessed in points:
        at = place(rows, value)
        drawn.append(
            f'<circle{" class=" + chr(34) + "computed" + chr(34) if guessed else ""} cx="{at[0]:.1f}" cy="{at[1]:.1f}" '
            f'r="3.5"><title>{rows:,} rows: {value:.3g}{" (computed)" if guessed else ""}</title></circle>'
        )
    return drawn


def _power(rows: int) -> str:
    """10⁷ for ten million, the digits for a size between."""
    power = round(math.log10(rows))
    return "10" + str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) if 10**power == rows else f"{rows:,}"
