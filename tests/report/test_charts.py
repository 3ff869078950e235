"""Names of points stand beside no other name and on no circle, on wide and on narrow pages."""

from __future__ import annotations

import itertools
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.report.charts import cost, matrix

POINTS = st.lists(
    st.tuples(st.floats(0.5, 400), st.floats(0.3, 1.0), st.integers(1, 25)), min_size=1, max_size=12, unique=True
)
WIDTHS = {"wide": 520, "narrow": 260}


def made(points: list[tuple[float, float, int]]) -> list[dict[str, Any]]:
    return [
        {
            "model": f"{number}" + "x" * length,
            "role": "cell",
            "value": value,
            "latency": latency,
            "parameters": 1e6,
            "size": "1M parameters",
        }
        for number, (latency, value, length) in enumerate(points)
    ]


@settings(deadline=None)
@given(POINTS)
def test_names_meet_neither_names_nor_circles(points: list[tuple[float, float, int]]) -> None:
    spec = cost(made(points), "accuracy")
    rows = spec["data"]["values"]
    domain = spec["layer"][1]["encoding"]["x"]["scale"]["domain"]
    values = [row["value"] for row in rows]
    for kind, width in WIDTHS.items():
        boxes, circles = [], []
        for row in rows:
            low, high = domain
            share = row["latency"] / high if low == 0 else math.log(row["latency"] / low) / math.log(high / low)
            x, y = share * width, (row["value"] - min(values)) / ((max(values) - min(values)) or 1.0) * 180
            circles.append((row["model"], x, y))
            if row[kind] != "none":
                length = 6 * len(row["model"])
                left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[row["align"]] * length
                boxes.append((row["model"], left, left + length, y + (20 if row[kind] == "above" else -21)))
        for one, two in itertools.combinations(boxes, 2):
            assert abs(one[3] - two[3]) > 11 or one[2] <= two[1] + 3 or two[2] <= one[1] + 3
        for box, circle in itertools.product(boxes, circles):
            apart = circle[1] <= box[1] - 8 or circle[1] >= box[2] + 8 or abs(circle[2] - box[3]) > 16
            assert apart or box[0] == circle[0]


def test_a_single_point_has_its_name_on_both() -> None:
    (row,) = cost(made([(3.0, 0.9, 5)]), "accuracy")["data"]["values"]
    assert (row["wide"], row["narrow"]) == ("above", "above")


def test_four_models_fit_a_phone() -> None:
    names = ["student", "granite", "minilm", "mean of teachers"]
    cells = [{"row": one, "column": two, "value": 1.0, "shade": 0.5} for one in names for two in names]
    assert matrix(cells, names, names, ("", ""), digits=".1%")["usermeta"]["least"] <= 390 - 26  # the page's margins
